//! What `mempo-rl train` refuses, and where it stops.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the other test files use the rest")]
mod fixture;

use fixture::{Chain, NO_KL, plain_advantage, save_model};
use serde_json::{Value, json};

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
    let check = [&NO_KL[..], &["--dtype", "f32", "--check-identity", "1e-5"]].concat();
    let one_by_one = [&check[..], &["--trajectories-per-step", "1", "--restart"]].concat();
    chain.train("model", "out", &check).unwrap();
    let (code, message) = chain.failure("other", &[&check[..], &["--off-policy"]].concat());
    assert_eq!(code, 3, "{message}");
    assert!(message.contains("--check-identity: before any update the ratio is"), "{message}");

    // The last trajectory of the plan as well as the first.
    let mut chain = chain;
    for step in chain.steps.iter_mut().rev().take(1) {
        step.sampling_logprobs[0] -= 0.1;
    }
    chain.write_rollouts();
    chain.write_advantages("advantages", 1.0);
    let (code, message) = chain.failure("model", &one_by_one);
    assert!(code == 3 && message.contains("--check-identity"), "{message}");
}

#[test]
fn a_reward_that_counts_as_zero_is_learned_from() {
    let chain = Chain::new(2);
    let all = |arguments: &Value| {
        chain.write_advantages_by("advantages", arguments, |step| Some(plain_advantage(step)));
        chain.train("model", "zero", &[&NO_KL[..], &["--restart"]].concat())
    };
    let error = all(&json!({})).unwrap_err();
    assert!(format!("{error:#}").contains("has advantages, but its trajectory has no reward"), "{error:#}");
    all(&json!({ "null_rewards": "zero" })).unwrap();
    let metrics = chain.metrics("zero");
    assert_eq!((&metrics[0]["trajectories"], &metrics[0]["reward_mean"]), (&json!(8), &json!(3.0 / 8.0)));
}

#[test]
fn an_update_that_was_left_out_is_named_and_must_be_allowed() {
    let chain = Chain::new(2);
    chain.write_advantages_by("advantages", &json!({}), |step| {
        let is_huge = step.task_id == "task-01" && step.trajectory_index == 2;
        Some(if is_huge { f32::MAX } else { plain_advantage(step) }).filter(|_| step.trajectory_index < 3)
    });
    let more = [&NO_KL[..], &["--trajectories-per-step", "1", "--dtype", "f32"]].concat();
    let (code, message) = chain.failure("model", &more);
    assert!(
        code == 3 && message.contains("1 of 6 optimizer steps") && message.contains("--allow-skipped"),
        "{message}"
    );
    assert!(!chain.path("failed/manifest.json").exists() && !chain.path("failed/model.safetensors").exists());
    chain.train("model", "failed", &[&more[..], &["--allow-skipped"]].concat()).unwrap();
    let skipped = chain.metrics("failed").iter().filter(|line| line["skipped"] == true).count();
    assert_eq!((chain.metrics("failed").len(), skipped), (6, 1));
}

#[test]
fn options_that_say_nothing_together_are_refused() {
    let chain = Chain::new(1);
    for (more, told) in [(&["--kl", "k1", "--kl-ratio"][..], "--kl-ratio"), (&["--importance-cap", "2"], "--logprobs")]
    {
        let (code, message) = chain.failure("model", &[&NO_KL[..], more].concat());
        assert!(code == 2 && message.contains(told), "{message}");
    }
    chain.train("model", "first", &NO_KL).unwrap();
    let more = ["--off-policy", "--schedule", "linear", "--schedule-steps", "1"];
    let (code, message) = chain.failure("first", &[&NO_KL[..], &more].concat());
    assert!(code == 2 && message.contains("--schedule-steps 1: this run ends with optimizer step 2"), "{message}");
}

#[test]
fn a_collapsed_policy_stops_the_training() {
    let mut chain = Chain::new(2);
    for (alarm, value, named) in [
        ("--alarm-truncated", "-1", "task-"),
        ("--alarm-entropy", "100", "most in task-"),
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
    let (_, message) = chain.failure("model", &[&NO_KL[..], &["--restart", "--alarm-entropy=100"]].concat());
    assert!(message.contains("optimizer step 1: --alarm-entropy"), "{message}");
    assert_eq!(chain.metrics("failed").len(), 1, "what the step did is on record");
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
