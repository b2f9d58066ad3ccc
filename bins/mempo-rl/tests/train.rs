//! `mempo-rl train` on small made-up rollouts: joins, continuation after a kill, carried optimizer state.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the other test files use the rest")]
mod fixture;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fixture::{Chain, NO_KL, is_failed, manifest, runtime, save_model, score};
use mempo_model::Model;
use serde_json::{Value, json};

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
    let falling = [&NO_KL[..], &["--schedule", "linear", "--warmup-ratio", "0.5"]].concat();
    chain.train("model", "once", &[&falling[..], &["--epochs", "2"]].concat()).unwrap();
    let falling = [&falling[..], &["--schedule-steps", "2"]].concat();
    chain.train("model", "first", &falling).unwrap();
    chain.train("first", "second", &[&falling[..], &["--off-policy"]].concat()).unwrap();
    for file in ["model.safetensors", "trainer/master.safetensors", "trainer/second_moment.safetensors"] {
        assert!(chain.bytes(&format!("once/{file}")) == chain.bytes(&format!("second/{file}")), "{file}");
    }
    assert_eq!(chain.metrics("second")[0]["global_step"], 2);
    let off_policy = [&NO_KL[..], &["--off-policy"]].concat();
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
fn every_loss_learns_what_is_rewarded() {
    let chain = Chain::new(3);
    chain.write_logprobs("logprobs", None);
    let logprobs = chain.path("logprobs").display().to_string();
    for loss in ["gspo-step", "gspo-trajectory", "cispo", "reinforce"] {
        for aggregation in ["sequence-mean", "constant"] {
            let out = format!("{loss}-{aggregation}");
            let more = ["--loss", loss, "--aggregation", aggregation, "--loss-length", "20", "--epochs", "4"];
            let rest =
                ["--dtype", "f32", "--importance-cap", "2", "--entropy-coefficient", "0.001", "--logprobs", &logprobs];
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
    // States are saved within epochs of eleven steps, and at the end of epochs of three.
    for (per_step, epochs, steps) in [("2", "6", 66), ("8", "24", 72)] {
        kill_and_continue(&["--trajectories-per-step", per_step, "--epochs", epochs, "--save-every", "3"], steps);
    }
}

fn kill_and_continue(more: &[&str], steps: usize) {
    let chain = Chain::new(6);
    let more = [&NO_KL[..], more].concat();
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
    assert_eq!(chain.metrics("killed").len(), steps);
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
