use clap::FromArgMatches;
use mempo_data::{Key, Row, Score, Status, Step, Trajectory};
use mempo_run::Failure;

use super::*;
use crate::fixture::{Chain, failure};

const COMMAND: &str = "advantages --rollouts @rollouts --scores @scores";
const SEGMENTS: &str =
    "segments --rollouts @rollouts --tasks @tasks --model @model --dtype f32 --device cpu --out @scores";

/// `(value - mean) / sample std` of every value, written the long way round.
fn standardised(values: &[f64]) -> Vec<f64> {
    let count = values.len() as f64;
    let pairs = values.iter().flat_map(|a| values.iter().map(move |b| (a - b).powi(2)));
    let std = (pairs.sum::<f64>() / (2.0 * count * (count - 1.0))).sqrt();
    let mean = values.iter().sum::<f64>() / count;
    values.iter().map(|value| (value - mean) / std).collect()
}

#[test]
fn the_join_gives_what_brute_force_gives() {
    let chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    for scope in ["per-step", "pooled"] {
        chain
            .run(&format!("{COMMAND} --memory-scope {scope} --min-memory-group 2 --memory-std-floor 1e-6 --alpha 0.5 --out @{scope}"))
            .unwrap();
        let rows = chain.rows::<Advantage>(scope);
        let mut groups: BTreeMap<(String, i32), Vec<(Key, f64)>> = BTreeMap::new();
        let counted = |row: &&Trajectory| row.reward.is_some();
        let kept: Vec<Key> = chain.trajectories.iter().filter(counted).map(Row::key).collect();
        let is_kept = |task: &str, index| kept.contains(&Key::of_step(task, index, 0));
        for score in chain.rows::<Score>("scores").iter().filter(|row| is_kept(&row.task_id, row.trajectory_index)) {
            let step = if scope == "pooled" { 0 } else { score.step_index };
            let group = groups.entry((score.task_id.clone(), step)).or_default();
            group.push((score.key(), score.memory_reward.unwrap()));
        }
        let mut expected: BTreeMap<Key, f64> = BTreeMap::new();
        for group in groups.into_values().filter(|group| group.len() > 1) {
            let values: Vec<f64> = group.iter().map(|(_, value)| *value).collect();
            let same = values.iter().all(|value| value.to_bits() == values[0].to_bits());
            let found = if same { vec![0.0; values.len()] } else { standardised(&values) };
            expected.extend(group.into_iter().map(|(key, _)| key).zip(found));
        }
        let steps: Vec<&Step> = chain.steps.iter().filter(|row| is_kept(&row.task_id, row.trajectory_index)).collect();
        assert_eq!(rows.len(), steps.len());
        for (row, step) in rows.iter().zip(steps) {
            assert_eq!(row.key(), step.key());
            let memory = 0.5 * expected.get(&row.key()).copied().unwrap_or(0.0);
            assert!((f64::from(row.memory_advantage.unwrap()) - memory).abs() < 1e-5, "{}", row.key());
            assert_eq!((row.memory_start, row.memory_end), (Some(step.segments[0].start), Some(step.segments[0].end)));
            let task = chain.trajectories.iter().filter(|other| other.task_id == row.task_id);
            let rewards: Vec<f64> = task.filter(counted).map(|row| f64::from(row.reward.unwrap())).collect();
            let expected = if rewards.len() < 2 { 0.0 } else { standardised(&rewards)[row.trajectory_index as usize] };
            assert!((f64::from(row.trajectory_advantage) - expected).abs() < 1e-6);
        }
    }
    let summary = chain.summary("per-step");
    assert_eq!(summary["trajectories_without_reward"], 1);
    assert_eq!(
        summary["trajectory_groups"]["by_state"],
        json!({"mixed": 16, "all_zero": 0, "all_one": 0, "all_equal": 0, "too_small": 1})
    );
    assert_eq!(summary["memory_groups"]["groups"], 17 * 3);
}

#[test]
fn neither_shards_nor_little_memory_change_a_byte() {
    let chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    for shard in ["0/2", "1/2"] {
        chain.run(&SEGMENTS.replace("@scores", &format!("@shards --shard {shard}"))).unwrap();
    }
    chain.run(&format!("{COMMAND} --out @whole")).unwrap();
    chain.run(&format!("{COMMAND} --memory-limit-mib 16 --out @little").replace("@scores", "@shards")).unwrap();
    let bytes = |stage: &str| fs_err::read(chain.path(stage).join("advantages/part-00000.parquet")).unwrap();
    assert_eq!(bytes("whole"), bytes("little"));
}

#[test]
fn grpo_needs_no_scores_and_pays_memories_nothing() {
    let chain = Chain::new();
    chain.run("advantages --rollouts @rollouts --estimator grpo --out @grpo").unwrap();
    let rows = chain.rows::<Advantage>("grpo");
    assert_eq!(rows.len(), chain.steps.len() - 3);
    assert!(rows.iter().all(|row| row.memory_advantage.is_none() && row.memory_start.is_none()));
    assert!((rows[0].trajectory_advantage - 0.5_f32.sqrt()).abs() < 1e-6);
    let error = chain.run("advantages --rollouts @rollouts --out @mempo").unwrap_err();
    assert!(matches!(failure(&error).0, Failure::Usage(..)));
}

#[test]
fn scores_pay_memories_under_every_estimator() {
    let chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    chain.run(&format!("{COMMAND} --min-memory-group 2 --out @mempo")).unwrap();
    let expected: Vec<Option<f32>> = chain.rows::<Advantage>("mempo").iter().map(|row| row.memory_advantage).collect();
    assert!(expected.iter().flatten().any(|advantage| *advantage != 0.0));
    chain.run(&format!("{COMMAND} --min-memory-group 2 --estimator memagent --out @memagent")).unwrap();
    let rows = chain.rows::<Advantage>("memagent");
    assert_eq!(rows.iter().map(|row| row.memory_advantage).collect::<Vec<_>>(), expected);
    assert!((rows[0].trajectory_advantage - 0.5).abs() < 1e-6, "one of two is right");

    // Every success is alone among its task's: it gains nothing beside itself, and memories have nothing of their own.
    let infomem = "--estimator grpo --combine infomem --memory-apply success --memory-steps final --min-memory-group 2";
    chain.run(&format!("{COMMAND} {infomem} --out @infomem")).unwrap();
    chain.run("advantages --rollouts @rollouts --estimator grpo --out @grpo").unwrap();
    for (row, grpo) in chain.rows::<Advantage>("infomem").iter().zip(chain.rows::<Advantage>("grpo")) {
        assert_eq!((row.trajectory_advantage, row.memory_advantage), (grpo.trajectory_advantage, Some(0.0)));
    }
    for line in ["--combine infomem --estimator grpo", "--combine rewards --estimator rloo"] {
        let error = chain.run(&format!("advantages --rollouts @rollouts {line} --out @none")).unwrap_err();
        assert!(matches!(failure(&error), (Failure::Usage(..), text) if text.contains("--scores")), "{error:#}");
    }
}

#[test]
fn infomem_pays_successes_for_what_their_last_memory_gained() {
    let mut chain = Chain::new();
    for row in &mut chain.trajectories {
        (row.reward, row.status) = (Some(1.0), Status::Ok);
    }
    chain.write();
    let segments = SEGMENTS.replace("@scores", "@gains");
    chain.run(&format!("{segments} --bias null --difference logprob --memory-steps final")).unwrap();
    let gains: Vec<Score> = chain.rows("gains");
    assert_eq!(gains.len(), chain.trajectories.len(), "one memory a trajectory");
    let line = COMMAND.replace("@scores", "@gains");
    chain.run(&format!("{line} --estimator grpo --combine infomem --alpha 0.5 --out @infomem")).unwrap();
    let rows = chain.rows::<Advantage>("infomem");
    assert_eq!(rows.len(), chain.steps.len());
    // Of two that are right, the one whose memory gained more has +1/√2 once normalised, whatever alpha.
    for (gains, rows) in gains.chunks(2).zip(rows.chunks(6)) {
        let more = gains[0].memory_reward > gains[1].memory_reward;
        let expected = 0.5_f32.sqrt() * if more { 1.0 } else { -1.0 };
        for row in rows {
            let expected = if row.trajectory_index == 0 { expected } else { -expected };
            assert!((row.trajectory_advantage - expected).abs() < 1e-4, "{row:?}");
        }
    }
    let error = chain.run(&format!("{line} --out @none")).unwrap_err();
    assert!(
        matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("--memory-steps final")),
        "{error:#}"
    );
}

#[test]
fn a_trajectory_is_divided_among_the_steps_that_are_trained() {
    let chain = Chain::new();
    let advantages = |line: &str| -> Vec<(f32, f32)> {
        let out = line.replace([' ', '-'], "");
        chain.run(&format!("advantages --rollouts @rollouts {line} --out @{out}")).unwrap();
        let rows = chain.rows::<Advantage>(&out);
        rows.iter().map(|row| (row.trajectory_advantage, row.loss_weight)).collect()
    };
    let (whole, slime) = (advantages("--estimator grpo"), advantages("--estimator memagent-slime"));
    for (whole, slime) in whole.chunks(3).zip(slime.chunks(3)) {
        let half = whole[0].0 / 2.0;
        assert_eq!(slime, [(half, 1.0), (half, 1.0), (half, 0.0)], "the third step answers");
        assert_eq!(whole, [(whole[0].0, 1.0); 3]);
    }
    assert_eq!(advantages("--estimator memagent-slime --trajectory-credit copy --train-final keep"), whole);
    let all = advantages("--estimator memagent --trajectory-credit divide");
    assert!((all[0].0 - 0.5 / 3.0).abs() < 1e-6 && all.iter().all(|row| row.1.to_bits() == 1.0_f32.to_bits()));
    let error = chain.run(&format!("{COMMAND} --combine rewards --trajectory-credit divide --out @none")).unwrap_err();
    assert!(matches!(failure(&error), (Failure::Usage(..), text) if text.contains("divide")), "{error:#}");
}

#[test]
fn tags_and_tasks_can_be_left_out() {
    let mut chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    let line = format!("{COMMAND} --credit inside");
    let error = chain.run(&format!("{line} --out @none")).unwrap_err();
    assert!(matches!(failure(&error).0, Failure::Usage(..)));
    chain.run(&format!("{line} --tokenizer @model --out @inside")).unwrap();
    let builder = chain.builder();
    for (row, step) in chain.rows::<Advantage>("inside").iter().zip(counted_steps(&chain)) {
        let ids = &step.completion_ids[row.memory_start.unwrap() as usize..row.memory_end.unwrap() as usize];
        let inside = builder.tokenizer().decode(ids);
        assert!(!inside.contains(['<', '>']) && step.completion.contains(&format!("<mem>{inside}</mem>")), "{inside}");
    }

    // All trajectories of one task earn the same; a reward that was null becomes 0.
    for row in chain.trajectories.iter_mut().filter(|row| row.task_id == "task-03") {
        row.reward = Some(1.0);
    }
    chain.write();
    chain.run(&SEGMENTS.replace("@scores", "@again")).unwrap();
    let dropped = |degenerate: &str| -> Vec<(String, bool)> {
        let line = COMMAND.replace("@scores", "@again");
        chain.run(&format!("{line} --degenerate {degenerate} --null-rewards zero --out @{degenerate}")).unwrap();
        let rows = chain.rows::<Advantage>(degenerate);
        assert_eq!(rows.len(), chain.steps.len());
        let weights = rows.iter().map(|row| row.loss_weight.to_bits());
        assert!(weights.into_iter().all(|bits| [0.0_f32, 1.0].map(f32::to_bits).contains(&bits)));
        rows.into_iter().map(|row| (row.task_id, row.loss_weight < 0.5)).collect()
    };
    assert!(dropped("keep").iter().all(|(_, dropped)| !dropped));
    assert!(dropped("drop").iter().all(|(task, dropped)| *dropped == (task == "task-03")));
    assert_eq!(chain.summary("drop")["tasks_dropped"], 1);
    // Two trajectories a task: no memory group reaches the least size of 4.
    assert!(dropped("drop-without-memory").iter().all(|(task, dropped)| *dropped == (task == "task-03")));
}

fn counted_steps(chain: &Chain) -> impl Iterator<Item = &Step> {
    let kept = |step: &&Step| {
        let mut rows = chain.trajectories.iter();
        let own = rows.find(|row| (&row.task_id, row.trajectory_index) == (&step.task_id, step.trajectory_index));
        own.is_some_and(|row| row.reward.is_some())
    };
    chain.steps.iter().filter(kept)
}

#[test]
fn the_report_says_what_explains_the_rewards() {
    let chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    chain.run(&format!("{COMMAND} --out @out")).unwrap();
    let summary = chain.summary("out");
    let bins = summary["answer_probability_histogram"].as_array().unwrap();
    let counted: u64 = bins.iter().map(|bin| bin.as_u64().unwrap()).sum();
    assert_eq!(counted as usize, chain.rows::<Score>("scores").len());
    let all = summary["memory_reward_explained_by_all"].as_f64().unwrap();
    let step = summary["memory_reward_explained_by"]["step_index"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&all) && step <= all + 1e-12, "{summary}");
    assert!(summary["closed_book_probability_mean"].is_f64(), "{summary}");
}

#[test]
fn scores_that_do_not_fit_are_refused() {
    let mut chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    chain.run("logprobs --rollouts @rollouts --model @model --dtype f32 --device cpu --out @logprobs").unwrap();
    let error = chain.run("advantages --rollouts @rollouts --scores @logprobs --out @a").unwrap_err();
    assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("scores")), "{error:#}");

    for step in &mut chain.steps {
        step.trajectory_index += 7;
    }
    for trajectory in &mut chain.trajectories {
        trajectory.trajectory_index += 7;
    }
    chain.write();
    let error = chain.run(&format!("{COMMAND} --out @b")).unwrap_err();
    assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("not made from")), "{error:#}");
}

fn arguments(words: &[&str]) -> AdvantagesArguments {
    let line = ["advantages", "--rollouts", "r", "--scores", "s", "--out", "o"];
    let command = AdvantagesArguments::augment_args(clap::Command::new("advantages"));
    AdvantagesArguments::from_arg_matches(&command.get_matches_from(line.iter().chain(words))).unwrap()
}

fn row(trajectory_index: i32, step_index: Option<i32>, scored: bool) -> JoinedRow {
    let memory = SegmentCells { kind: "memory".to_owned(), start: 1, end: 3 };
    JoinedRow {
        task_id: "t".to_owned(),
        trajectory_index,
        step_count: 1,
        reward: Some(0.0),
        format_valid: true,
        step_index,
        segments: step_index.map(|_| vec![memory]),
        scored,
        memory_reward: None,
        answer_probability: None,
        observation_length: 0,
        completion_ids: None,
    }
}

#[test]
fn rows_that_are_missing_are_named() {
    let arguments = arguments(&[]);
    let task = |rows: &[JoinedRow]| Estimation::new(&arguments, None).task(rows);
    let missing = |rows: &[JoinedRow]| failure(&task(rows).unwrap_err()).1;
    assert!(missing(&[row(0, Some(0), false)]).contains("t/trajectory 0/step 0: `scores` has no row"));
    assert!(missing(&[row(2, None, false)]).contains("t/trajectory 2/step 0: `steps` has 0 rows"));
    let mut infinite = row(0, Some(0), true);
    infinite.memory_reward = Some(f64::INFINITY);
    let error = task(&[infinite]).unwrap_err();
    assert!(matches!(failure(&error), (Failure::Quality(..), text) if text.contains("t/trajectory 0/step 0")));
    // A memory whose context was past the window has a row without a reward: it earns nothing.
    let found = task(&[row(0, Some(0), true)]).unwrap();
    assert_eq!((found[0].memory_advantage, found[0].memory_end, found[0].loss_weight), (Some(0.0), Some(3), 1.0));
}

/// A folder with a tokenizer that has these texts as its tokens and merges nothing.
fn tokenizer_of(texts: &[&str]) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let places = texts.iter().enumerate().map(|(id, text)| (text.replace(' ', "\u{120}"), json!(id)));
    let vocabulary: serde_json::Map<String, Value> = places.collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": &bytes, "post_processor": null, "decoder": &bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    fs_err::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Tokenizer::load(folder.path()).unwrap()
}

fn integer(value: &Value) -> Option<i32> {
    value.as_i64().map(|number| number as i32)
}

/// The joined rows of a trajectory of the reference.
fn given_rows(trajectory_index: i32, given: &Value) -> Vec<JoinedRow> {
    let steps = given["steps"].as_array().unwrap();
    let rows = (0..).zip(steps).map(|(step_index, step)| {
        let cells = |kind: &str, start, end| SegmentCells { kind: kind.to_owned(), start, end };
        let ids: Vec<i32> = step["completion_ids"].as_array().unwrap().iter().filter_map(integer).collect();
        let memory = step["memory"].as_array();
        let memory = memory.map(|range| cells("memory", integer(&range[0]).unwrap(), integer(&range[1]).unwrap()));
        let then = cells(step["then"].as_str().unwrap(), ids.len() as i32 - 1, ids.len() as i32);
        JoinedRow {
            step_count: steps.len() as i32,
            reward: given["reward"].as_f64().map(|reward| reward as f32),
            format_valid: given["format_valid"] == true,
            segments: Some(memory.into_iter().chain([then]).collect()),
            memory_reward: step["memory_reward"].as_f64(),
            completion_ids: Some(ids),
            ..row(trajectory_index, Some(step_index), true)
        }
    });
    rows.collect()
}

/// Rows written by `tests/reference/make.py` from the formulas alone, asked for on the command line.
#[test]
fn rows_are_those_of_the_reference() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/rows.json");
    let reference: Value = serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap();
    let texts: Vec<&str> = reference["tokens"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let tags = mempo_text::Profile::load("mempo").unwrap().tags;
    for case in reference["cases"].as_array().unwrap() {
        let words: Vec<&str> = case["command_line"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let arguments = arguments(&words);
        arguments.check().unwrap();
        let inside_of = (arguments.credit == Credit::Inside).then(|| (tokenizer_of(&texts), tags.clone()));
        let given = case["trajectories"].as_array().unwrap();
        let rows: Vec<JoinedRow> = (0..).zip(given).flat_map(|(index, given)| given_rows(index, given)).collect();
        let found = Estimation::new(&arguments, inside_of).task(&rows).unwrap();
        let expected = case["expected"].as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{}", case["name"]);
        for (found, expected) in found.iter().zip(expected) {
            let name = format!("{} {}: {found:?}, expected {expected}", case["name"], found.key());
            let near = |found: f32, place: usize| (f64::from(found) - expected[place].as_f64().unwrap()).abs() < 1e-6;
            let places = [Some(found.trajectory_index), Some(found.step_index), found.memory_start, found.memory_end];
            assert_eq!(places, [0, 1, 4, 5].map(|place: usize| integer(&expected[place])), "{name}");
            assert!(near(found.trajectory_advantage, 2) && near(found.loss_weight, 6), "{name}");
            assert_eq!(found.memory_advantage.is_none(), expected[3].is_null(), "{name}");
            assert!(found.memory_advantage.is_none_or(|advantage| near(advantage, 3)), "{name}");
        }
    }
}

#[test]
fn the_memorys_weight_follows_the_training() {
    let chain = Chain::new();
    chain.run(SEGMENTS).unwrap();
    let advantages = |line: &str, out: &str| -> Vec<(f32, Option<f32>)> {
        chain.run(&format!("{COMMAND} --min-memory-group 2 {line} --out @{out}")).unwrap();
        let rows = chain.rows::<Advantage>(out);
        rows.iter().map(|row| (row.trajectory_advantage, row.memory_advantage)).collect()
    };
    let whole = advantages("", "whole");
    assert!(whole.iter().any(|(_, memory)| memory.is_some_and(|advantage| advantage != 0.0)));
    assert_eq!(advantages("--alpha-end 0.2", "start"), whole, "nothing is done yet");
    for (line, out, alpha) in [
        ("--alpha-end 0.2 --progress 0.5", "half", 0.6),
        ("--alpha 0.5 --alpha-end 0.2 --progress 1", "end", 0.2),
        ("--alpha 0.5 --progress 0.9", "constant", 0.5),
    ] {
        for ((trajectory, memory), (same, one)) in advantages(line, out).into_iter().zip(&whole) {
            assert_eq!(trajectory.to_bits(), same.to_bits());
            let expected = one.map(|one| one * alpha);
            assert!(memory.zip(expected).is_none_or(|(memory, expected)| (memory - expected).abs() < 1e-6), "{line}");
        }
    }
    let command = AdvantagesArguments::augment_args(clap::Command::new("advantages"));
    let error = command.try_get_matches_from(["advantages", "--progress", "1.5"]).unwrap_err();
    assert!(error.to_string().contains("expected 0 to 1"), "{error}");
}
