//! Reading a rollout: its settings, and its trajectories with their steps, unit by unit.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use mempo_agent::RewardKind;
use mempo_data::{Cursor, Key, Step, Trajectory, groups, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_text::{Profile, PromptBuilder, ToolSpec};
use serde::{Deserialize, Serialize};

/// Consecutive tasks that are scored, written and committed together.
pub(crate) const TASKS_PER_UNIT: usize = 16;

/// How a rollout was sampled, from its manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) profile: String,
    pub(crate) context: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) carry: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) carry_steps: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) retrieved_steps: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_tool_calls: Option<usize>,
    /// Most tokens of a memory that the next step saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_memory_tokens: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) chunk_tokens: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_chunks: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last_tokens: Option<usize>,
    /// Most tokens of a completion: of a reader's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_completion_tokens: Option<usize>,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) group_size: u64,
    /// What trajectories were rewarded for.
    #[serde(default, skip_serializing_if = "RewardKind::is_default")]
    pub(crate) reward: RewardKind,
    /// What the policy was told about its tools; older rollouts name none.
    #[serde(default = "search_alone", skip_serializing_if = "is_search_alone")]
    pub(crate) tools: Vec<ToolSpec>,
}

fn search_alone() -> Vec<ToolSpec> {
    vec![ToolSpec::search()]
}

fn is_search_alone(tools: &[ToolSpec]) -> bool {
    tools == [ToolSpec::search()]
}

impl Settings {
    /// The rule that trajectories were rewarded by, with its version.
    pub(crate) fn reward(&self) -> String {
        serde_json::json!(self.reward).as_str().unwrap_or_default().to_owned()
    }

    /// Without the options that say nothing under this context policy.
    fn that_matter(mut self) -> Self {
        if self.context != "memagent" {
            (self.chunk_tokens, self.max_chunks, self.max_completion_tokens) = (None, None, None);
        }
        if self.context != "full-document" {
            self.last_tokens = None;
        }
        self
    }

    /// The context policy with its options.
    pub(crate) fn context(&self) -> String {
        let Self { context, carry, carry_steps, retrieved_steps, max_tool_calls, max_memory_tokens, .. } = self;
        let is_mempo = context == "mempo";
        let memory_tokens = max_memory_tokens.or(self.max_completion_tokens);
        let named = |name: &str, value: Option<usize>| value.map(|value| format!("{name} {value}"));
        let options = [
            carry.clone().filter(|carry| is_mempo && carry != "step"),
            named("steps", carry_steps.filter(|steps| is_mempo && *steps != 1)),
            named("memory tokens", memory_tokens),
            named("chunk tokens", self.chunk_tokens),
            named("chunks", self.max_chunks),
            named("last tokens", self.last_tokens),
            named("retrieved", retrieved_steps.filter(|_| ["rag-memory", "a-mem"].contains(&context.as_str()))),
            named("calls", *max_tool_calls),
        ];
        [Some(context.clone())].into_iter().chain(options).flatten().collect::<Vec<_>>().join(", ")
    }
}

/// A trajectory with its steps, in order.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) trajectory: Trajectory,
    pub(crate) steps: Vec<Step>,
}

/// A finished rollout.
pub(crate) struct Rollouts {
    pub(crate) input: Input,
    pub(crate) settings: Settings,
}

impl Rollouts {
    /// Checks the directory's files and reads its settings.
    pub(crate) fn open(directory: &Path) -> anyhow::Result<Self> {
        let input = Input::stage("rollouts", directory)?;
        let manifest = input.manifest().ok_or_else(|| anyhow!("{}: no manifest", directory.display())).bad_input()?;
        let settings: Settings = serde_json::from_value(manifest.arguments.clone())
            .with_context(|| format!("{}: the manifest's arguments are not those of a rollout", directory.display()))
            .bad_input()?;
        for table in ["trajectories", "steps"] {
            input.table(table)?;
        }
        Ok(Self { input, settings: settings.that_matter() })
    }

    /// The temperature of log-probabilities: what was sampled greedily is scored at 1.
    pub(crate) fn temperature(&self) -> f64 {
        if self.settings.temperature > 0.0 { self.settings.temperature } else { 1.0 }
    }

    /// How the agent talked.
    pub(crate) fn profile(&self) -> anyhow::Result<Profile> {
        Profile::load(&self.settings.profile).bad_input()
    }

    /// The builder of the prompts that were sampled from, with the tokenizer and chat template of `model`.
    pub(crate) fn prompt_builder(&self, model: &Path) -> anyhow::Result<PromptBuilder> {
        let profile = self.profile()?;
        PromptBuilder::load(model, profile, &self.settings.tools).bad_input()
    }

    /// Number of tasks; reads the whole table of trajectories once.
    pub(crate) fn count_tasks(&self) -> anyhow::Result<usize> {
        let mut count = 0;
        for group in groups(read_rows::<Trajectory>(&self.input.table("trajectories")?).bad_input()?) {
            group.bad_input()?;
            count += 1;
        }
        Ok(count)
    }

    /// Starts reading at the first task.
    pub(crate) fn reader(&self) -> anyhow::Result<Reader> {
        let trajectories = read_rows::<Trajectory>(&self.input.table("trajectories")?).bad_input()?;
        let steps = read_rows::<Step>(&self.input.table("steps")?).bad_input()?;
        Ok(Reader {
            tasks: Box::new(groups(trajectories)),
            steps: Cursor::new(steps),
            directory: self.input.dir().to_path_buf(),
        })
    }
}

/// Walks trajectories and steps side by side.
pub(crate) struct Reader {
    tasks: Box<dyn Iterator<Item = mempo_data::Result<Vec<Trajectory>>>>,
    steps: Cursor<Step>,
    directory: PathBuf,
}

impl Reader {
    /// The trajectories of the next [`TASKS_PER_UNIT`] tasks, grouped by task; without steps unless they are `wanted`.
    pub(crate) fn next_unit(&mut self, wanted: bool) -> anyhow::Result<Vec<Vec<Attempt>>> {
        let mut unit = Vec::new();
        while unit.len() < TASKS_PER_UNIT {
            let Some(group) = self.tasks.next() else { break };
            let attempts = group.bad_input()?.into_iter().map(|trajectory| self.attempt(trajectory, wanted));
            unit.push(attempts.collect::<anyhow::Result<Vec<_>>>()?);
        }
        Ok(unit)
    }

    fn attempt(&mut self, trajectory: Trajectory, wanted: bool) -> anyhow::Result<Attempt> {
        let count = if wanted { trajectory.step_count } else { 0 };
        let steps = (0..count).map(|step_index| {
            let key = Key::of_step(&trajectory.task_id, trajectory.trajectory_index, step_index);
            let step = self.steps.take(&key).bad_input()?;
            step.ok_or_else(|| {
                anyhow!(
                    "{}: `steps` has no row {key}, but its trajectory counts {count} steps",
                    self.directory.display()
                )
            })
            .bad_input()
        });
        let steps = steps.collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Attempt { trajectory, steps })
    }
}
