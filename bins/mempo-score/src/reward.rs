//! From the model's answers to score rows.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_data::{Context, Key, Score};
use mempo_model::ScoredSequence;
use mempo_run::ResultExt;
use serde::{Deserialize, Serialize};

use crate::probe::{Bias, MemoryProbes, Probe, TaskProbes};
use crate::sums::Sums;

/// Which mean over the answer's tokens the reward is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum AnswerMean {
    /// One mean over all tokens of the answer.
    Joint,
    /// The mean over objectives of each one's own.
    PerObjective,
}

/// In what unit memory and bias are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Difference {
    /// Probabilities, as in the paper.
    Probability,
    /// Log-probabilities: information gain in nats a token.
    Logprob,
}

/// What the memory reward is made of.
#[derive(Debug, Clone, Copy, Args, Serialize)]
pub(crate) struct RewardOptions {
    /// Whether the reward uses the joint mean or the mean over objectives of their own
    #[arg(long, value_enum, default_value = "joint")]
    pub(crate) answer: AnswerMean,
    /// What is subtracted from what
    #[arg(long, value_enum, default_value = "probability")]
    pub(crate) difference: Difference,
}

/// Log-probabilities of the answer tokens, by probe; a probe past the model's window has none.
pub(crate) struct Answers<'a> {
    places: HashMap<&'a Probe, usize>,
    logprobs: Vec<Vec<f32>>,
    tokens_asked: u64,
    tokens_computed: u64,
}

/// Scores each distinct probe of at most `window` ids once; `score` is the model, and says how many tokens it ran.
pub(crate) fn ask<'a>(
    probes: impl Iterator<Item = &'a Probe>,
    window: usize,
    score: impl FnOnce(&[ScoredSequence]) -> anyhow::Result<(Vec<Vec<f32>>, usize)>,
) -> anyhow::Result<Answers<'a>> {
    let (mut places, mut sequences, mut tokens_asked) = (HashMap::new(), Vec::new(), 0);
    for probe in probes.filter(|probe| probe.ids.len() <= window) {
        tokens_asked += probe.ids.len() as u64;
        places.entry(probe).or_insert_with(|| {
            sequences.push(ScoredSequence { ids: probe.ids.clone(), targets: probe.answer() });
            sequences.len() - 1
        });
    }
    let (logprobs, tokens_computed) = score(&sequences)?;
    Ok(Answers { places, logprobs, tokens_asked, tokens_computed: tokens_computed as u64 })
}

impl Answers<'_> {
    pub(crate) fn of(&self, probe: &Probe) -> Option<&[f32]> {
        self.places.get(probe).map(|&place| self.logprobs[place].as_slice())
    }

    pub(crate) fn count_tokens(&self, sums: &mut Sums) {
        sums.add("tokens_asked", self.tokens_asked as f64);
        sums.add("tokens_computed", self.tokens_computed as f64);
    }
}

/// The rows of a unit, and what they add to the summary.
pub(crate) fn score_rows(
    tasks: &[TaskProbes],
    answers: &Answers<'_>,
    options: RewardOptions,
    bias: Bias,
) -> anyhow::Result<(Vec<Score>, Sums)> {
    let (mut rows, mut sums) = (Vec::new(), Sums::default());
    answers.count_tokens(&mut sums);
    for task in tasks {
        sums.add("tasks", 1.0);
        sums.add_known("closed_book_probability", closed_book(task, answers)?.closed_book_probability);
        let memories = task.memories.iter().map(|memory| score_row(memory, &task.spans, answers, options));
        let mut scored = memories.collect::<anyhow::Result<Vec<Score>>>()?;
        if bias == Bias::Reference {
            subtract_reference(&mut scored);
        }
        for (row, memory) in scored.iter().zip(&task.memories) {
            count(&mut sums, row, memory.bias.is_some());
        }
        rows.append(&mut scored);
    }
    Ok((rows, sums))
}

/// What the judge knows of a task's answer by heart: its mean log-probabilities in nats a token after the question alone, none
/// where that is past the window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ByHeart {
    pub(crate) task_id: String,
    /// Geometric mean of the probabilities of all tokens of the answer.
    pub(crate) closed_book_probability: Option<f64>,
    pub(crate) closed_book_logprob: Option<f64>,
    /// Each objective's own.
    pub(crate) objective_logprobs: Option<Vec<f64>>,
}

/// What is known of a task by heart.
pub(crate) fn closed_book(task: &TaskProbes, answers: &Answers<'_>) -> anyhow::Result<ByHeart> {
    let key = Key::of_id(&task.task_id);
    let means = answers.of(&task.closed_book).map(|found| Means::new(found, &task.spans, &key, "closed-book"));
    let means = means.transpose()?;
    Ok(ByHeart {
        task_id: task.task_id.clone(),
        closed_book_probability: means.as_ref().map(|means| means.joint.exp()),
        closed_book_logprob: means.as_ref().map(|means| means.joint),
        objective_logprobs: means.map(|means| means.objectives),
    })
}

/// Takes from every reward of a task the mean over its trajectories of their mean rewards, and writes the same means of
/// log-probability and probability down as the bias.
fn subtract_reference(rows: &mut [Score]) {
    let mean_of = |column: fn(&Score) -> Option<f64>| {
        let trajectories = rows.chunk_by(|a, b| a.trajectory_index == b.trajectory_index);
        let means = trajectories.filter_map(|chunk| mean_of_all(chunk.iter().filter_map(column)));
        mean_of_all(means)
    };
    let logprob = mean_of(|row| row.answer_logprob);
    let probability = mean_of(|row| row.answer_probability);
    let reward = mean_of(|row| row.memory_reward);
    for row in rows.iter_mut().filter(|row| row.memory_reward.is_some()) {
        (row.bias_logprob, row.bias_probability) = (logprob, probability);
        row.memory_reward = row.memory_reward.zip(reward).map(|(own, reference)| own - reference);
    }
}

fn mean_of_all(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

fn count(sums: &mut Sums, row: &Score, has_bias: bool) {
    let number = |condition: bool| f64::from(u8::from(condition));
    sums.add("memories", 1.0);
    sums.add("memories_truncated", number(row.truncated));
    sums.add("memories_past_window", number(row.answer_probability.is_none()));
    sums.add("biases_past_window", number(has_bias && row.bias_probability.is_none()));
    sums.add_known("answer_probability", row.answer_probability);
    sums.add_known("bias_probability", row.bias_probability);
    sums.add_known("memory_reward", row.memory_reward);
}

fn score_row(
    probes: &MemoryProbes,
    spans: &[Range<usize>],
    answers: &Answers<'_>,
    options: RewardOptions,
) -> anyhow::Result<Score> {
    let means = |probe: &Probe, kind: &str| {
        answers.of(probe).map(|logprobs| Means::new(logprobs, spans, &probes.key, kind)).transpose()
    };
    let memory = means(&probes.memory, "memory")?;
    let bias = probes.bias.as_ref().map(|probe| means(probe, "bias")).transpose()?.flatten();
    let value = |means: &Option<Means>| means.as_ref().map(|means| means.value(options));
    let memory_reward = match (value(&memory), value(&bias), &probes.bias) {
        (Some(memory), Some(bias), _) => Some(memory - bias),
        (memory, _, None) => memory,
        _ => None,
    };
    Ok(Score {
        task_id: probes.key.task_id.clone(),
        trajectory_index: probes.key.trajectory_index,
        step_index: probes.key.step_index,
        answer_logprob: memory.as_ref().map(|means| means.joint),
        answer_probability: memory.as_ref().map(|means| means.joint.exp()),
        bias_logprob: bias.as_ref().map(|means| means.joint),
        bias_probability: bias.as_ref().map(|means| means.joint.exp()),
        objective_logprobs: memory.map(|means| means.objectives),
        memory_reward,
        answer_token_count: probes.memory.answer().len() as i32,
        truncated: probes.truncated,
    })
}

/// Mean log-probabilities of the gold answer in one context.
struct Means {
    joint: f64,
    objectives: Vec<f64>,
}

impl Means {
    fn new(logprobs: &[f32], spans: &[Range<usize>], key: &Key, kind: &str) -> anyhow::Result<Self> {
        if let Some(place) = logprobs.iter().position(|value| !value.is_finite()) {
            let found = logprobs[place];
            return Err(anyhow!(
                "{key}: log-probability {found} of answer token {place} in the {kind} context, expected a finite \
                 number: the checkpoint is damaged, or its weights overflow (try --dtype f32)"
            ))
            .quality();
        }
        let objectives = spans.iter().map(|span| mean(&logprobs[span.clone()])).collect();
        Ok(Self { joint: mean(logprobs), objectives })
    }

    fn value(&self, options: RewardOptions) -> f64 {
        let parts = match options.answer {
            AnswerMean::Joint => std::slice::from_ref(&self.joint),
            AnswerMean::PerObjective => &self.objectives,
        };
        let unit = |logprob: &f64| match options.difference {
            Difference::Probability => logprob.exp(),
            Difference::Logprob => *logprob,
        };
        parts.iter().map(unit).sum::<f64>() / parts.len() as f64
    }
}

pub(crate) fn mean(logprobs: &[f32]) -> f64 {
    logprobs.iter().map(|&value| f64::from(value)).sum::<f64>() / logprobs.len() as f64
}

/// Exactly what was scored, for whoever wants to compute it again with another tool.
pub(crate) fn context_rows(tasks: &[TaskProbes]) -> Vec<Context> {
    let row = |key: &Key, kind: &str, probe: &Probe| Context {
        task_id: key.task_id.clone(),
        trajectory_index: key.trajectory_index,
        step_index: key.step_index,
        kind: kind.to_owned(),
        context_ids: probe.ids[..probe.answer_start].to_vec(),
        answer_ids: probe.ids[probe.answer()].to_vec(),
    };
    let memories = tasks.iter().flat_map(|task| &task.memories);
    memories
        .flat_map(|memory| {
            let bias = memory.bias.iter().map(|probe| row(&memory.key, "bias", probe));
            std::iter::once(row(&memory.key, "memory", &memory.memory)).chain(bias).collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: RewardOptions = RewardOptions { answer: AnswerMean::Joint, difference: Difference::Probability };

    fn probe(ids: &[i32]) -> Probe {
        Probe { ids: ids.to_vec(), answer_start: ids.len() - 3 }
    }

    /// One task with two memories; the second one's bias is the closed book, and its memory is 12 ids long.
    fn task() -> TaskProbes {
        let memory = |step_index, memory: &[i32], bias: &[i32]| MemoryProbes {
            key: Key::of_step("t", 0, step_index),
            memory: probe(memory),
            bias: Some(probe(bias)),
            truncated: false,
        };
        TaskProbes {
            task_id: "t".to_owned(),
            closed_book: probe(&[1, 7, 8, 9]),
            spans: vec![0..1, 2..3],
            memories: vec![
                memory(0, &[1, 2, 7, 8, 9], &[1, 7, 8, 9]),
                memory(1, &[1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9], &[1, 7, 8, 9]),
            ],
        }
    }

    /// A model whose answer tokens have log-probabilities -1, -2, -3 after two ids and twice that after one.
    #[allow(clippy::unnecessary_wraps, reason = "as a real model's")]
    fn model(sequences: &[ScoredSequence]) -> anyhow::Result<(Vec<Vec<f32>>, usize)> {
        let logprobs = |sequence: &ScoredSequence| {
            let scale = if sequence.targets.start == 1 { -2.0 } else { -1.0 };
            (1..=sequence.targets.len()).map(|place| scale * place as f32).collect()
        };
        let tokens = sequences.iter().map(|sequence| sequence.ids.len()).sum();
        Ok((sequences.iter().map(logprobs).collect(), tokens))
    }

    #[test]
    fn equal_probes_are_computed_once_and_long_ones_not_at_all() {
        let task = task();
        let answers = ask(task.probes(), 8, |sequences| {
            assert_eq!(sequences.len(), 2, "closed book (asked for three times) and the first memory");
            model(sequences)
        });
        let answers = answers.unwrap();
        assert_eq!((answers.tokens_asked, answers.tokens_computed), (3 * 4 + 5, 4 + 5));
        let (rows, sums) = score_rows(std::slice::from_ref(&task), &answers, OPTIONS, Bias::Prefix).unwrap();
        assert_eq!((rows[1].answer_logprob, rows[1].bias_logprob, rows[1].memory_reward), (None, Some(-4.0), None));
        let counts = ["memories", "memories_past_window", "biases_past_window"].map(|name| sums.count(name));
        assert_eq!(counts, [2, 1, 0]);
        let by_heart = closed_book(&task, &answers).unwrap();
        assert_eq!((by_heart.closed_book_logprob, by_heart.objective_logprobs), (Some(-4.0), Some(vec![-2.0, -6.0])));
        assert_eq!(sums.mean("closed_book_probability"), Some((-4.0_f64).exp()));
        assert_eq!(sums.mean("memory_reward"), Some((-2.0_f64).exp() - (-4.0_f64).exp()));
    }

    #[track_caller]
    fn check(answer: AnswerMean, difference: Difference, expected: f64) {
        let task = task();
        let answers = ask(task.probes(), 100, model).unwrap();
        let (rows, _) =
            score_rows(std::slice::from_ref(&task), &answers, RewardOptions { answer, difference }, Bias::Prefix)
                .unwrap();
        assert!((rows[0].memory_reward.unwrap() - expected).abs() < 1e-12, "{answer:?} {difference:?}");
        assert_eq!(rows[0].objective_logprobs, Some(vec![-1.0, -3.0]), "the separator is left out");
        assert_eq!((rows[0].answer_logprob, rows[0].answer_token_count), (Some(-2.0), 3));
    }

    #[test]
    fn rewards_are_what_the_options_say() {
        let p = |logprob: f64| logprob.exp();
        check(AnswerMean::Joint, Difference::Probability, p(-2.0) - p(-4.0));
        check(AnswerMean::Joint, Difference::Logprob, 2.0);
        let (memory, bias) = (f64::midpoint(p(-1.0), p(-3.0)), f64::midpoint(p(-2.0), p(-6.0)));
        check(AnswerMean::PerObjective, Difference::Probability, memory - bias);
        check(AnswerMean::PerObjective, Difference::Logprob, -2.0 + 4.0);
    }

    #[test]
    fn without_a_bias_the_reward_is_the_probability() {
        let mut task = task();
        task.memories.truncate(1);
        task.memories[0].bias = None;
        let answers = ask(task.probes(), 100, model).unwrap();
        let (rows, sums) = score_rows(std::slice::from_ref(&task), &answers, OPTIONS, Bias::Prefix).unwrap();
        assert_eq!((rows[0].memory_reward, rows[0].bias_logprob), (Some((-2.0_f64).exp()), None));
        assert_eq!((sums.count("biases_past_window"), sums.mean("bias_probability")), (0, None));
    }

    #[test]
    fn what_is_not_a_number_stops_with_the_key() {
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let task = task();
            let answers = ask(task.probes(), 100, |sequences| {
                let mut found = model(sequences)?;
                found.0[1][2] = bad;
                Ok(found)
            });
            let error = score_rows(std::slice::from_ref(&task), &answers.unwrap(), OPTIONS, Bias::Prefix).unwrap_err();
            assert!(error.chain().any(|cause| matches!(cause.downcast_ref(), Some(mempo_run::Failure::Quality(..)))));
            assert!(format!("{error:#}").contains("t/trajectory 0/step 0"), "{error:#}");
        }
    }

    #[test]
    fn contexts_are_what_was_scored() {
        let rows = context_rows(&[task()]);
        let kinds: Vec<(&str, i32)> = rows.iter().map(|row| (row.kind.as_str(), row.step_index)).collect();
        assert_eq!(kinds, [("memory", 0), ("bias", 0), ("memory", 1), ("bias", 1)]);
        assert_eq!((rows[0].context_ids.as_slice(), rows[0].answer_ids.as_slice()), (&[1, 2][..], &[7, 8, 9][..]));
    }

    fn integers(value: &serde_json::Value) -> Vec<i32> {
        value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap() as i32).collect()
    }

    fn numbers(value: &serde_json::Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    }

    /// The task of the reference, its memories held against what `bias` conditions on.
    fn given_task(reference: &serde_json::Value, bias: &str) -> TaskProbes {
        let answer = integers(&reference["answer_ids"]);
        let probe = |context: &serde_json::Value| {
            let ids = [integers(context), answer.clone()].concat();
            Probe { answer_start: ids.len() - answer.len(), ids }
        };
        let closed_book = probe(&reference["closed_book_ids"]);
        let given = reference["memories"].as_array().unwrap();
        let memories = given.iter().enumerate().map(|(place, memory)| {
            let [trajectory, step] =
                ["trajectory_index", "step_index"].map(|name| memory[name].as_i64().unwrap() as i32);
            let bias = match bias {
                "prefix" => Some(probe(&memory["prefix_ids"])),
                "previous-memory" if step > 0 => Some(probe(&given[place - 1]["context_ids"])),
                "previous-memory" | "null" => Some(closed_book.clone()),
                _ => None,
            };
            let key = Key::of_step("t", trajectory, step);
            MemoryProbes { key, memory: probe(&memory["context_ids"]), bias, truncated: false }
        });
        let spans = reference["spans"].as_array().unwrap().iter().map(integers);
        let spans = spans.map(|span| span[0] as usize..span[1] as usize).collect();
        TaskProbes { task_id: "t".to_owned(), memories: memories.collect(), closed_book, spans }
    }

    #[track_caller]
    fn close_to(found: &[Option<f64>], expected: &[f64], least: f64, what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(expected) {
            // Where a bias is taken off, what is left has the rounding of what it was taken from: `least` of it.
            let off = (found.unwrap() - expected).abs();
            assert!(off < 1e-5 * expected.abs().max(least), "{what}: {found:?}, expected {expected}");
        }
    }

    /// Numbers that `tests/reference/make.py` computed with transformers in double precision.
    #[test]
    fn scores_are_those_of_the_reference() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference");
        let text = fs_err::read_to_string(folder.join("segments.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
        let runtime = crate::fixture::device().resolve().unwrap();
        let model = mempo_model::Model::load(&folder.join(reference["model"].as_str().unwrap()), &runtime).unwrap();
        let options = mempo_model::ScoreOptions { temperature: 1.0, tokens_per_batch: 4096 };
        let expected = &reference["expected"];
        let mut shared = false;
        for case in expected["rewards"].as_array().unwrap() {
            let named = |name: &str| case[name].as_str().unwrap();
            let bias = Bias::from_str(named("bias"), false).unwrap();
            let reward = RewardOptions {
                answer: AnswerMean::from_str(named("answer"), false).unwrap(),
                difference: Difference::from_str(named("difference"), false).unwrap(),
            };
            let task = given_task(&reference, named("bias"));
            let answers = ask(task.probes(), 256, |sequences| Ok(model.shared_logprobs(sequences, &options)?)).unwrap();
            shared |= answers.tokens_computed < answers.tokens_asked;
            let (rows, sums) = score_rows(std::slice::from_ref(&task), &answers, reward, bias).unwrap();
            let column = |of: fn(&Score) -> Option<f64>| rows.iter().map(of).collect::<Vec<_>>();
            let least = if reward.difference == Difference::Logprob { 1.0 } else { 1e-3 };
            let what = format!("{reward:?} {bias:?}");
            close_to(&column(|row| row.memory_reward), &numbers(&case["rewards"]), least, &what);
            close_to(&column(|row| row.answer_logprob), &numbers(&expected["answer_logprobs"]), 0.0, "log-probability");
            close_to(
                &column(|row| row.answer_probability),
                &numbers(&expected["answer_probabilities"]),
                0.0,
                "probability",
            );
            let objectives = rows.iter().flat_map(|row| row.objective_logprobs.clone().unwrap()).map(Some);
            let of_each: Vec<f64> =
                expected["objective_logprobs"].as_array().unwrap().iter().flat_map(numbers).collect();
            close_to(&objectives.collect::<Vec<_>>(), &of_each, 0.0, "objectives");
            if bias == Bias::Prefix {
                close_to(&column(|row| row.bias_probability), &numbers(&expected["prefix_probabilities"]), 0.0, "bias");
            }
            let by_heart = [expected["closed_book_probability"].as_f64().unwrap()];
            close_to(&[sums.mean("closed_book_probability")], &by_heart, 0.0, "closed book");
        }
        assert!(shared, "equal probes are asked once");
    }
}
