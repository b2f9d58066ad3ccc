//! What is known of the runs of a name: how they were sampled, what that took, and their figures by task.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use mempo_data::{Trajectory, groups, read_rows};
use mempo_run::ResultExt;
use serde::{Deserialize, Serialize};

use crate::cost::{Cost, RunCost};
use crate::measure::{By, Measure, TaskFigures, task_figures};
use crate::rollouts::{Rollouts, Settings};

/// The trajectories of all runs of a name, summed up by task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) label: String,
    /// How they were sampled; nothing for answers from a file.
    pub(crate) settings: Option<Settings>,
    /// What sampling took, run by run.
    #[serde(default)]
    pub(crate) costs: Vec<RunCost>,
    /// Digests of the checkpoints that sampled.
    pub(crate) policies: Vec<String>,
    pub(crate) tasks: Vec<TaskFigures>,
}

impl Measured {
    /// Measures a finished rollout.
    pub(crate) fn of_rollouts(path: &Path, label: String, measure: &Measure<'_>) -> anyhow::Result<Self> {
        let rollouts = Rollouts::open(path)?;
        let (best_of, count) = (measure.best_of, rollouts.settings.group_size);
        if best_of as u64 > count {
            return Err(anyhow!("--best-of {best_of}: {} has {count} trajectories a task", path.display())).usage();
        }
        let (mut tasks, mut policies) = (Vec::new(), Vec::new());
        for group in groups(read_rows::<Trajectory>(&rollouts.input.table("trajectories")?).bad_input()?) {
            let group = group.bad_input()?;
            let task_id = &group[0].task_id;
            if measure.facts.is_some_and(|facts| facts.of(task_id).is_none()) {
                return Err(anyhow!("{}: trajectories of task `{task_id}`, which --tasks lack", path.display()))
                    .bad_input();
            }
            let new = group.iter().map(|row| &row.policy).filter(|policy| !policies.contains(*policy)).cloned();
            let new: Vec<String> = new.take(1).collect();
            policies.extend(new);
            tasks.push(task_figures(&group, measure));
        }
        let cost = rollouts.input.manifest().map(Cost::of).unwrap_or_default();
        let costs = vec![RunCost::new(cost, &tasks)];
        Ok(Self { label, settings: Some(rollouts.settings), costs, policies, tasks })
    }

    /// Measures answers that came from a file.
    pub(crate) fn of_answers(rows: &[Trajectory], label: String, measure: &Measure<'_>) -> Self {
        let tasks = rows.iter().map(|row| task_figures(std::slice::from_ref(row), measure)).collect();
        Self { label, settings: None, costs: vec![], policies: vec![], tasks }
    }

    /// Takes in another run of the same name: sampled in the same way, of other tasks or under another seed.
    fn join(&mut self, run: Self) -> anyhow::Result<()> {
        let label = &self.label;
        if self.settings != run.settings {
            let settings = |of: &Self| serde_json::to_string(&of.settings);
            return Err(anyhow!(
                "--name {label}: sampled with {}, another one of this name with {}",
                settings(&run)?,
                settings(self)?
            ));
        }
        let known: HashSet<(u64, &str)> = self.tasks.iter().map(|task| (task.seed, task.task_id.as_str())).collect();
        if let Some(task) = run.tasks.iter().find(|task| known.contains(&(task.seed, task.task_id.as_str()))) {
            let (seed, id) = (task.seed, &task.task_id);
            return Err(anyhow!("--name {label}: task `{id}` under seed {seed} is in another one of this name too"));
        }
        let new = run.policies.into_iter().filter(|policy| !self.policies.contains(policy)).collect::<Vec<_>>();
        self.policies.extend(new);
        self.tasks.extend(run.tasks);
        self.costs.extend(run.costs);
        Ok(())
    }
}

/// Adds a run to those of its name; `path` is where it comes from.
pub(crate) fn add(runs: &mut Vec<Measured>, run: Measured, path: &Path) -> anyhow::Result<()> {
    if let Some(other) = runs.iter_mut().find(|other| other.label == run.label) {
        return other.join(run).with_context(|| path.display().to_string()).bad_input();
    }
    runs.push(run);
    Ok(())
}

/// Refuses runs of one task of which different things are known, and groups that nothing is known of.
pub(crate) fn check(runs: &[Measured], by: &[By]) -> anyhow::Result<()> {
    let mut known: HashMap<&str, (&TaskFigures, &str)> = HashMap::new();
    for (run, task) in runs.iter().flat_map(|run| run.tasks.iter().map(move |task| (run, task))) {
        let (first, label) = known.entry(&task.task_id).or_insert((task, &run.label));
        if (&first.group, &first.cluster) != (&task.group, &task.cluster) {
            return Err(anyhow!(
                "task `{}` was measured with other --tasks in {} than in {label}: give both the same, all tasks at a time",
                task.task_id,
                run.label
            ))
            .bad_input();
        }
        let needs_tasks = by.iter().any(|by| matches!(by, By::Source | By::DocumentTokens));
        if needs_tasks && task.group.source.is_none() {
            let label = &run.label;
            return Err(anyhow!(
                "--by source and document-tokens: {label} was measured without --tasks DIR, which hold them"
            ))
            .usage();
        }
        if by.contains(&By::DocumentTokens) && task.group.document_tokens.is_none() {
            return Err(anyhow!(
                "--by document-tokens: task `{}` of {} has no whole number `document_tokens` in the metadata of its --tasks; \
                 tasks with documents have one, as `mempo-rollout compose` makes them",
                task.task_id,
                run.label
            ))
            .bad_input();
        }
    }
    Ok(())
}
