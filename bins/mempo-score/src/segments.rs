//! `mempo-score segments`: how probable each memory makes the gold answer.

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use clap::Args;
use mempo_data::{Cursor, Key, Task, read_rows, write_rows};
use mempo_model::{DeviceOptions, Model, ScoreOptions, ScoredSequence};
use mempo_run::{Input, ResultExt, ShardedStageArgs, Stage};
use mempo_text::PromptBuilder;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use crate::probe::{Alias, AliasProbe, Chosen, Probe, ProbeOptions, TaskProbes, alias_probes, task_probes};
use crate::reward::{Answers, RewardOptions, ask, closed_book, context_rows, mean, score_rows};
use crate::rollouts::{Attempt, Rollouts, TASKS_PER_UNIT};
use crate::sums::{Sums, read_units, write_unit};

/// Score every memory by how probable it makes the gold answer (table `scores`)
///
/// Beside it, closed_book/part-*.jsonl has a line a task: how probable the answer is after the question alone.
#[derive(Debug, Args, Serialize)]
pub(crate) struct SegmentsArguments {
    /// Directory of a finished `mempo-rollout sample`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    rollouts: PathBuf,
    /// The tasks that were sampled
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: PathBuf,
    /// The checkpoint that judges: normally the policy itself
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    model: PathBuf,
    #[command(flatten)]
    #[serde(flatten)]
    probe: ProbeOptions,
    #[command(flatten)]
    #[serde(flatten)]
    reward: RewardOptions,
    /// Also write the table `contexts`: the exact ids that were scored
    #[arg(long)]
    explain: bool,
    /// Tokens scored at once, padding included
    #[arg(long, default_value_t = 16384)]
    tokens_per_batch: usize,
    #[command(flatten)]
    #[serde(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

/// Reads the rollout unit by unit, scores each memory with the model, writes `scores` (and `contexts`).
pub(crate) fn run(arguments: &SegmentsArguments) -> anyhow::Result<()> {
    arguments.stage.stage().check_free()?;
    let rollouts = Rollouts::open(&arguments.rollouts)?;
    let tasks = Input::stage("tasks", &arguments.tasks)?;
    let model_input = Input::model("model", &arguments.model)?;
    let task_files = tasks.table("tasks")?;
    let builder = rollouts.prompt_builder(&arguments.model)?;
    arguments.probe.check(builder.profile()).usage()?;
    let inputs = [&rollouts.input, &tasks, &model_input];
    let Some(stage) = Stage::open("mempo-score", "segments", &arguments.stage.stage(), arguments, &inputs)? else {
        return Ok(());
    };
    let task_count = rollouts.count_tasks()?;
    let range = stage.shard_range(task_count.div_ceil(TASKS_PER_UNIT));
    let mut task_rows = Cursor::new(read_rows::<Task>(&task_files).bad_input()?);
    let mut reader = rollouts.reader()?;
    let judge = Judge::load(arguments, &rollouts)?;
    let progress = stage.progress("segments", (range.len() * TASKS_PER_UNIT).min(task_count) as u64, "tasks");
    for unit in 0..range.end {
        stage.check_interrupt()?;
        let wanted = range.contains(&unit) && !stage.has_part("scores", unit);
        let groups = reader.next_unit(wanted)?;
        if wanted {
            let pairs = groups.into_iter().map(|group| Ok((task_of(&mut task_rows, &group, &tasks)?, group)));
            let pairs = pairs.collect::<anyhow::Result<Vec<_>>>()?;
            judge.score_unit(&stage, unit, &builder, &pairs)?;
            progress.inc(pairs.len() as u64);
        }
    }
    finish(stage, range, arguments.explain)
}

/// The task of a group of trajectories.
fn task_of(rows: &mut Cursor<Task>, group: &[Attempt], tasks: &Input) -> anyhow::Result<Task> {
    let task_id = &group[0].trajectory.task_id;
    let missing =
        || anyhow!("{}: `tasks` has no `{task_id}`, which the rollout has trajectories of", tasks.dir().display());
    rows.take(&Key::of_id(task_id)).bad_input()?.ok_or_else(missing).bad_input()
}

/// The model that scores, and how.
struct Judge<'a> {
    model: Model,
    arguments: &'a SegmentsArguments,
    options: ProbeOptions,
}

impl<'a> Judge<'a> {
    fn load(arguments: &'a SegmentsArguments, rollouts: &Rollouts) -> anyhow::Result<Self> {
        let runtime = arguments.device.resolve().usage()?;
        let options = ProbeOptions { max_memory_tokens: rollouts.settings.max_memory_tokens, ..arguments.probe };
        Ok(Self { model: Model::load(&arguments.model, &runtime).bad_input()?, arguments, options })
    }

    fn score_unit(
        &self,
        stage: &Stage,
        unit: usize,
        builder: &PromptBuilder,
        pairs: &[(Task, Vec<Attempt>)],
    ) -> anyhow::Result<()> {
        let options = self.options;
        let (chosen, mut sums) = self.choose_aliases(builder, pairs)?;
        let probes = pairs.par_iter().zip(&chosen);
        let probes = probes.map(|((task, group), chosen)| task_probes(builder, options, task, group, chosen));
        let tasks = probes.collect::<anyhow::Result<Vec<TaskProbes>>>()?;
        let answers = self.ask(tasks.iter().flat_map(TaskProbes::probes))?;
        let (rows, of_rows) = score_rows(&tasks, &answers, self.arguments.reward, options.bias)?;
        sums.merge(&of_rows);
        sums.add("trajectories", pairs.iter().map(|(_, group)| group.len() as f64).sum());
        if self.arguments.explain {
            let contexts = context_rows(&tasks);
            sums.add("contexts", contexts.len() as f64);
            stage.write_part("contexts", unit, |file| Ok(write_rows(&contexts, file).map(drop)?))?;
        }
        write_closed_book(stage, unit, &tasks, &answers)?;
        write_unit(stage, unit, &sums)?;
        stage.write_part("scores", unit, |file| Ok(write_rows(&rows, file).map(drop)?))
    }

    /// One alias an objective for every task, and what finding it took.
    fn choose_aliases(
        &self,
        builder: &PromptBuilder,
        pairs: &[(Task, Vec<Attempt>)],
    ) -> anyhow::Result<(Vec<Chosen>, Sums)> {
        let mut sums = Sums::default();
        let options = self.options;
        if options.alias == Alias::First {
            return Ok((vec![Chosen::new(); pairs.len()], sums));
        }
        let probes = pairs.par_iter().map(|(task, _)| alias_probes(builder, options, task));
        let probes = probes.collect::<anyhow::Result<Vec<Vec<AliasProbe>>>>()?;
        let answers = self.ask(probes.iter().flatten().map(|tried| &tried.probe))?;
        answers.count_tokens(&mut sums);
        let chosen = pairs.iter().zip(&probes).map(|((task, _), probes)| likeliest(task, probes, &answers));
        Ok((chosen.collect(), sums))
    }

    fn ask<'p>(&self, probes: impl Iterator<Item = &'p Probe>) -> anyhow::Result<Answers<'p>> {
        ask(probes, self.model.config().max_position_embeddings, |sequences| self.logprobs(sequences))
    }

    /// Log-probabilities of the targets, and the number of tokens that were run for them.
    fn logprobs(&self, sequences: &[ScoredSequence]) -> anyhow::Result<(Vec<Vec<f32>>, usize)> {
        let options = ScoreOptions { temperature: 1.0, tokens_per_batch: self.arguments.tokens_per_batch };
        self.model.shared_logprobs(sequences, &options).context("scoring answers").bad_input()
    }
}

/// One JSON line a task of the unit.
fn write_closed_book(stage: &Stage, unit: usize, tasks: &[TaskProbes], answers: &Answers<'_>) -> anyhow::Result<()> {
    stage.write_file(&format!("closed_book/part-{unit:05}.jsonl"), |file| {
        for task in tasks {
            serde_json::to_writer(&mut *file, &closed_book(task, answers)?)?;
            writeln!(file)?;
        }
        Ok(())
    })
}

/// Of every objective the alias whose tokens are likeliest.
fn likeliest(task: &Task, probes: &[AliasProbe], answers: &Answers<'_>) -> Chosen {
    let mut best = vec![(f64::NEG_INFINITY, 0); task.objectives.len()];
    for AliasProbe { tried: (objective, alias), probe, span } in probes {
        let mean = answers.of(probe).map_or(f64::NEG_INFINITY, |logprobs| mean(&logprobs[span.clone()]));
        if mean > best[*objective].0 {
            best[*objective] = (mean, *alias);
        }
    }
    best.into_iter().map(|(_, alias)| alias).collect()
}

fn finish(stage: Stage, units: Range<usize>, explain: bool) -> anyhow::Result<()> {
    let mut sums = Sums::default();
    read_units::<Sums>(&stage, units)?.iter().for_each(|unit| sums.merge(unit));
    let count = |name: &str| sums.count(name);
    let summary = json!({
        "tasks": count("tasks"),
        "trajectories": count("trajectories"),
        "memories": count("memories"),
        "memories_truncated": count("memories_truncated"),
        "memories_past_window": count("memories_past_window"),
        "biases_past_window": count("biases_past_window"),
        "answer_probability_mean": sums.mean("answer_probability"),
        "bias_probability_mean": sums.mean("bias_probability"),
        "memory_reward_mean": sums.mean("memory_reward"),
        "closed_book_probability_mean": sums.mean("closed_book_probability"),
        "tokens_asked": count("tokens_asked"),
        "tokens_computed": count("tokens_computed"),
    });
    tracing::info!("{summary}");
    let past_window = count("memories_past_window") + count("biases_past_window");
    if past_window > 0 {
        tracing::warn!("{past_window} contexts are longer than the model's window: their columns are null");
    }
    let mut rows = vec![("scores", count("memories"))];
    rows.extend(explain.then(|| ("contexts", count("contexts"))));
    stage.finish(&rows, summary)
}

#[cfg(test)]
mod tests {
    use mempo_agent::{ContextPolicy, Mempo, Past, React};
    use mempo_data::{Context, Score, SegmentKind, Step};
    use mempo_run::Failure;
    use mempo_text::Carried;

    use super::mean;
    use crate::fixture::{Chain, TASKS, failure};
    use crate::reward::ByHeart;

    const COMMAND: &str = "segments --rollouts @rollouts --tasks @tasks --model @model --dtype f32 --device cpu";

    fn memory_ids(chain: &Chain, step: &Step) -> Vec<i32> {
        let memory = step.segments.iter().find(|segment| segment.kind == SegmentKind::Memory).unwrap();
        let range = memory.start as usize..memory.end as usize;
        let segment = mempo_text::Segment { kind: mempo_text::SegmentKind::Memory, range };
        chain.builder().memory_ids(&step.completion_ids, &segment)
    }

    #[track_caller]
    fn close(found: Option<f64>, expected: f64) {
        assert!((found.unwrap() - expected).abs() < 1e-5, "{found:?}, expected {expected}");
    }

    #[test]
    fn scores_are_those_of_each_sequence_alone() {
        let chain = Chain::new();
        chain
            .run(&format!("{COMMAND} --answer per-objective --explain --tokens-per-batch 3000 --out @scores"))
            .unwrap();
        let (rows, contexts) = (chain.rows::<Score>("scores"), chain.rows::<Context>("scores"));
        assert_eq!((rows.len(), contexts.len()), (TASKS * 2 * 3, TASKS * 2 * 3 * 2));
        let (builder, model) = (chain.builder(), chain.model());
        for (place, (row, step)) in rows.iter().zip(&chain.steps).enumerate().step_by(5) {
            let task = chain.tasks.iter().find(|task| task.task_id == row.task_id).unwrap();
            let answer = builder.answer_ids(&[&task.objectives[0].answers[0], &task.objectives[1].answers[0]]);
            let opening = builder.answer_opening_ids();
            let memory = [
                builder.prompt(&task.question, &Carried::default()).unwrap(),
                memory_ids(&chain, step),
                opening.clone(),
            ]
            .concat();
            let earlier = &chain.steps[place - row.step_index as usize..place];
            let past = Past { question: &task.question, steps: earlier, document: &[], builder: &builder };
            let prefix = [builder.prompt(past.question, &React.carried(&past)).unwrap(), opening].concat();
            assert_eq!((&contexts[2 * place].context_ids, &contexts[2 * place + 1].context_ids), (&memory, &prefix));
            assert_eq!(contexts[2 * place].answer_ids, answer.ids);

            let (memory, prefix) =
                (Chain::logprobs(&model, &memory, &answer.ids), Chain::logprobs(&model, &prefix, &answer.ids));
            close(row.answer_logprob, mean(&memory));
            close(row.bias_logprob, mean(&prefix));
            close(row.answer_probability, mean(&memory).exp());
            let own = |logprobs: &[f32]| {
                answer.spans.iter().map(|span| mean(&logprobs[span.clone()]).exp()).sum::<f64>() / 2.0
            };
            close(row.memory_reward, own(&memory) - own(&prefix));
            assert_eq!(row.answer_token_count as usize, answer.ids.len());
        }
        let summary = chain.summary("scores");
        assert!(summary["tokens_computed"].as_u64().unwrap() < summary["tokens_asked"].as_u64().unwrap());
        assert_eq!((&summary["tasks"], &summary["memories"]), (&TASKS.into(), &(TASKS * 6).into()));
    }

    #[test]
    fn biases_meet_where_they_mean_the_same() {
        let chain = Chain::new();
        for bias in ["prefix", "null", "previous-memory", "context", "none"] {
            chain.run(&format!("{COMMAND} --bias {bias} --out @{bias}")).unwrap();
        }
        let [prefix, null, previous, context, none] =
            ["prefix", "null", "previous-memory", "context", "none"].map(|bias| chain.rows::<Score>(bias));
        for place in 0..prefix.len() {
            match prefix[place].step_index {
                0 => {
                    close(prefix[place].bias_logprob, null[place].bias_logprob.unwrap());
                    close(previous[place].bias_logprob, null[place].bias_logprob.unwrap());
                    close(context[place].bias_logprob, null[place].bias_logprob.unwrap());
                }
                // The policy carries the last step only: at step 1 that is the whole prefix.
                1 => close(context[place].bias_logprob, prefix[place].bias_logprob.unwrap()),
                _ => assert!((context[place].bias_logprob.unwrap() - prefix[place].bias_logprob.unwrap()).abs() > 1e-4),
            }
            if prefix[place].step_index > 0 {
                close(previous[place].bias_logprob, prefix[place - 1].answer_logprob.unwrap());
            }
            assert_eq!((none[place].bias_logprob, none[place].memory_reward), (None, none[place].answer_probability));
            close(none[place].answer_logprob, null[place].answer_logprob.unwrap());
        }
        chain.run(&format!("{COMMAND} --bias reference --out @reference")).unwrap();
        let reference = chain.rows::<Score>("reference");
        for (task, plain) in
            reference.chunk_by(|a, b| a.task_id == b.task_id).zip(none.chunk_by(|a, b| a.task_id == b.task_id))
        {
            // Every trajectory has as many memories, so the mean of means is the mean.
            let mean = plain.iter().map(|row| row.memory_reward.unwrap()).sum::<f64>() / plain.len() as f64;
            for (row, plain) in task.iter().zip(plain) {
                close(row.bias_probability, mean);
                close(row.memory_reward, plain.memory_reward.unwrap() - mean);
            }
        }
        let closed_book = chain.summary("null")["closed_book_probability_mean"].as_f64();
        let first_steps = null.iter().filter(|row| row.step_index == 0 && row.trajectory_index == 0);
        close(closed_book, first_steps.map(|row| row.bias_probability.unwrap()).sum::<f64>() / TASKS as f64);
    }

    #[test]
    fn what_is_known_by_heart_is_written_task_by_task() {
        let chain = Chain::new();
        chain.run(&format!("{COMMAND} --bias null --out @null")).unwrap();
        let text = ["00000", "00001"]
            .map(|part| fs_err::read_to_string(chain.path(&format!("null/closed_book/part-{part}.jsonl"))).unwrap());
        let lines: Vec<ByHeart> = text.concat().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let rows = chain.rows::<Score>("null");
        let rows: Vec<&Score> = rows.chunk_by(|a, b| a.task_id == b.task_id).map(|task| &task[0]).collect();
        assert_eq!(lines.len(), TASKS);
        for (line, row) in lines.iter().zip(rows) {
            assert_eq!((&line.task_id, line.closed_book_probability), (&row.task_id, row.bias_probability));
            assert_eq!(line.closed_book_logprob, row.bias_logprob);
            assert_eq!(line.objective_logprobs.as_ref().unwrap().len(), 2);
        }
        let manifest = fs_err::read_to_string(chain.path("null/manifest.json")).unwrap();
        assert!(manifest.contains("closed_book/part-00001.jsonl"));
    }

    #[test]
    fn the_likeliest_alias_is_that_of_the_closed_book() {
        let mut chain = Chain::new();
        for task in &mut chain.tasks {
            let other = task.objectives[0].answers[0].clone();
            task.objectives[0].answers.truncate(1);
            task.objectives[1].answers.truncate(1);
            task.objectives[1].answers.push(other);
        }
        chain.write();
        chain.run(&format!("{COMMAND} --alias likeliest --bias none --explain --out @scores")).unwrap();
        let (builder, model) = (chain.builder(), chain.model());
        let contexts = chain.rows::<Context>("scores");
        let mut places = std::collections::BTreeSet::new();
        for context in contexts.iter().filter(|context| context.trajectory_index == 0 && context.step_index == 0) {
            let task = chain.tasks.iter().find(|task| task.task_id == context.task_id).unwrap();
            let prompt =
                [builder.prompt(&task.question, &Carried::default()).unwrap(), builder.answer_opening_ids()].concat();
            let tried = task.objectives[1].answers.iter().map(|alias| {
                let answer = builder.answer_ids(&[&task.objectives[0].answers[0], alias]);
                let logprobs = Chain::logprobs(&model, &prompt, &answer.ids);
                (mean(&logprobs[answer.spans[1].clone()]), answer.ids)
            });
            let tried: Vec<(f64, Vec<i32>)> = tried.collect();
            let best = usize::from(tried[1].0 > tried[0].0);
            assert_eq!(context.answer_ids, tried[best].1, "{}", context.task_id);
            places.insert(best);
        }
        assert_eq!(places.len(), 2, "both aliases are to win somewhere");
    }

    #[test]
    fn in_place_shows_the_memory_after_the_steps_own_prompt() {
        let chain = Chain::new();
        chain.run(&format!("{COMMAND} --probe in-place --bias none --explain --out @scores")).unwrap();
        let contexts = chain.rows::<Context>("scores");
        let opening = chain.builder().answer_opening_ids();
        for (context, step) in contexts.iter().zip(&chain.steps) {
            let start = step.segments[0].start as usize;
            let expected =
                [&step.prompt_ids, &step.completion_ids[..start], &memory_ids(&chain, step), &opening].concat();
            assert_eq!(context.context_ids, expected);
        }
    }

    #[test]
    fn a_capped_memory_is_scored_as_the_next_step_saw_it() {
        let chain = Chain::new();
        let builder = chain.builder();
        let most = builder.tokenizer().encode_plain(mempo_text::CUT_MARK).len() + 1;
        chain.write_rollouts_with("capped", Some(most));
        chain.run(&format!("{} --bias none --explain --out @scores", COMMAND.replace("@rollouts", "@capped"))).unwrap();
        let (rows, contexts) = (chain.rows::<Score>("scores"), chain.rows::<Context>("scores"));
        let mempo = Mempo { max_memory_tokens: Some(most), ..Mempo::default() };
        let mut cut = 0;
        for ((row, context), step) in rows.iter().zip(&contexts).zip(&chain.steps) {
            let task = chain.tasks.iter().find(|task| task.task_id == row.task_id).unwrap();
            let past =
                Past { question: &task.question, steps: std::slice::from_ref(step), document: &[], builder: &builder };
            let seen = builder.prompt(past.question, &mempo.carried(&past)).unwrap();
            let question = builder.prompt(past.question, &Carried::default()).unwrap();
            let end = context.context_ids.len() - builder.answer_opening_ids().len();
            let scored = &context.context_ids[question.len()..end];
            assert!(seen.windows(scored.len()).any(|ids| ids == scored), "{}", step.completion);
            cut += usize::from(row.truncated);
            assert_eq!(row.truncated, scored != memory_ids(&chain, step));
        }
        assert!(cut > 0 && cut < rows.len(), "{cut} of {}", rows.len());
    }

    #[test]
    fn shards_together_are_the_whole() {
        let chain = Chain::new();
        chain.run(&format!("{COMMAND} --out @whole")).unwrap();
        for shard in ["1/2", "0/2"] {
            chain.run(&format!("{COMMAND} --shard {shard} --out @shards")).unwrap();
        }
        assert_eq!(chain.rows::<Score>("whole"), chain.rows::<Score>("shards"));
    }

    #[test]
    fn contexts_past_the_window_are_null_and_counted() {
        let chain = Chain::new();
        let longest = chain.steps.iter().map(|step| step.prompt_ids.len()).max().unwrap();
        let config = chain.path("model/config.json");
        let text = fs_err::read_to_string(&config).unwrap().replace("4096", &longest.to_string());
        fs_err::write(config, text).unwrap();
        chain.run(&format!("{COMMAND} --out @scores")).unwrap();
        let rows = chain.rows::<Score>("scores");
        let unbiased = rows.iter().filter(|row| row.bias_logprob.is_none()).count();
        assert!(unbiased > 0 && unbiased < rows.len());
        assert!(
            rows.iter()
                .all(|row| row.answer_logprob.is_some() && row.memory_reward.is_some() == row.bias_logprob.is_some())
        );
        assert_eq!(chain.summary("scores")["biases_past_window"], unbiased);
    }

    #[test]
    fn bad_input_is_named() {
        let mut chain = Chain::new();
        let bad = |chain: &Chain, line: &str, named: &str| {
            let error = chain.run(line).unwrap_err();
            let (kind, text) = failure(&error);
            assert!(matches!(kind, Failure::BadInput(..)) && text.contains(named), "{text}");
        };
        bad(&chain, &format!("{} --out @out", COMMAND.replace("@tasks", "@rollouts")), "no table `tasks`");
        bad(&chain, &format!("{} --out @out", COMMAND.replace("@rollouts", "@tasks")), "not those of a rollout");
        bad(&chain, &format!("{} --out @out", COMMAND.replace("@rollouts", "@missing")), "missing");
        assert!(!chain.path("out").exists());

        let question = std::mem::replace(&mut chain.tasks[3].question, "Another?".to_owned());
        chain.write();
        bad(&chain, &format!("{COMMAND} --out @out"), "task-03/trajectory 0/step 0: prompt_ids differ at position");

        chain.tasks[3].question = question;
        chain.tasks.remove(5);
        chain.write();
        bad(&chain, &format!("{COMMAND} --out @out2"), "no `task-05`");

        chain.steps.remove(4);
        chain.write();
        bad(&chain, &format!("{COMMAND} --out @out3"), "task-00/trajectory 1/step 1");
    }
}
