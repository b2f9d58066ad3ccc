//! `mempo-rl train` on small made-up rollouts: joins, continuation after a kill, carried optimizer state, refusals.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::Parser;
use mempo_data::{Advantage, Logprobs, Row, Segment, SegmentKind, Status, Step, StopReason, Trajectory, write_rows};
use mempo_model::{Config, DeviceOptions, Model, Runtime, ScoreOptions, ScoredSequence};
use mempo_run::{Input, Manifest, Stage, StageArgs};
use serde_json::{Value, json};

const VOCABULARY: i32 = 37;

/// A folder with a model and the stages that lead to the update.
struct Chain {
    folder: tempfile::TempDir,
    steps: Vec<Step>,
}

/// A number that looks random.
fn hash(parts: [i32; 4]) -> i32 {
    let mixed =
        parts.iter().fold(17_u64, |sum, &part| (sum ^ part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
    (mixed >> 33) as i32
}

fn runtime() -> Runtime {
    DeviceOptions { device: "cpu".to_owned(), dtype: "f32".to_owned(), threads: Some(1), deterministic: false }
        .resolve()
        .unwrap()
}

fn model(seed: u64) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": true,
    });
    let config: Config = serde_json::from_value(config).unwrap();
    Model::initialise(config, seed, &runtime()).unwrap()
}

fn save_model(dir: &Path, seed: u64) {
    let model = model(seed);
    fs_err::create_dir_all(dir).unwrap();
    model.config().save(dir).unwrap();
    model.save_weights(dir, runtime().kind).unwrap();
    fs_err::write(dir.join("tokenizer.json"), "{}").unwrap();
}

/// The steps of one trajectory: one to three.
fn steps(task: i32, index: i32) -> Vec<Step> {
    let ids = |count: i32, salt: i32| (0..count).map(|place| hash([task, index, salt, place]) % VOCABULARY).collect();
    let step = |step_index: i32| Step {
        task_id: format!("task-{task:02}"),
        trajectory_index: index,
        step_index,
        prompt_ids: ids(4 + hash([task, index, step_index, -1]) % 9, 10 + step_index),
        completion_ids: ids(3 + hash([task, index, step_index, -2]) % 7, 20 + step_index),
        sampling_logprobs: Vec::new(),
        segments: vec![Segment { kind: SegmentKind::Memory, start: 0, end: 2 }],
        completion: String::new(),
        observation: None,
        observation_ids: None,
        stop_reason: StopReason::Eos,
    };
    (0..=(task + index) % 3).map(step).collect()
}

fn score(model: &Model, steps: &[Step], temperature: f64) -> Vec<Vec<f32>> {
    let sequence = |step: &Step| ScoredSequence {
        ids: [step.prompt_ids.clone(), step.completion_ids.clone()].concat(),
        targets: step.prompt_ids.len()..step.prompt_ids.len() + step.completion_ids.len(),
    };
    let sequences: Vec<ScoredSequence> = steps.iter().map(sequence).collect();
    model.completion_logprobs(&sequences, &ScoreOptions { temperature, tokens_per_batch: 4096 }).unwrap()
}

impl Chain {
    /// `tasks` tasks of four trajectories each, sampled by the model at temperature 0.9.
    fn new(tasks: i32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        save_model(&folder.path().join("model"), 1);
        let mut rows: Vec<Step> =
            (0..tasks).flat_map(|task| (0..4).flat_map(move |index| steps(task, index))).collect();
        let sampled = score(&model(1), &rows, 0.9);
        for (row, logprobs) in rows.iter_mut().zip(sampled) {
            row.sampling_logprobs = logprobs;
        }
        let chain = Self { folder, steps: rows };
        chain.write_rollouts();
        chain.write_advantages("advantages", 1.0);
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, arguments: &Value, inputs: &[&Input], write: impl FnOnce(&Stage)) {
        let args = StageArgs { out: self.path(name), seed: 0, restart: true, shard: None };
        let stage = Stage::open("mempo-test", "fixture", &args, arguments, inputs).unwrap().unwrap();
        write(&stage);
        stage.finish(&[], json!({})).unwrap();
    }

    fn write_rollouts(&self) {
        self.write_rollouts_with(&json!({ "temperature": 0.9 }));
    }

    fn write_rollouts_with(&self, arguments: &Value) {
        let mut trajectories: Vec<Trajectory> = Vec::new();
        for rows in self.steps.chunk_by(|a, b| (&a.task_id, a.trajectory_index) == (&b.task_id, b.trajectory_index)) {
            let (first, count) = (&rows[0], rows.len() as i32);
            let failed = is_failed(first);
            trajectories.push(Trajectory {
                task_id: first.task_id.clone(),
                trajectory_index: first.trajectory_index,
                step_count: count,
                status: if failed { Status::ToolError } else { Status::Ok },
                answer: None,
                format_valid: true,
                exact_match: vec![0.0],
                f1: vec![0.0],
                reward: (!failed).then_some((first.trajectory_index % 2) as f32),
                generated_tokens: 1,
                processed_tokens: 20 * count,
                unique_tokens: 1,
                peak_tokens: 1,
                tool_calls: 0,
                error: None,
                policy: String::new(),
                seed: 0,
            });
        }
        let model = Input::model("model", &self.path("model")).unwrap();
        self.write("rollouts", arguments, &[&model], |stage| {
            write_part(stage, &trajectories);
            write_part(stage, &self.steps);
        });
    }

    fn rollouts(&self) -> Input {
        Input::stage("rollouts", &self.path("rollouts")).unwrap()
    }

    fn write_advantages(&self, name: &str, scale: f32) {
        let row = |step: &Step| Advantage {
            task_id: step.task_id.clone(),
            trajectory_index: step.trajectory_index,
            step_index: step.step_index,
            trajectory_advantage: scale * if step.trajectory_index % 2 == 1 { 0.9 } else { -0.9 },
            memory_advantage: (step.step_index > 0).then_some(0.5 * scale),
            memory_start: (step.step_index > 0).then_some(0),
            memory_end: (step.step_index > 0).then_some(2),
            loss_weight: 1.0,
        };
        let rows: Vec<Advantage> = self.steps.iter().filter(|step| !is_failed(step)).map(row).collect();
        self.write(name, &json!({ "scale": scale }), &[&self.rollouts()], |stage| write_part(stage, &rows));
    }

    fn write_logprobs(&self, name: &str, reference: Option<u64>) {
        let policy = score(&model(1), &self.steps, 0.9);
        let reference = reference.map(|seed| score(&model(seed), &self.steps, 0.9));
        let rows: Vec<Logprobs> = (0..self.steps.len())
            .map(|index| Logprobs {
                task_id: self.steps[index].task_id.clone(),
                trajectory_index: self.steps[index].trajectory_index,
                step_index: self.steps[index].step_index,
                policy_logprobs: policy[index].clone(),
                reference_logprobs: reference.as_ref().map(|all| all[index].clone()),
            })
            .collect();
        self.write(name, &json!({}), &[&self.rollouts()], |stage| write_part(stage, &rows));
    }

    /// The command line of an update from `model` to `out`.
    fn words(&self, model: &str, out: &str, more: &[&str]) -> Vec<String> {
        let mut words = vec!["mempo-rl".to_owned(), "train".to_owned()];
        for (flag, value) in [("rollouts", "rollouts"), ("advantages", "advantages"), ("model", model), ("out", out)] {
            words.extend([format!("--{flag}"), self.path(value).display().to_string()]);
        }
        let fixed = ["--device", "cpu", "--threads", "1", "--learning-rate", "1e-3", "--quiet"];
        words.extend(fixed.iter().chain(more).map(|&word| word.to_owned()));
        words
    }

    fn train(&self, model: &str, out: &str, more: &[&str]) -> anyhow::Result<()> {
        mempo_rl::run(mempo_rl::Arguments::parse_from(self.words(model, out, more)))
    }

    /// Exit code and words of an update that fails.
    fn failure(&self, model: &str, more: &[&str]) -> (u8, String) {
        let error = self.train(model, "failed", more).unwrap_err();
        (mempo_run::exit_code(&error), format!("{error:#}"))
    }

    fn metrics(&self, out: &str) -> Vec<Value> {
        let text = fs_err::read_to_string(self.path(out).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn bytes(&self, path: &str) -> Vec<u8> {
        fs_err::read(self.path(path)).unwrap()
    }
}

/// The tool failed in the last trajectory of every third task.
fn is_failed(step: &Step) -> bool {
    step.trajectory_index == 3 && step.task_id.ends_with(['0', '3', '6', '9'])
}

fn write_part<R: Row>(stage: &Stage, rows: &[R]) {
    stage.write_part(R::TABLE, 0, |file| Ok(write_rows(rows, file).map(drop)?)).unwrap();
}

fn manifest(dir: &Path) -> Manifest {
    Input::stage("out", dir).unwrap().manifest().unwrap().clone()
}

const NO_KL: [&str; 2] = ["--kl-coefficient", "0"];

#[test]
fn an_update_writes_a_model_and_says_what_it_did() {
    let chain = Chain::new(4);
    chain.write_logprobs("logprobs", Some(1));
    let logprobs = chain.path("logprobs").display().to_string();
    let more = ["--logprobs", &logprobs, "--trajectories-per-step", "5", "--dtype", "f32"];
    chain.train("model", "out", &[&more[..], &["--epochs", "2"]].concat()).unwrap();
    let metrics = chain.metrics("out");
    // 16 trajectories less two without reward, in steps of at most five.
    let trajectories: Vec<u64> = metrics.iter().map(|line| line["trajectories"].as_u64().unwrap()).collect();
    assert_eq!(trajectories, [4, 5, 5, 4, 5, 5]);
    let number = |line: usize, name: &str| metrics[line][name].as_f64().unwrap();
    assert!((number(0, "ratio_mean") - 1.0).abs() < 1e-5 && (number(0, "ratio_max") - 1.0).abs() < 1e-4);
    assert!(number(0, "kl").abs() < 1e-7 && number(5, "kl") > 1e-5);
    assert!(number(5, "ratio_max") > 1.001 && number(0, "gradient_norm") > 1e-3);
    let policy_tokens: usize =
        chain.steps.iter().filter(|step| !is_failed(step)).map(|step| step.completion_ids.len()).sum();
    let manifest = manifest(&chain.path("out"));
    assert_eq!(manifest.summary["policy_tokens"], 2 * policy_tokens);
    assert_eq!(manifest.summary["trajectories_without_reward"], 2);
    assert_eq!(manifest.summary["global_step"], 6);
    assert!(!chain.path("out/resume").exists());
    assert_eq!(chain.bytes("out/tokenizer.json"), b"{}");
    Model::load(&chain.path("out"), &runtime()).unwrap();
    chain.train("model", "out", &[&more[..], &["--epochs", "2"]].concat()).expect("a finished run is left as it is");
}

#[test]
fn rewarded_tokens_become_more_probable() {
    let chain = Chain::new(3);
    let more = ["--trajectories-per-step", "100", "--epochs", "8", "--dtype", "f32"];
    chain.train("model", "out", &[&more[..], &NO_KL].concat()).unwrap();
    let after = score(&Model::load(&chain.path("out"), &runtime()).unwrap(), &chain.steps, 0.9);
    let gain = |rewarded: bool| -> f32 {
        let chosen = chain
            .steps
            .iter()
            .zip(&after)
            .filter(|(step, _)| !is_failed(step) && (step.trajectory_index % 2 == 1) == rewarded);
        chosen.map(|(step, after)| after.iter().sum::<f32>() - step.sampling_logprobs.iter().sum::<f32>()).sum()
    };
    assert!(gain(true) > 1.0 && gain(false) < -1.0, "{} {}", gain(true), gain(false));
}

#[test]
fn two_chained_updates_equal_one_over_the_same_trajectories() {
    // Of one task and one trajectory, so that both epochs have one order.
    let mut chain = Chain::new(1);
    chain.steps.retain(|step| step.trajectory_index == 1);
    chain.write_rollouts();
    chain.write_advantages("advantages", 1.0);
    chain.train("model", "once", &[&NO_KL[..], &["--epochs", "2"]].concat()).unwrap();
    chain.train("model", "first", &NO_KL).unwrap();
    let off_policy = [&NO_KL[..], &["--off-policy"]].concat();
    chain.train("first", "second", &off_policy).unwrap();
    for file in ["model.safetensors", "trainer/master.safetensors", "trainer/second_moment.safetensors"] {
        assert!(chain.bytes(&format!("once/{file}")) == chain.bytes(&format!("second/{file}")), "{file}");
    }
    assert_eq!(chain.metrics("second")[0]["global_step"], 2);
    chain.train("first", "fresh", &[&off_policy[..], &["--fresh-optimizer"]].concat()).unwrap();
    assert_eq!(chain.metrics("fresh")[0]["global_step"], 1);

    // Weights that the state does not belong to.
    save_model(&chain.path("other"), 2);
    fs_err::rename(chain.path("first/trainer"), chain.path("other/trainer")).unwrap();
    let (code, message) = chain.failure("other", &off_policy);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("belongs to other weights") && message.contains("--fresh-optimizer"), "{message}");
}

#[test]
fn rollouts_of_another_policy_are_refused_unless_asked_for() {
    let chain = Chain::new(2);
    save_model(&chain.path("other"), 2);
    let (code, message) = chain.failure("other", &NO_KL);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("sampled from another checkpoint") && message.contains("--off-policy"), "{message}");

    let cut = json!({ "temperature": 0.9, "top_p": 0.95 });
    chain.write_rollouts_with(&cut);
    chain.write_advantages("advantages", 1.0);
    let restart = [&NO_KL[..], &["--restart"]].concat();
    let (code, message) = chain.failure("model", &restart);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("--top-p 0.95") && message.contains("--allow-cut-sampling"), "{message}");
    chain.train("model", "out", &[&NO_KL[..], &["--allow-cut-sampling"]].concat()).unwrap();
}

#[test]
fn an_update_that_does_not_begin_where_sampling_ended_is_stopped() {
    let chain = Chain::new(3);
    save_model(&chain.path("other"), 2);
    let check = [&NO_KL[..], &["--dtype", "f32", "--check-identity", "1e-5", "--trajectories-per-step", "8"]].concat();
    chain.train("model", "out", &check).unwrap();
    let (code, message) = chain.failure("other", &[&check[..], &["--off-policy"]].concat());
    assert_eq!(code, 3, "{message}");
    assert!(message.contains("--check-identity: before any update the ratio is"), "{message}");
}

#[test]
fn a_collapsed_policy_stops_the_training() {
    let mut chain = Chain::new(2);
    for (alarm, value, named) in [
        ("--alarm-truncated", "-1", "task-"),
        ("--alarm-entropy", "100", "optimizer step 1"),
        ("--alarm-length", "1000", "/step "),
        ("--alarm-memory-below", "2.1", "/step "),
        ("--alarm-memory-above", "1.9", "/step "),
    ] {
        let alarmed = format!("{alarm}={value}");
        let more = [&NO_KL[..], &["--restart", &alarmed]].concat();
        let (code, message) = chain.failure("model", &more);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains(alarm) && message.contains(named), "{message}");
    }
    let (key, repeated) = (chain.steps[2].task_id.clone(), vec![7; 60]);
    for step in &mut chain.steps {
        step.sampling_logprobs = vec![-1.0; repeated.len()];
        step.completion_ids.clone_from(&repeated);
    }
    chain.write_rollouts();
    chain.write_advantages("advantages", 1.0);
    let (code, message) = chain.failure("model", &[&NO_KL[..], &["--restart"]].concat());
    assert_eq!(code, 3, "{message}");
    assert!(message.contains("--alarm-repetition") && message.contains(&key), "{message}");
}

#[test]
fn every_loss_learns_what_is_rewarded() {
    let chain = Chain::new(3);
    for loss in ["gspo-step", "gspo-trajectory", "cispo", "reinforce"] {
        for aggregation in ["sequence-mean", "constant"] {
            let out = format!("{loss}-{aggregation}");
            let more = ["--loss", loss, "--aggregation", aggregation, "--loss-length", "20", "--epochs", "4"];
            let rest = ["--dtype", "f32", "--importance-cap", "2", "--entropy-coefficient", "0.001"];
            chain.train("model", &out, &[&NO_KL[..], &more, &rest].concat()).unwrap();
            let after = score(&Model::load(&chain.path(&out), &runtime()).unwrap(), &chain.steps, 0.9);
            let gains = chain.steps.iter().zip(&after).filter(|(step, _)| !is_failed(step)).map(|(step, after)| {
                let gain = after.iter().sum::<f32>() - step.sampling_logprobs.iter().sum::<f32>();
                if step.trajectory_index % 2 == 1 { gain } else { -gain }
            });
            assert!(gains.sum::<f32>() > 1.0, "{out}");
        }
    }
}

fn spawn(words: &[String]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_mempo-rl")).args(&words[1..]).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_run_continues_to_the_same_bytes() {
    let chain = Chain::new(6);
    let more = [&NO_KL[..], &["--trajectories-per-step", "2", "--epochs", "6", "--save-every", "3"]].concat();
    chain.train("model", "straight", &more).unwrap();
    let words = chain.words("model", "killed", &more);
    let progress = || fs_err::read_to_string(chain.path("killed/resume/progress.json")).unwrap_or_default();
    let mut kills = 0;
    while kills < 3 {
        let before = progress();
        let mut child = spawn(&words);
        while progress() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        if child.try_wait().unwrap().is_some() {
            break;
        }
        kills += 1;
        if kills < 3 {
            child.kill().unwrap();
            child.wait().unwrap();
            continue;
        }
        // Asked to stop, it saves what it has done since the last saved state.
        let id = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(75));
    }
    assert!(kills > 0 && !chain.path("killed/manifest.json").exists(), "the run ended before it was killed");
    assert!(spawn(&words).wait().unwrap().success());
    let files = |out: &str| manifest(&chain.path(out)).files;
    assert_eq!(files("killed"), files("straight"));
    assert_eq!(chain.metrics("killed").len(), 66);
}

#[test]
fn what_cannot_be_learned_from_is_refused_with_advice() {
    let mut chain = Chain::new(2);
    let (code, message) = chain.failure("model", &[]);
    assert_eq!(code, 2, "{message}");
    assert!(message.contains("mempo-score logprobs --rollouts") && message.contains("--kl-coefficient 0"), "{message}");
    chain.write_logprobs("logprobs", None);
    let logprobs = chain.path("logprobs").display().to_string();
    assert_eq!(chain.failure("model", &["--logprobs", &logprobs, "--restart"]).0, 2);
    assert_eq!(chain.failure("model", &["--dual-clip", "1", "--restart"]).0, 2);

    let advantages = chain.path("advantages");
    fs_err::rename(&advantages, chain.path("kept")).unwrap();
    chain.steps[3].sampling_logprobs.pop();
    let key = format!("{}/trajectory {}", chain.steps[3].task_id, chain.steps[3].trajectory_index);
    chain.write_rollouts();
    fs_err::rename(chain.path("kept"), &advantages).unwrap();
    let restart = [&NO_KL[..], &["--restart"]].concat();
    let (code, message) = chain.failure("model", &restart);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("advantages: not made from"), "{message}");

    chain.write_advantages("advantages", 1.0);
    let (code, message) = chain.failure("model", &restart);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("rollouts/steps") && message.contains(&key), "{message}");
    assert!(message.contains("sampling_logprobs has"), "{message}");
}

#[test]
fn adapters_go_from_iteration_to_iteration() {
    let chain = Chain::new(3);
    let lora = [&NO_KL[..], &["--dtype", "f32", "--lora-rank", "2"]].concat();
    chain.train("model", "one", &lora).unwrap();
    for file in ["model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"] {
        assert!(chain.path("one").join(file).is_file(), "{file}");
    }
    let off_policy = [&lora[..], &["--off-policy"]].concat();
    chain.train("one", "two", &off_policy).unwrap();
    let state = |name: &str| -> Value {
        let text = fs_err::read_to_string(chain.path(name).join("trainer/state.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let base = fs_err::canonicalize(chain.path("model")).unwrap();
    assert_eq!(state("one")["adapters"]["base"], json!(base));
    assert_eq!(state("two")["adapters"], state("one")["adapters"], "adapters of the first base");
    assert_eq!(state("two")["updates"].as_u64(), state("one")["updates"].as_u64().map(|updates| 2 * updates));

    mempo_run::thin(&chain.path("one"), |path| path == "trainer/master.safetensors").unwrap();
    chain.train("one", "two", &off_policy).unwrap();
    let (code, message) = chain.failure("one", &off_policy);
    assert!(code == 2 && message.contains("was removed to free disk; give --fresh-optimizer"), "{message}");
    chain.train("model", "one", &[&lora[..], &["--restart"]].concat()).unwrap();

    let (code, message) = chain.failure("one", &[&NO_KL[..], &["--off-policy", "--dtype", "f32"]].concat());
    assert!(code == 4 && message.contains("give the same --lora-rank"), "{message}");
    save_model(&chain.path("model"), 5);
    let (code, message) = chain.failure("one", &[&off_policy[..], &["--restart"]].concat());
    assert!(code == 4 && message.contains("one of them was replaced"), "{message}");
}
