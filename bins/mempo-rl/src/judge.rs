//! What a run looks at beside its optimizer steps: that it begins where sampling ended, what its steps show, and that none
//! was left out.

use anyhow::anyhow;
use mempo_run::ResultExt;
use mempo_train::{PolicyStats, PolicyTrajectory};
use tracing::{info, warn};

use crate::load::Source;
use crate::plan::{Planned, PlannedStep, Selection, window};
use crate::train::{TOKENS_IN_MEMORY, Training};

/// Trajectories that a message names.
const NAMED: usize = 3;

impl Training<'_> {
    /// The first update must begin where sampling ended: else tokenizer, template, temperature or numbers differ.
    pub(crate) fn check_identity(
        &self,
        plan: &[PlannedStep],
        selection: &Selection,
        source: &Source,
    ) -> anyhow::Result<()> {
        let Some(tolerance) = self.arguments.check_identity.filter(|_| self.saved == 0) else { return Ok(()) };
        let (options, budget) = (&self.arguments.policy, self.arguments.tokens_per_micro_batch);
        let first = plan.iter().take_while(|step| step.epoch == 0).count();
        let (mut done, mut tokens, mut distance, mut most, mut kl) = (0, 0.0, 0.0, 0_f64, 0.0);
        while done < first {
            let steps = &plan[done..first][..window(&plan[done..first], &selection.trajectories, TOKENS_IN_MEMORY)];
            let members: Vec<&Planned> = steps.iter().flat_map(|step| selection.members(step)).collect();
            let stats = self.trainer.policy_stats(&source.load(&members)?, options, self.temperature, budget)?;
            let count = stats.tokens as f64;
            tokens += count;
            distance += count * stats.ratio_distance;
            kl += count * stats.kl.filter(|_| self.own_reference).unwrap_or(0.0);
            most = most.max(stats.ratio_max);
            done += steps.len();
        }
        let (distance, kl) = (distance / f64::max(tokens, 1.0), kl / f64::max(tokens, 1.0));
        info!("identity: ratio 1 to {distance:e} on average, at most {most}, divergence {kl:e}");
        if distance <= tolerance && kl.abs() <= tolerance {
            return Ok(());
        }
        Err(anyhow!(
            "--check-identity: before any update the ratio is {distance:e} from 1 on average (at most {most}) and the divergence \
             from the model itself {kl:e}, expected 0 to {tolerance}: give log-probs of this model in this --dtype, or \
             --deterministic to all stages (adapters that were merged for sampling are off by the rounding)"
        ))
        .quality()
    }

    /// Warns of an update that was left out, stops where a step shows a collapse; both with the trajectories that show it.
    pub(crate) fn judge(
        &self,
        step: usize,
        stats: &PolicyStats,
        content: &[PolicyTrajectory],
        members: &[&Planned],
    ) -> anyhow::Result<()> {
        if stats.skipped {
            let named = self.worst(content, members, |stats| if stats.skipped { 1.0 } else { 0.0 })?;
            warn!(
                "optimizer step {step}: the gradient is not finite, the weights were left as they were; its trajectories: {named}"
            );
        }
        let Some(alarm) = self.arguments.alarms.of_step(stats) else { return Ok(()) };
        let named = self.worst(content, members, alarm.badness)?;
        Err(anyhow!(
            "optimizer step {step}: {}: {:.4} nats: the policy has collapsed; lower --learning-rate, raise --kl-coefficient, or \
             start from an earlier checkpoint; after it, most in {named}",
            alarm.option,
            alarm.value
        ))
        .quality()
    }

    /// The trajectories that are worst by what each alone comes to now, the worst first; those that are not learnt left out.
    fn worst(
        &self,
        content: &[PolicyTrajectory],
        members: &[&Planned],
        badness: impl Fn(&PolicyStats) -> f64,
    ) -> anyhow::Result<String> {
        let (options, budget) = (&self.arguments.policy, self.arguments.tokens_per_micro_batch);
        let mut found = Vec::new();
        for (trajectory, planned) in content.iter().zip(members) {
            let stats =
                self.trainer.policy_stats(std::slice::from_ref(trajectory), options, self.temperature, budget)?;
            if stats.tokens == 0 {
                continue;
            }
            found.push((badness(&stats), format!("{}/trajectory {}", planned.task_id, planned.trajectory_index)));
        }
        found.sort_by(|(left, _), (right, _)| right.total_cmp(left));
        found.truncate(NAMED);
        Ok(found.into_iter().map(|(_, name)| name).collect::<Vec<_>>().join(", "))
    }

    /// A run whose updates were not all made is none unless that is allowed; what it did is kept until then.
    pub(crate) fn refuse_skipped(&mut self, planned: usize) -> anyhow::Result<()> {
        let skipped = self.metrics.lines().iter().filter(|line| line["skipped"] == true).count();
        if skipped == 0 || self.arguments.allow_skipped {
            return Ok(());
        }
        self.save(planned)?;
        Err(anyhow!(
            "{skipped} of {planned} optimizer steps had a gradient that is not finite and left the weights as they were: lower \
             --learning-rate or look at the trajectories above; or run the same command with --allow-skipped, which commits what \
             the others made"
        ))
        .quality()
    }
}
