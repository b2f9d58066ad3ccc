//! Signs that a policy has collapsed: training on it would make it worse, so it stops and says which trajectories show it.

use std::collections::HashSet;

use anyhow::anyhow;
use clap::Args;
use mempo_data::{SegmentKind, Step, StopReason, Trajectory, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_train::PolicyStats;
use serde::Serialize;

/// Ids of an n-gram that is looked for again.
const NGRAM: usize = 4;
/// Mean probability of the answers without a memory from which on there is little left to remember.
const CLOSED_BOOK: f64 = 0.5;
/// Trajectories that a message names.
const NAMED: usize = 3;

/// When to stop. Defaults are far from what a healthy policy does.
#[derive(Debug, Clone, Args, Serialize)]
#[expect(clippy::struct_field_names, reason = "fields are flags, and the flags belong together")]
pub(crate) struct AlarmOptions {
    /// Stop if a smaller share of trajectories has valid format; 0 for never, as a policy may have to learn it
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    alarm_format: f64,
    /// Stop if a larger share of completions was cut off at the length limit; 1 for never
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    alarm_truncated: f64,
    /// Stop if on average a larger share of a completion's four-token sequences occurs in it before
    #[arg(long, value_name = "SHARE", default_value_t = 0.8)]
    alarm_repetition: f64,
    /// Stop if completions are shorter on average, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2.0)]
    alarm_length: f64,
    /// Stop if memories are shorter on average, in tokens, tags included; 0 for never
    #[arg(long, value_name = "TOKENS", default_value_t = 0.0)]
    alarm_memory_below: f64,
    /// Stop if memories are longer on average, in tokens, tags included; inf for never
    #[arg(long, value_name = "TOKENS", default_value_t = f64::INFINITY)]
    alarm_memory_above: f64,
    /// Stop if the model that scored gives the gold answers a larger mean probability without any memory: it knows them by
    /// heart, and memories are paid for nothing; 1 for never [default: 0.5 where the advantages have scores]
    #[arg(long, value_name = "PROBABILITY")]
    alarm_closed_book: Option<f64>,
    /// Stop if an optimizer step's entropy is lower, in nats
    #[arg(long, value_name = "NATS", default_value_t = 1e-4)]
    alarm_entropy: f64,
    /// Stop if an optimizer step's divergence from the reference policy is larger, in nats
    #[arg(long, value_name = "NATS", default_value_t = 5.0)]
    alarm_kl: f64,
}

/// A mean over trajectories or completions, and those that are worst.
#[derive(Default)]
struct Sign {
    sum: f64,
    count: f64,
    /// Worst first.
    worst: Vec<(f64, String)>,
}

impl Sign {
    fn add(&mut self, value: f64, badness: f64, name: impl FnOnce() -> String) {
        self.sum += value;
        self.count += 1.0;
        let place = self.worst.partition_point(|(known, _)| *known >= badness);
        if place < NAMED {
            self.worst.insert(place, (badness, name()));
            self.worst.truncate(NAMED);
        }
    }

    fn mean(&self) -> f64 {
        self.sum / self.count.max(1.0)
    }

    fn examples(&self) -> String {
        let names: Vec<&str> = self.worst.iter().map(|(_, name)| name.as_str()).collect();
        names.join(", ")
    }
}

impl AlarmOptions {
    /// Refuses a rollout that shows a collapse.
    pub(crate) fn check_rollouts(&self, rollouts: &Input) -> anyhow::Result<()> {
        let mut format = Sign::default();
        for row in read_rows::<Trajectory>(&rollouts.table("trajectories")?).bad_input()? {
            let row = row.bad_input()?;
            let valid = f64::from(u8::from(row.format_valid));
            format.add(valid, -valid, || format!("{}/trajectory {}", row.task_id, row.trajectory_index));
        }
        let [mut truncated, mut repetition, mut length, mut short, mut long] = std::array::from_fn(|_| Sign::default());
        for step in read_rows::<Step>(&rollouts.table("steps")?).bad_input()? {
            let step = step.bad_input()?;
            let name = || format!("{}/trajectory {}/step {}", step.task_id, step.trajectory_index, step.step_index);
            let cut = f64::from(u8::from(step.stop_reason == StopReason::MaxTokens));
            truncated.add(cut, cut, name);
            let repeated = repeated_share(&step.completion_ids);
            repetition.add(repeated, repeated, name);
            let tokens = step.completion_ids.len() as f64;
            length.add(tokens, -tokens, name);
            if let Some(memory) = step.segments.iter().find(|segment| segment.kind == SegmentKind::Memory) {
                let tokens = f64::from(memory.end - memory.start);
                short.add(tokens, -tokens, name);
                long.add(tokens, tokens, name);
            }
        }
        let below = |name, sign: &Sign, limit: f64| (sign.mean() < limit).then(|| (name, sign.mean(), sign.examples()));
        let above = |name, sign: &Sign, limit: f64| (sign.mean() > limit).then(|| (name, sign.mean(), sign.examples()));
        let alarms = [
            below("--alarm-format", &format, self.alarm_format),
            above("--alarm-truncated", &truncated, self.alarm_truncated),
            above("--alarm-repetition", &repetition, self.alarm_repetition),
            below("--alarm-length", &length, self.alarm_length),
            below("--alarm-memory-below", &short, self.alarm_memory_below),
            above("--alarm-memory-above", &long, self.alarm_memory_above),
        ];
        match alarms.into_iter().flatten().next() {
            None => Ok(()),
            Some((name, mean, examples)) => Err(anyhow!(
                "{}: {name}: the mean is {mean:.4}: the policy has collapsed, or sampling went wrong; see {examples}",
                rollouts.dir().display()
            ))
            .quality(),
        }
    }

    /// Refuses advantages whose scores show that the policy knows the answers by heart.
    pub(crate) fn check_advantages(&self, advantages: &Input) -> anyhow::Result<()> {
        let limit = self.alarm_closed_book.unwrap_or(CLOSED_BOOK);
        let known = advantages.manifest().and_then(|manifest| manifest.summary_number("closed_book_probability_mean"));
        let dir = advantages.dir().display();
        let Some(known) = known else {
            if self.alarm_closed_book.is_none_or(|limit| limit >= 1.0) {
                return Ok(());
            }
            return Err(anyhow!(
                "{dir}: --alarm-closed-book: it does not say how probable answers are without a memory: \
                 give `mempo-score advantages` the --scores of `mempo-score segments`"
            ))
            .usage();
        };
        if known <= limit {
            return Ok(());
        }
        Err(anyhow!(
            "{dir}: --alarm-closed-book: without any memory the gold answers have a mean probability of {known:.4}: train on other \
             tasks (closed_book/ of the --scores has each task's), or score with a frozen judge (mempo-score segments --model)",
        ))
        .quality()
    }

    /// What an optimizer step shows of a collapse.
    pub(crate) fn of_step(&self, stats: &PolicyStats) -> Option<StepAlarm> {
        if stats.entropy < self.alarm_entropy {
            let (option, value) = ("--alarm-entropy", stats.entropy);
            return Some(StepAlarm { option, value, badness: |stats| -stats.entropy });
        }
        let value = stats.kl.filter(|kl| *kl > self.alarm_kl)?;
        Some(StepAlarm { option: "--alarm-kl", value, badness: |stats| stats.kl.unwrap_or(0.0) })
    }
}

/// A limit that an optimizer step is beyond.
pub(crate) struct StepAlarm {
    pub(crate) option: &'static str,
    /// In nats.
    pub(crate) value: f64,
    /// How far a trajectory alone shows it.
    pub(crate) badness: fn(&PolicyStats) -> f64,
}

/// Share of a completion's n-grams that occur in it before.
fn repeated_share(ids: &[i32]) -> f64 {
    let mut seen = HashSet::new();
    let ngrams = ids.windows(NGRAM);
    let count = ngrams.len().max(1) as f64;
    ngrams.filter(|ngram| !seen.insert(*ngram)).count() as f64 / count
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;
    use mempo_run::{Stage, StageArgs, exit_code};

    use super::*;

    #[test]
    fn repetition_is_the_share_of_ngrams_seen_before() {
        assert!(repeated_share(&[1, 2, 3]).abs() < 1e-12);
        assert!(repeated_share(&[1, 2, 3, 4, 5, 6]).abs() < 1e-12);
        // 7 7 7 7 seven times: five of six n-grams are old.
        assert!((repeated_share(&[7; 9]) - 5.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn the_worst_are_named() {
        let mut sign = Sign::default();
        for (badness, name) in [(0.1, "a"), (0.9, "b"), (0.5, "c"), (0.7, "d"), (0.9, "e")] {
            sign.add(badness, badness, || name.to_owned());
        }
        assert_eq!(sign.examples(), "b, e, d");
        assert!((sign.mean() - 0.62).abs() < 1e-12);
    }

    #[test]
    fn answers_known_by_heart_stop_the_training() {
        let folder = tempfile::tempdir().unwrap();
        let args = StageArgs { out: folder.path().join("advantages"), seed: 0, restart: false, shard: None };
        let stage = Stage::open("mempo-score", "advantages", &args, &(), &[]).unwrap().unwrap();
        stage.finish(&[], serde_json::json!({"closed_book_probability_mean": 0.25})).unwrap();
        let advantages = Input::stage("advantages", &args.out).unwrap();
        let options = |line: &str| {
            let command = AlarmOptions::augment_args(clap::Command::new("alarms"));
            AlarmOptions::from_arg_matches(&command.get_matches_from(["alarms", line])).unwrap()
        };
        options("--alarm-closed-book=0.3").check_advantages(&advantages).unwrap();
        let error = options("--alarm-closed-book=0.2").check_advantages(&advantages).unwrap_err();
        assert!(exit_code(&error) == 3 && format!("{error:#}").contains("0.2500"), "{error:#}");
    }
}
