//! `reader`: long-document tasks -> what a scripted reader wrote chunk by chunk, as a rollout to be learnt from.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use mempo_agent::{
    Agent, ContextOptions, ContextPolicy, Engine, Environment, Generation, LimitOptions, OnToolFailure, Request,
    RewardKind, Start, Toolbox, context_policy,
};
use mempo_data::{StopReason, Task, read_document, read_rows, write_rows};
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use mempo_text::{Profile, PromptBuilder};
use serde::Serialize;
use serde_json::json;

use crate::expert::steps_of;
use crate::random::Random;
use crate::reading::{Reading, ReadingHabits, World};

/// Let a scripted reader work on tasks with a document, with a memory that forgets and goes wrong.
///
/// Writes the tables of a rollout (`trajectories`, `steps`), with prompts as `mempo-rollout sample` lays them out, so that
/// `mempo-sft build` reads it as any other. The reader writes down what answers a question once the passage that tells stands
/// in its chunk as far as the answer; of a passage that two chunks share it may miss it.
#[derive(Debug, Args, Serialize)]
pub(crate) struct ReaderArguments {
    /// Tasks of `mempo-rollout compose --document`, of questions of `mempo-demo data`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: PathBuf,
    /// The corpus of `mempo-demo data`
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    corpus: PathBuf,
    /// Model directory whose tokenizer and chat template are used
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    model: PathBuf,
    /// Folder of the profile
    #[arg(long, value_name = "NAME|DIR", default_value = "memagent")]
    #[serde(serialize_with = "crate::profile_name")]
    profile: String,
    #[command(flatten)]
    #[serde(flatten)]
    context: ContextOptions,
    #[command(flatten)]
    #[serde(flatten)]
    habits: ReadingHabits,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// Tasks that are read together, and make a part.
const TASKS_PER_UNIT: usize = 64;

/// Runs `reader`.
pub(crate) fn run(arguments: &ReaderArguments) -> anyhow::Result<()> {
    arguments.habits.check().usage()?;
    let context = context_policy(&arguments.context).usage()?;
    let tasks = Input::stage("tasks", &arguments.tasks)?;
    let (corpus, model) =
        (Input::files("corpus", std::slice::from_ref(&arguments.corpus))?, Input::model("model", &arguments.model)?);
    let profile = Profile::load(&arguments.profile).usage()?;
    let profile_files = Profile::files(&arguments.profile).map(|files| Input::files("profile", &files)).transpose()?;
    let builder = PromptBuilder::load(&arguments.model, profile, &[]).bad_input()?;
    let inputs: Vec<&Input> = [&tasks, &corpus, &model].into_iter().chain(&profile_files).collect();
    let Some(stage) = Stage::open("mempo-demo", "reader", &arguments.stage, arguments, &inputs)? else {
        return Ok(());
    };
    let (mut trajectories, mut steps, mut right) = (0, 0, 0.0);
    let all = read_rows::<Task>(&tasks.table("tasks")?)?.collect::<Result<Vec<_>, _>>()?;
    let world = World::new(&arguments.corpus, &all).bad_input()?;
    let work = Work { arguments, stage: &stage, context: &*context, builder: &builder, world };
    for (unit, tasks) in all.chunks(TASKS_PER_UNIT).enumerate() {
        stage.check_interrupt()?;
        let rows = work.read(tasks)?;
        trajectories += rows.trajectories.len() as u64;
        steps += rows.steps.len() as u64;
        right += rows.trajectories.iter().filter_map(|row| row.reward).map(f64::from).sum::<f64>();
        stage.write_part("steps", unit, |file| Ok(write_rows(&rows.steps, file).map(drop)?))?;
        stage.write_part("trajectories", unit, |file| Ok(write_rows(&rows.trajectories, file).map(drop)?))?;
    }
    let summary = json!({ "reward_mean": right / trajectories.max(1) as f64 });
    tracing::info!("{trajectories} documents read in {steps} steps; {right} with every answer");
    stage.finish(&[("trajectories", trajectories), ("steps", steps)], summary)
}

struct Work<'a> {
    arguments: &'a ReaderArguments,
    stage: &'a Stage,
    context: &'a dyn ContextPolicy,
    builder: &'a PromptBuilder,
    world: World,
}

impl Work<'_> {
    fn read(&self, tasks: &[Task]) -> anyhow::Result<mempo_agent::Unit> {
        let limits = LimitOptions {
            max_steps: 1,
            max_prompt_tokens: usize::MAX,
            max_observation_tokens: 1,
            max_tool_calls: None,
            on_tool_failure: OnToolFailure::Stop,
            top_k: 1,
        };
        let documents = tasks.iter().map(|task| self.document(task)).collect::<anyhow::Result<Vec<_>>>()?;
        let readings = tasks.iter().zip(&documents).map(|(task, document)| self.reading(task, document));
        let mut reader = Reader { work: self, readings: readings.collect::<anyhow::Result<_>>()? };
        let agent = Agent {
            builder: self.builder,
            context: self.context,
            toolbox: &Toolbox::new(Vec::new(), 0)?,
            limits: &limits,
            reward: RewardKind::default(),
            policy: "reader".to_owned(),
            seed: self.arguments.stage.seed,
            seed_of: &|_, _, _| 0,
        };
        let starts = tasks.iter().zip(&documents);
        let starts = starts.map(|(task, document)| Start { task, trajectory_index: 0, steps: &[], document });
        Ok(agent.run(&mut reader, starts.collect())?)
    }

    fn document(&self, task: &Task) -> anyhow::Result<Vec<i32>> {
        let text = read_document(&self.arguments.tasks, task).bad_input()?;
        let text = text.with_context(|| format!("task `{}` has no document", task.task_id)).bad_input()?;
        Ok(self.context.prepare(self.builder.tokenizer().encode_untrusted(&text)))
    }

    fn reading<'d>(&self, task: &Task, document: &'d [i32]) -> anyhow::Result<Reading<'d>> {
        let random = Random::new(self.stage.seed(&["reader", &task.task_id]));
        Ok(Reading::new(steps_of(task).bad_input()?, document, random))
    }
}

/// The scripted reader as an engine: it looks at the chunk of a step, not at the prompt.
struct Reader<'a> {
    work: &'a Work<'a>,
    readings: Vec<Reading<'a>>,
}

impl Engine for Reader<'_> {
    fn run(&mut self, mut requests: Vec<Request>, environment: &mut dyn Environment) -> Result<(), String> {
        while !requests.is_empty() {
            let written = requests.iter().map(|request| (request.trajectory, Ok(self.write(request.trajectory))));
            requests = environment.next(written.collect());
        }
        Ok(())
    }
}

impl Reader<'_> {
    fn write(&mut self, trajectory: usize) -> Generation {
        let Work { arguments, context, builder, world, .. } = self.work;
        let reading = &mut self.readings[trajectory];
        let count = context.reading_steps(reading.document);
        let decode = |ids: &[i32]| builder.tokenizer().decode(ids);
        let (text, is_learnt) = if reading.step < count {
            let chunk = context.chunk(reading.document, reading.step).unwrap_or_default();
            reading.read(&decode(chunk), world, &arguments.habits)
        } else {
            if count == 0 {
                reading.read(&decode(reading.document), world, &ReadingHabits::faultless());
            }
            (reading.answer(), true)
        };
        reading.step += 1;
        let ids = builder.completion_ids_from_text(&text);
        let stop_reason = if is_learnt { StopReason::StopString } else { StopReason::MaxTokens };
        Generation { logprobs: vec![f32::NAN; ids.len()], ids, stop_reason }
    }
}
