//! The books of a rollout: what came of the trajectories, and whether too many failed for reasons not the policy's.

use std::collections::BTreeMap;

use anyhow::anyhow;
use mempo_data::{Status, Trajectory};
use mempo_run::ResultExt;
use serde_json::{Value, json};

/// Sums over trajectories.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) trajectories: u64,
    pub(crate) steps: u64,
    by_status: BTreeMap<Status, u64>,
    /// Trajectories with a reward: the means below are over them.
    judged: u64,
    reward: f64,
    exact_match: f64,
    f1: f64,
    format_valid: u64,
    pub(crate) generated_tokens: u64,
    processed_tokens: u64,
    unique_tokens: u64,
    peak_tokens: i32,
    tool_calls: u64,
    last_error: Option<String>,
    /// What this process sampled itself, for its speed.
    pub(crate) sampled_tokens: u64,
    pub(crate) sampled_seconds: f64,
}

impl Tally {
    pub(crate) fn add(&mut self, row: &Trajectory) {
        self.trajectories += 1;
        self.steps += row.step_count as u64;
        *self.by_status.entry(row.status).or_default() += 1;
        self.generated_tokens += row.generated_tokens as u64;
        self.processed_tokens += row.processed_tokens as u64;
        self.unique_tokens += row.unique_tokens as u64;
        self.peak_tokens = self.peak_tokens.max(row.peak_tokens);
        self.tool_calls += row.tool_calls as u64;
        match row.reward {
            Some(reward) => {
                self.judged += 1;
                self.reward += f64::from(reward);
                self.exact_match += mean(&row.exact_match);
                self.f1 += mean(&row.f1);
                self.format_valid += u64::from(row.format_valid);
            }
            None => self.last_error.clone_from(&row.error),
        }
    }

    /// How fast this process samples and what the trajectories so far earned, in words.
    pub(crate) fn progress(&self) -> String {
        let rate = self.sampled_tokens as f64 / self.sampled_seconds.max(1e-9);
        format!("{rate:.0} tokens/s, mean reward {:.3}", self.reward / self.judged.max(1) as f64)
    }

    /// Fails once more trajectories have failed around the policy than `max_error_rate` allows among `planned`.
    pub(crate) fn check(&self, max_error_rate: f64, planned: u64) -> anyhow::Result<()> {
        let failed = self.trajectories - self.judged;
        if failed as f64 <= max_error_rate * planned as f64 {
            return Ok(());
        }
        let table: Vec<String> =
            self.by_status.iter().map(|(status, count)| format!("  {:<14}{count:>8}", name(*status))).collect();
        let error = anyhow!(
            "{failed} of {planned} trajectories failed through no fault of the policy, more than --max-error-rate \
             {max_error_rate} allows; the last said: {}\n{}\nRemove the cause and run again with --restart.",
            self.last_error.as_deref().unwrap_or("nothing"),
            table.join("\n"),
        );
        Err(error).quality()
    }

    /// For the manifest. Means are over the trajectories with a reward, exact match and F1 over objectives first.
    pub(crate) fn summary(&self) -> Value {
        let mean = |sum: f64| (self.judged > 0).then(|| sum / self.judged as f64);
        let status: serde_json::Map<String, Value> =
            self.by_status.iter().map(|(status, count)| (name(*status), json!(count))).collect();
        json!({
            "status": status,
            "reward": mean(self.reward),
            "exact_match": mean(self.exact_match),
            "f1": mean(self.f1),
            "format_valid": mean(self.format_valid as f64),
            "generated_tokens": self.generated_tokens,
            "processed_tokens": self.processed_tokens,
            "unique_tokens": self.unique_tokens,
            "peak_tokens": self.peak_tokens,
            "tool_calls": self.tool_calls,
        })
    }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len().max(1) as f64
}

/// The status as tables write it.
pub(crate) fn name(status: Status) -> String {
    json!(status).as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trajectory(status: Status, reward: Option<f32>) -> Trajectory {
        Trajectory {
            task_id: "t".to_owned(),
            trajectory_index: 0,
            step_count: 2,
            status,
            answer: None,
            format_valid: true,
            exact_match: vec![1.0, 0.0],
            f1: vec![1.0, 0.5],
            reward,
            generated_tokens: 10,
            processed_tokens: 100,
            unique_tokens: 50,
            peak_tokens: 60,
            tool_calls: 1,
            error: reward.is_none().then(|| "the disk is gone".to_owned()),
            policy: String::new(),
            seed: 0,
        }
    }

    #[test]
    fn failures_around_the_policy_are_counted_and_never_averaged() {
        let mut tally = Tally::default();
        tally.add(&trajectory(Status::Ok, Some(1.0)));
        tally.add(&trajectory(Status::MaxSteps, Some(0.0)));
        tally.add(&trajectory(Status::ToolError, None));
        let summary = tally.summary();
        assert_eq!(summary["reward"], json!(0.5));
        assert_eq!(summary["exact_match"], json!(0.5));
        assert_eq!(summary["f1"], json!(0.75));
        assert_eq!(summary["status"], json!({"ok": 1, "max_steps": 1, "tool_error": 1}));
        assert!(tally.check(0.1, 10).is_ok(), "one of ten");
        let error = format!("{:#}", tally.check(0.05, 10).unwrap_err());
        assert!(error.contains("the disk is gone") && error.contains("tool_error"), "{error}");
    }
}
