//! A small world, people and the colours they like, and the command lines that make a policy of it.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::root;

const COLOURS: [&str; 6] = ["red", "green", "blue", "white", "black", "pink"];
const NAMES: [&str; 12] = ["Ana", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jo", "Kim", "Leo"];

fn colour(person: usize) -> &'static str {
    COLOURS[(person * 5 + 1) % COLOURS.len()]
}

fn name(person: usize) -> String {
    let (name, family) = (NAMES[person % NAMES.len()], person / NAMES.len());
    if family == 0 { name.to_owned() } else { format!("{name} {family}") }
}

fn question(person: usize) -> String {
    format!("What colour does {} like?", name(person))
}

fn write(directory: &Path, name: &str, lines: &[Value]) -> std::io::Result<()> {
    let mut text = String::new();
    for line in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    }
    fs_err::write(directory.join(name), text)
}

/// A perfect attempt at two questions, as chat messages.
fn demonstration(first: usize, second: usize) -> Value {
    let call = |person: usize| {
        json!([{"type": "function", "function": {"name": "search",
            "arguments": json!({"query": format!("colour {}", name(person))}).to_string()}}])
    };
    let found = |person: usize| format!("Doc 1(Title: {0}) {0} likes {1}.", name(person), colour(person));
    let fact = |person: usize| format!("{} = {}", name(person), colour(person));
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

/// Writes `corpus.jsonl`, `questions.jsonl`, `expert.jsonl` (some 130 attempts) and `config.json` about that many people.
pub fn write_inputs(directory: &Path, people: usize) {
    let document =
        |p| json!({"id": format!("doc-{p:02}"), "title": name(p), "text": format!("{} likes {}.", name(p), colour(p))});
    let question = |p| {
        json!({"id": format!("q{p}"), "question": question(p), "golden_answers": [colour(p)], "source": "colours",
            "doc_ids": [format!("doc-{p:02}")]})
    };
    let pairs = (0..people).flat_map(|a| (1..=132 / people).map(move |b| (a, (a + b) % people)));
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600,
        "max_position_embeddings": 1024, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": true, "initializer_range": 0.05, "torch_dtype": "float32"
    });
    let written = [
        write(directory, "corpus.jsonl", &(0..people).map(document).collect::<Vec<_>>()),
        write(directory, "questions.jsonl", &(0..people).map(question).collect::<Vec<_>>()),
        write(directory, "expert.jsonl", &pairs.map(|(a, b)| demonstration(a, b)).collect::<Vec<_>>()),
        fs_err::write(directory.join("config.json"), config.to_string()),
    ];
    written.into_iter().collect::<std::io::Result<()>>().expect("the folder can be written");
}

/// One line a stage, as a user would type them.
pub const STAGES: &[&str] = &[
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

/// What else there is where documents are read chunk by chunk: by a model that has learnt nothing, since what is passed on is
/// the same.
pub const READING: &[&str] = &[
    "mempo-sft init --config config.json --corpus expert.jsonl corpus.jsonl --vocabulary-size 600 --out base",
    "mempo-rollout compose --document --questions questions.jsonl --documents corpus.jsonl --tokenizer base --objectives 2 \
     --document-tokens 120 240 --max-tasks 6 --out tasks",
    "mempo-rollout sample --tasks tasks --model base --context memagent --chunk-tokens 60 --group-size 4 \
     --max-completion-tokens 10 --reward sub-exact-match --dtype f32 --device cpu --out rollouts",
    "mempo-score segments --rollouts rollouts --tasks tasks --model base --bias previous-memory --dtype f32 --device cpu \
     --out scores",
    "mempo-score logprobs --rollouts rollouts --model base --reference base --dtype f32 --device cpu --out logprobs",
    "mempo-score advantages --rollouts rollouts --scores scores --estimator memagent-slime --out advantages",
    "mempo-rl train --rollouts rollouts --advantages advantages --logprobs logprobs --model base --dtype f32 \
     --device cpu --aggregation token-mean --trajectories-per-step 24 --out policy",
    "mempo-sft build --trajectories rollouts --tokenizer base --context memagent --keep all --out examples",
];

/// The same stages in many small units, about 40 people: quick, and with much between start and end that can go wrong.
pub const SMALL_UNITS: &[&str] = &[
    "mempo-rollout compose --questions questions.jsonl --objectives 1 --out tasks",
    "mempo-rollout index --corpus corpus.jsonl --out index",
    "mempo-sft init --config config.json --corpus expert.jsonl corpus.jsonl --vocabulary-size 600 --out base",
    "mempo-sft build --trajectories expert.jsonl --tokenizer base --profile PROFILE --out examples",
    "mempo-sft train --examples examples --model base --epochs 2 --save-every 3 --learning-rate 3e-3 \
     --tokens-per-batch 8192 --threads 1 --dtype f32 --device cpu --out sft",
    "mempo-rollout sample --tasks tasks --model sft --search index --profile PROFILE --group-size 2 --tasks-per-unit 5 \
     --max-completion-tokens 24 --max-steps 2 --max-error-rate 1 --threads 1 --dtype f32 --device cpu --out rollouts",
    "mempo-score segments --rollouts rollouts --tasks tasks --model sft --threads 1 --dtype f32 --device cpu --out scores",
    "mempo-score logprobs --rollouts rollouts --model sft --reference sft --threads 1 --dtype f32 --device cpu --out logprobs",
    "mempo-score advantages --rollouts rollouts --scores scores --out advantages",
    "mempo-rl train --rollouts rollouts --advantages advantages --logprobs logprobs --model sft --dtype f32 \
     --device cpu --threads 1 --epochs 2 --trajectories-per-step 16 --save-every 3 --out policy",
    "mempo-rollout compose --document --questions questions.jsonl --documents corpus.jsonl --tokenizer base --objectives 2 \
     --document-tokens 120 240 --out documents",
    "mempo-rollout sample --tasks documents --model sft --context memagent --chunk-tokens 60 --group-size 2 --tasks-per-unit 7 \
     --max-completion-tokens 10 --threads 1 --dtype f32 --device cpu --out readings",
];

/// A stage's command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// The whole line.
    pub line: String,
    /// What it does: `rollout sample`, or `rollout sample, document`.
    pub name: String,
    /// The folder that it writes.
    pub out: String,
}

impl Stage {
    /// The line with another output folder.
    pub fn with_out(&self, out: &str) -> String {
        self.line.replace(&format!("--out {}", self.out), &format!("--out {out}"))
    }
}

/// The stages of such lines, the profile filled in.
pub fn stages(lines: &[&str]) -> Vec<Stage> {
    let profile = root().join("pipelines/demo/profiles/mempo").display().to_string();
    let stage = |line: &&str| {
        let line = line.replace("PROFILE", &profile);
        let words: Vec<&str> = line.split_whitespace().collect();
        let (program, command) = (words[0].trim_start_matches("mempo-"), words[1]);
        let reads = line.contains("--document ") || line.contains("--context memagent");
        let name = format!("{program} {command}{}", if reads { ", document" } else { "" });
        Stage { name, out: words[words.len() - 1].to_owned(), line: line.clone() }
    };
    lines.iter().map(stage).collect()
}
