//! `sample`: a checkpoint works on tasks; every trajectory and every step is recorded.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow};
use clap::Args;
use mempo_agent::{
    Agent, ContextOptions, ContextPolicy, Engine, LimitOptions, RewardOptions, SamplingOptions, Start, ToolTable, Unit,
    check_profile, context_policy,
};
use mempo_data::{AnsweredQuery, Task, Trajectory, read_rows, write_rows};
use mempo_model::{Config, DeviceOptions, Model};
use mempo_run::{Input, ResultExt, ShardedStageArgs, Stage, seed_of};
use mempo_text::{Profile, PromptBuilder};
use serde::Serialize;
use serde_json::{Value, json};

use crate::local_engine::LocalEngine;
use crate::reading;
use crate::server::{self, Remote, ServerOptions, TeacherOptions};
use crate::stored::{FromOptions, MemoryControl, Stored};
use crate::tally::Tally;
use crate::tools::{RecordedTools, ToolOptions, Tools};
use crate::top_up::{Earlier, MAY_DIFFER};

/// Let a checkpoint work on tasks, each several times.
///
/// Writes the tables `trajectories` and `steps`. Work is cut into units of consecutive tasks whose trajectories advance
/// together; a unit that is done stays done when the run is stopped and started again.
#[derive(Debug, Args, Serialize)]
pub(crate) struct SampleArguments {
    /// Tasks, as `compose` writes them
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: PathBuf,
    /// Checkpoint: a Hugging Face model directory
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    model: PathBuf,
    #[command(flatten)]
    #[serde(skip)]
    tools: ToolOptions,
    /// Trajectories a task
    #[arg(long, value_name = "N", default_value = "16")]
    group_size: NonZeroUsize,
    #[command(flatten)]
    #[serde(flatten)]
    context: ContextOptions,
    /// How the agent talks: a built-in profile or a folder with profile.json and system.txt [default: as --context;
    /// react for closed-book]
    #[arg(long, value_name = "NAME|DIR")]
    #[serde(skip)]
    profile: Option<String>,
    /// Go on from every memory of this rollout, --group-size times from each, instead of starting anew: how often that
    /// succeeds is what the memory is worth. Trajectories begin with the stored steps; the index of the j-th from step t of
    /// trajectory i is (i * max_steps + t) * group_size + j
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    from: Option<PathBuf>,
    /// With --from: take away what each memory says, or put in its place what another task's says. What a policy then
    /// still gets right it does not have from its memory
    #[arg(long, value_enum, requires = "from")]
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryControl>,
    /// Top up this rollout, made by the same command: groups whose rewards are all equal, from which nothing can be learnt,
    /// get --group-size further trajectories; what it holds is taken over
    #[arg(long, value_name = "DIR", conflicts_with = "from")]
    #[serde(skip)]
    only_groups: Option<PathBuf>,
    /// Use the first tasks only
    #[arg(long, value_name = "N")]
    max_tasks: Option<NonZeroUsize>,
    /// Tasks in one unit: what is generated together and committed together
    #[arg(long, value_name = "N", default_value = "16")]
    tasks_per_unit: NonZeroUsize,
    /// Trajectories of a unit in the model's cache at a time, or requests to a server; the others wait for their turn. Fewer
    /// need less memory
    #[arg(long, value_name = "N", default_value = "256")]
    concurrency: NonZeroUsize,
    /// Share of trajectories that may fail through no fault of the policy; more end the run with exit code 3
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = share)]
    max_error_rate: f64,
    #[command(flatten)]
    #[serde(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    #[serde(flatten)]
    limits: LimitOptions,
    #[command(flatten)]
    #[serde(flatten)]
    reward: RewardOptions,
    #[command(flatten)]
    #[serde(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    #[serde(skip)]
    server: ServerOptions,
    #[command(flatten)]
    #[serde(skip)]
    teacher: TeacherOptions,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

/// What the manifest holds: the arguments, and the profile by its name or its folder's.
#[derive(Serialize)]
struct Resolved<'a> {
    #[serde(flatten)]
    arguments: &'a SampleArguments,
    profile: &'a str,
    /// Whether a server generates, and whether that it has the checkpoint is taken on trust.
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<&'a str>,
    /// The teacher that generates.
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher: Option<Value>,
    #[serde(flatten)]
    tools: RecordedTools,
}

/// What a rollout is made from.
struct Inputs {
    tasks: Input,
    model: Input,
    /// What is searched, if it is a directory.
    search: Option<Input>,
    /// The encoder by which it is searched, if it is.
    encoder: Option<Input>,
    /// The files of a profile that is a folder.
    profile: Option<Input>,
    /// The rollout to go on from.
    from: Option<Input>,
    /// The rollout to top up.
    only_groups: Option<Input>,
}

impl Inputs {
    fn open(arguments: &SampleArguments) -> anyhow::Result<Self> {
        Ok(Self {
            tasks: Input::stage("tasks", &arguments.tasks)?,
            model: Input::model("model", &arguments.model)?,
            search: arguments.tools.input()?,
            encoder: arguments.tools.encoder()?,
            profile: Profile::files(arguments.profile()).map(|files| Input::files("profile", &files)).transpose()?,
            from: arguments.from.as_ref().map(|dir| Input::stage("from", dir)).transpose()?,
            only_groups: arguments.only_groups.as_ref().map(|dir| Input::stage("only-groups", dir)).transpose()?,
        })
    }

    fn all(&self) -> Vec<&Input> {
        let optional = [&self.search, &self.encoder, &self.profile, &self.from, &self.only_groups];
        [&self.tasks, &self.model].into_iter().chain(optional.into_iter().flatten()).collect()
    }

    /// Refuses to top up a rollout that was made in another way.
    fn check_earlier(&self, resolved: &Resolved<'_>) -> anyhow::Result<()> {
        let Some(earlier) = &self.only_groups else { return Ok(()) };
        earlier.check_same_work(&resolved.arguments.stage.stage(), resolved, &self.all(), &MAY_DIFFER)
    }

    /// The rollout to top up, if there is one.
    fn earlier(&self, arguments: &SampleArguments) -> anyhow::Result<Option<Earlier>> {
        let count = arguments.group_size.get();
        self.only_groups.as_ref().map(|input| Earlier::read(input, count)).transpose()
    }

    /// The trajectories to go on from, if they are to be.
    fn stored(&self, arguments: &SampleArguments, builder: &PromptBuilder) -> anyhow::Result<Option<Stored>> {
        let Some(from) = &self.from else { return Ok(None) };
        from.check_made_from("tasks", &self.tasks, "mempo-rollout sample")?;
        let (max_steps, count) = (arguments.limits.max_steps, arguments.group_size.get());
        let (control, tags) = (arguments.memory, builder.profile().tags.clone());
        Stored::read(from, builder.tokenizer(), FromOptions { max_steps, count, control, tags }).map(Some)
    }
}

impl SampleArguments {
    fn profile(&self) -> &str {
        self.profile.as_deref().unwrap_or(self.context.profile())
    }

    /// Refuses to go on from memories of a policy that reads.
    fn check_from(&self, context: &dyn ContextPolicy) -> anyhow::Result<()> {
        if context.reads_documents() && self.from.is_some() {
            let name = context.name();
            return Err(anyhow!("--from goes on from memories of a policy that searches; --context {name} reads"))
                .usage();
        }
        Ok(())
    }

    /// For the manifest: what came of it, and who generated.
    fn summary(&self, tally: &Tally, server: Option<Value>) -> Value {
        let mut summary = tally.summary();
        summary["logprobs"] = self.logprobs(server.as_ref());
        if let Some(server) = server {
            summary["server"] = server;
        }
        summary
    }

    /// What the recorded log-probabilities are: those of the policy's whole distribution at a temperature, and who made them.
    fn logprobs(&self, server: Option<&Value>) -> Value {
        if self.teacher.teacher.is_some() {
            return json!({"of": "none"});
        }
        let temperature = if self.sampling.temperature == 0.0 { 1.0 } else { self.sampling.temperature };
        let engine = server.map_or_else(|| json!("local"), |server| server["protocol"].clone());
        json!({"of": "policy", "temperature": temperature, "engine": engine})
    }

    /// Who generates in this process's place, if anyone: a teacher, or a server of the checkpoint with this digest.
    fn open_remote(&self, digest: &str, builder: &PromptBuilder) -> anyhow::Result<Option<Remote>> {
        if let Some(teacher) = self.teacher.open(&self.server, builder, &self.sampling) {
            return Ok(Some(teacher));
        }
        let Some(url) = &self.server.server else { return Ok(None) };
        let (dir, config) = (fs_err::canonicalize(&self.model)?, Config::load(&self.model).bad_input()?);
        let server = server::open(url, &self.server, (&dir, digest, &config), builder, &self.sampling);
        server.map(Some).map_err(|problem| anyhow!(problem))
    }
}

/// Runs `sample`.
pub(crate) fn run(mut arguments: SampleArguments) -> anyhow::Result<()> {
    arguments.stage.stage().check_free()?;
    let context = context_policy(&arguments.context).usage()?;
    arguments.check_from(&*context)?;
    let table = arguments.tools.table(&*context)?;
    let inputs = Inputs::open(&arguments)?;
    let task_files = inputs.tasks.table("tasks")?;
    let recorded_tools = arguments.tools.recorded(&table);
    let builder = prompt_builder(&arguments, &table, &*context)?;
    fit_to_model(&mut arguments, &builder)?;
    let task_count = count_tasks(&task_files, &arguments, &*context, &builder)?;
    arguments.teacher.check(builder.profile(), context.answers_at_once())?;
    let searched = (inputs.search.as_ref(), inputs.encoder.as_ref());
    let tools = arguments.tools.open(table, searched, builder.profile(), arguments.limits.top_k)?;
    let resolved = Resolved {
        arguments: &arguments,
        profile: arguments.profile(),
        server: arguments.server.recorded(),
        teacher: arguments.teacher.recorded(),
        tools: recorded_tools,
    };
    inputs.check_earlier(&resolved)?;
    let Some(stage) = Stage::open("mempo-rollout", "sample", &arguments.stage.stage(), &resolved, &inputs.all())?
    else {
        return Ok(());
    };
    let stored = inputs.stored(&arguments, &builder)?;
    let earlier = inputs.earlier(&arguments)?;
    let policy = arguments.teacher.policy().unwrap_or_else(|| inputs.model.digest().to_owned());
    let (seed, policy) = (arguments.stage.stage().seed, policy.as_str());
    let seed_of = |task_id: &str, trajectory_index: i32, step_index: i32| {
        seed_of(seed, &["sample", policy, task_id, &trajectory_index.to_string(), &step_index.to_string()])
    };
    let agent = Agent {
        builder: &builder,
        context: &*context,
        toolbox: &tools.toolbox,
        limits: &arguments.limits,
        reward: arguments.reward.reward,
        policy: policy.to_owned(),
        seed,
        seed_of: &seed_of,
    };
    let sampling = Sampling {
        arguments: &arguments,
        stage: &stage,
        agent: &agent,
        tools: &tools,
        tasks: &arguments.tasks,
        task_count,
        stored,
        earlier,
    };
    let (tally, server) = sampling.generate(policy, &task_files)?;
    let summary = arguments.summary(&tally, server);
    tracing::info!("{summary}");
    stage.finish(&[("trajectories", tally.trajectories), ("steps", tally.steps)], summary)
}

fn prompt_builder(
    arguments: &SampleArguments,
    table: &ToolTable,
    context: &dyn ContextPolicy,
) -> anyhow::Result<PromptBuilder> {
    let profile = Profile::load(arguments.profile()).usage()?;
    table.check(&profile).usage()?;
    check_profile(context, &profile).map_err(anyhow::Error::msg).usage()?;
    PromptBuilder::load(&arguments.model, profile, &table.specs()).bad_input()
}

/// Refuses a tokenizer that is not the model's; limits prompts so that a completion fits among the model's positions.
fn fit_to_model(arguments: &mut SampleArguments, builder: &PromptBuilder) -> anyhow::Result<()> {
    let config = Config::load(&arguments.model).bad_input()?;
    let (ids, rows, dir) = (builder.tokenizer().vocabulary_size(), config.vocab_size, arguments.model.display());
    if ids as i64 > rows {
        return Err(anyhow!("{dir}: the tokenizer has {ids} ids, the model {rows}: they do not belong together"))
            .bad_input();
    }
    let (positions, completion) = (config.max_position_embeddings, arguments.sampling.max_completion_tokens);
    if completion >= positions {
        return Err(anyhow!(
            "--max-completion-tokens {completion} leaves no room for a prompt: the model has {positions} positions"
        ))
        .usage();
    }
    if positions - completion < arguments.limits.max_prompt_tokens {
        arguments.limits.max_prompt_tokens = positions - completion;
        tracing::info!(
            "prompts are limited to {} tokens, the model's {positions} positions less --max-completion-tokens",
            positions - completion
        );
    }
    Ok(())
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|error| format!("not a number: {error}"))?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("must be between 0 and 1".to_owned()) }
}

/// How many tasks there are, after a look at each.
fn count_tasks(
    files: &[PathBuf],
    arguments: &SampleArguments,
    context: &dyn ContextPolicy,
    builder: &PromptBuilder,
) -> anyhow::Result<usize> {
    let most = arguments.max_tasks.map_or(usize::MAX, NonZeroUsize::get);
    let mut count = 0;
    for task in read_rows::<Task>(files).bad_input()?.take(most) {
        let task = task.bad_input()?;
        if task.objectives.is_empty() {
            return Err(anyhow!("task `{}` has no objectives: there is nothing to answer", task.task_id)).bad_input();
        }
        reading::check_document(context, &task)?;
        reading::check_chunks(context, builder, &arguments.sampling, &arguments.limits, &task)?;
        count += 1;
    }
    if count == 0 {
        return Err(anyhow!("the table `tasks` is empty")).bad_input();
    }
    Ok(count)
}

fn generated_tokens(unit: &Unit) -> u64 {
    unit.trajectories.iter().map(|row| row.generated_tokens as u64).sum()
}

/// The work of one run, unit by unit.
struct Sampling<'a> {
    arguments: &'a SampleArguments,
    stage: &'a Stage,
    agent: &'a Agent<'a>,
    tools: &'a Tools,
    /// The directory of the tasks.
    tasks: &'a Path,
    task_count: usize,
    stored: Option<Stored>,
    earlier: Option<Earlier>,
}

impl Sampling<'_> {
    /// Has everything generated, by the model in this process or by a server; gives also who that is.
    fn generate(&self, policy: &str, task_files: &[PathBuf]) -> anyhow::Result<(Tally, Option<Value>)> {
        let (arguments, builder) = (self.arguments, self.agent.builder);
        let interrupted = || self.stage.check_interrupt().is_err();
        let concurrency = arguments.concurrency.get();
        if let Some(remote) = arguments.open_remote(policy, builder)? {
            let described = remote.described.clone();
            tracing::info!("generated by a server: {described}");
            let tally = self.run(&mut remote.engine(builder, concurrency, &interrupted)?, task_files)?;
            return Ok((tally, Some(described)));
        }
        let model = Model::load(&arguments.model, &arguments.device.resolve().usage()?).bad_input()?;
        let mut engine = LocalEngine::new(&model, builder, &arguments.sampling, concurrency, &interrupted);
        Ok((self.run(&mut engine, task_files)?, None))
    }

    fn run(&self, engine: &mut dyn Engine, task_files: &[PathBuf]) -> anyhow::Result<Tally> {
        let size = self.arguments.tasks_per_unit.get();
        let units = self.stage.shard_range(self.task_count.div_ceil(size));
        let first = units.start * size;
        let count = (units.end * size).min(self.task_count).saturating_sub(first);
        let planned = self.count_trajectories(read_rows::<Task>(task_files).bad_input()?.skip(first).take(count))?;
        let progress = self.stage.progress("sample", planned, "trajectories");
        let mut tasks = read_rows::<Task>(task_files).bad_input()?.skip(first).take(count);
        let mut tally = Tally::default();
        for unit in units {
            let tasks: Vec<Task> = tasks.by_ref().take(size).collect::<Result<_, _>>().bad_input()?;
            self.stage.check_interrupt()?;
            let trajectories = tasks.iter().map(|task| self.count_of(task)).sum();
            if self.stage.has_part("trajectories", unit) {
                self.count_part(unit, &mut tally)?;
                progress.skip(trajectories);
            } else {
                self.sample_unit(unit, &tasks, engine, &mut tally, planned)?;
                progress.inc(trajectories);
                progress.message(tally.progress());
            }
        }
        Ok(tally)
    }

    fn count_trajectories(&self, tasks: impl Iterator<Item = mempo_data::Result<Task>>) -> anyhow::Result<u64> {
        tasks.map(|task| Ok(self.count_of(&task.bad_input()?))).sum()
    }

    /// How many trajectories a task will have.
    fn count_of(&self, task: &Task) -> u64 {
        (self.starts(task).len() + self.earlier.as_ref().map_or(0, |earlier| earlier.kept(task))) as u64
    }

    fn starts<'t>(&'t self, task: &'t Task) -> Vec<Start<'t>> {
        let anew = |index| Start { task, trajectory_index: index, steps: &[], document: &[] };
        match (&self.stored, &self.earlier) {
            (Some(stored), _) => stored.starts(task),
            (None, Some(earlier)) => earlier.starts(task),
            (None, None) => (0..self.arguments.group_size.get() as i32).map(anew).collect(),
        }
    }

    fn sample_unit(
        &self,
        unit: usize,
        tasks: &[Task],
        engine: &mut dyn Engine,
        tally: &mut Tally,
        planned: u64,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        let documents = reading::documents(self.agent.context, self.agent.builder, self.tasks, tasks)?;
        let of_task = tasks.iter().zip(&documents);
        let starts = of_task
            .flat_map(|(task, document)| self.starts(task).into_iter().map(move |start| Start { document, ..start }));
        let starts = starts.collect();
        self.tools.begin(unit);
        let sampled = self.agent.run(engine, starts);
        self.stage.check_interrupt()?;
        let sampled = match sampled {
            Err(mempo_agent::Error::Engine(problem)) => {
                return Err(anyhow!("{problem}; the same command goes on after the units that are done"));
            }
            sampled => sampled.bad_input()?,
        };
        let (count, tokens) = (sampled.trajectories.len(), generated_tokens(&sampled));
        let (Unit { trajectories, steps }, queries) = self.with_earlier(unit, sampled)?;
        for row in &trajectories {
            tally.add(row);
        }
        tally.check(self.arguments.max_error_rate, planned)?;
        if let Some(queries) = queries {
            self.stage.write_part("queries", unit, |file| Ok(write_rows(&queries, file).map(drop)?))?;
        }
        self.stage.write_part("steps", unit, |file| Ok(write_rows(&steps, file).map(drop)?))?;
        self.stage.write_part("trajectories", unit, |file| Ok(write_rows(&trajectories, file).map(drop)?))?;
        let seconds = start.elapsed().as_secs_f64();
        tally.sampled_seconds += seconds;
        tally.sampled_tokens += tokens;
        self.stage.timing(&json!({
            "unit": unit,
            "seconds": seconds,
            "trajectories": count,
            "generated_tokens": tokens,
        }));
        Ok(())
    }

    /// A unit's rows and what a server told it, with those of the rollout that is topped up.
    fn with_earlier(&self, unit: usize, sampled: Unit) -> anyhow::Result<(Unit, Option<Vec<AnsweredQuery>>)> {
        let answered = self.tools.answered();
        let Some(earlier) = &self.earlier else { return Ok((sampled, answered)) };
        let answered = answered.map(|new| earlier.join_answers(unit, new)).transpose()?;
        Ok((earlier.join(unit, sampled)?, answered))
    }

    /// Counts a unit that an earlier run finished.
    fn count_part(&self, unit: usize, tally: &mut Tally) -> anyhow::Result<()> {
        let path = self.stage.dir().join(format!("trajectories/part-{unit:05}.parquet"));
        for row in read_rows::<Trajectory>(std::slice::from_ref(&path))? {
            tally.add(&row.with_context(|| format!("{}: run again with --restart", path.display()))?);
        }
        Ok(())
    }
}
