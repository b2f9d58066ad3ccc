//! The whole chain on a tiny model: from facts to a policy updated by reinforcement learning, by the programs alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::path::Path;

use mempo_tests::{root, run};
use serde_json::{Value, json};

const COLOURS: [&str; 6] = ["red", "green", "blue", "white", "black", "pink"];
const NAMES: [&str; 12] = ["Ana", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jo", "Kim", "Leo"];

fn colour(person: usize) -> &'static str {
    COLOURS[(person * 5 + 1) % COLOURS.len()]
}

fn write(directory: &Path, name: &str, lines: &[Value]) {
    let mut text = String::new();
    for line in lines {
        writeln!(text, "{line}").unwrap();
    }
    fs_err::write(directory.join(name), text).unwrap();
}

fn question(person: usize) -> String {
    format!("What colour does {} like?", NAMES[person])
}

/// A perfect attempt at two questions, as chat messages.
fn demonstration(first: usize, second: usize) -> Value {
    let call = |person: usize| {
        json!([{"type": "function", "function": {"name": "search",
            "arguments": json!({"query": format!("colour {}", NAMES[person])}).to_string()}}])
    };
    let found = |person: usize| format!("Doc 1(Title: {0}) {0} likes {1}.", NAMES[person], colour(person));
    let fact = |person: usize| format!("{} = {}", NAMES[person], colour(person));
    let id = format!("demo-{first}-{second}");
    json!({"id": id, "task_id": id, "split": "train", "messages": [
        {"role": "user", "content": format!("{}; {}", question(first), question(second))},
        {"role": "assistant", "content": "<mem></mem><think>first</think>", "tool_calls": call(first)},
        {"role": "tool", "content": found(first)},
        {"role": "assistant", "content": format!("<mem>{}</mem><think>second</think>", fact(first)), "tool_calls": call(second)},
        {"role": "tool", "content": found(second)},
        {"role": "assistant", "content": format!("<mem>{}; {}</mem><answer>{}; {}</answer>",
            fact(first), fact(second), colour(first), colour(second))},
    ]})
}

fn write_inputs(directory: &Path) {
    let people = 0..NAMES.len();
    let corpus: Vec<Value> = people
        .clone()
        .map(|p| json!({"id": format!("doc-{p:02}"), "title": NAMES[p], "text": format!("{} likes {}.", NAMES[p], colour(p))}))
        .collect();
    let questions: Vec<Value> = people
        .clone()
        .map(|p| json!({"id": format!("q{p}"), "question": question(p), "golden_answers": [colour(p)], "source": "colours"}))
        .collect();
    let pairs = people.clone().flat_map(|a| people.clone().map(move |b| (a, b))).filter(|(a, b)| a != b);
    write(directory, "corpus.jsonl", &corpus);
    write(directory, "questions.jsonl", &questions);
    write(directory, "expert.jsonl", &pairs.map(|(a, b)| demonstration(a, b)).collect::<Vec<_>>());
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600,
        "max_position_embeddings": 1024, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": true, "initializer_range": 0.05, "torch_dtype": "float32"
    });
    fs_err::write(directory.join("config.json"), config.to_string()).unwrap();
}

fn manifest(directory: &Path, stage: &str) -> Value {
    let text = fs_err::read_to_string(directory.join(stage).join("manifest.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn metrics(directory: &Path, stage: &str) -> Vec<Value> {
    let text = fs_err::read_to_string(directory.join(stage).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// One line a stage, as a user would type them.
const STAGES: &[&str] = &[
    "mempo-rollout compose --questions questions.jsonl --objectives 2 --out tasks",
    "mempo-rollout index --corpus corpus.jsonl --out index",
    "mempo-sft init --config config.json --corpus expert.jsonl corpus.jsonl --vocabulary-size 600 --out base",
    "mempo-sft build --trajectories expert.jsonl --tokenizer base --profile PROFILE --out examples",
    "mempo-sft train --examples examples --model base --epochs 8 --learning-rate 3e-3 --tokens-per-batch 8192 \
     --dtype f32 --device cpu --out sft",
    "mempo-rollout sample --tasks tasks --model sft --search index --profile PROFILE --group-size 4 --max-completion-tokens 96 \
     --max-steps 4 --dtype f32 --device cpu --out rollouts",
    "mempo-score segments --rollouts rollouts --tasks tasks --model sft --dtype f32 --device cpu --out scores",
    "mempo-score logprobs --rollouts rollouts --model sft --reference sft --dtype f32 --device cpu --out logprobs",
    "mempo-score advantages --rollouts rollouts --scores scores --out advantages",
    "mempo-rl train --rollouts rollouts --advantages advantages --logprobs logprobs --model sft --dtype f32 \
     --device cpu --trajectories-per-step 12 --out policy",
];

#[test]
fn every_stage_runs_and_hands_on_what_the_next_one_needs() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    let profile = root().join("pipelines/demo/profiles/mempo").display().to_string();
    let stages: Vec<String> = STAGES.iter().map(|line| line.replace("PROFILE", &profile)).collect();
    for stage in &stages {
        run(directory, stage, 0);
    }

    let losses: Vec<f64> = metrics(directory, "sft").iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert!(losses.last().unwrap() < &(losses[0] / 2.0), "SFT did not learn: {losses:?}");

    // Same weights, same ids: what was sampled, what is scored and what is trained agree.
    let update = metrics(directory, "policy");
    assert!((update[0]["ratio_mean"].as_f64().unwrap() - 1.0).abs() < 1e-4, "{}", update[0]);
    assert!(update[0]["kl"].as_f64().unwrap().abs() < 1e-6, "{}", update[0]);

    run(directory, "mempo-score evaluate --rollouts rollouts --json", 0);
    for stage in ["tasks", "index", "base", "examples", "sft", "rollouts", "scores", "logprobs", "advantages", "policy"]
    {
        run(directory, &format!("mempo-score verify {stage}"), 0);
    }

    let before = manifest(directory, "rollouts");
    run(directory, &stages[5], 0);
    assert_eq!(before, manifest(directory, "rollouts"), "a finished stage is left as it is");
    run(directory, &format!("{} --seed 7", stages[5]), 2);
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    fs_err::write(
        directory.join("broken.jsonl"),
        "{\"question\": \"Who?\", \"golden_answers\": [\"x\"]}\n{\"question\": \n",
    )
    .unwrap();
    fs_err::write(directory.join("empty.jsonl"), "").unwrap();
    let cases = [
        ("mempo-rollout compose --questions broken.jsonl --objectives 1 --out bad", "broken.jsonl:2"),
        ("mempo-rollout compose --questions missing.jsonl --objectives 1 --out bad", "missing.jsonl"),
        ("mempo-rollout index --corpus empty.jsonl --out bad", "empty.jsonl"),
        ("mempo-sft build --trajectories questions.jsonl --tokenizer missing --out bad", "missing"),
        ("mempo-score logprobs --rollouts missing --model missing --out bad", "missing"),
    ];
    for (line, named) in cases {
        let output = run(directory, line, 4);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(named), "`{line}` does not name {named}:\n{text}");
        assert!(!directory.join("bad/manifest.json").exists());
    }
}
