//! The subcommands on a tiny random model, through the program's own `run`.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]

mod program;

use std::path::{Path, PathBuf};

use mempo_data::{Document, Row, Status, Step, StopReason, Task, Trajectory, read_rows};
use mempo_model::{Config, DeviceOptions, Model, ScoreOptions, ScoredSequence};
use mempo_text::{NewTokenizer, Tokenizer, train_tokenizer};
use serde_json::{Value, json};

use program::{fails, run, write_lines};

fn parts(directory: &Path, table: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs_err::read_dir(directory.join(table)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn table<R: Row>(directory: &Path, stage: &str) -> Vec<R> {
    read_rows(&parts(&directory.join(stage), R::TABLE)).unwrap().map(Result::unwrap).collect()
}

fn bytes(directory: &Path) -> Vec<Vec<u8>> {
    let files = ["steps", "trajectories"].into_iter().flat_map(|table| parts(directory, table));
    files.map(|file| fs_err::read(file).unwrap()).collect()
}

fn manifest(directory: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(directory.join("manifest.json")).unwrap()).unwrap()
}

fn write_inputs(directory: &Path) {
    let questions: Vec<Value> = (0..11)
        .map(|i| json!({"question": format!("Where is city {i}"), "answer": format!("land {i}"), "source": "cities"}))
        .collect();
    write_lines(&directory.join("questions.jsonl"), &questions);
    let corpus: Vec<Value> =
        (0..5).rev().map(|i| json!({"id": i, "contents": format!("\"City {i}\"\nCity {i} is in land {i}.")})).collect();
    write_lines(&directory.join("corpus.jsonl"), &corpus);
}

fn write_model(directory: &Path) {
    let model = directory.join("model");
    let text =
        "Where is city 1?; land 2 <mem></mem><think><answer></answer><tool_call>{\"name\": \"search\"}</tool_call>";
    train_tokenizer(std::iter::repeat_n(text.to_owned(), 3), &NewTokenizer::of_size(300), &model).unwrap();
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": true, "initializer_range": 0.3, "torch_dtype": "float32"
    });
    fs_err::write(model.join("config.json"), config.to_string()).unwrap();
    let runtime = device().resolve().unwrap();
    let random = Model::initialise(Config::load(&model).unwrap(), 5, &runtime).unwrap();
    random.save_weights(&model, runtime.kind).unwrap();
}

fn device() -> DeviceOptions {
    DeviceOptions { device: "cpu".to_owned(), dtype: "f32".to_owned(), threads: Some(1), deterministic: false }
}

const SAMPLE: &str = "sample --tasks @tasks --model @model --search @index --group-size 3 --tasks-per-unit 2 \
     --max-completion-tokens 24 --max-steps 3 --device cpu --dtype f32 --threads 1";

#[test]
fn questions_and_documents_become_tasks_index_and_rollouts() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    write_model(directory);
    run(directory, "compose --questions @questions.jsonl --objectives 2 --out @tasks").unwrap();
    run(directory, "index --corpus @corpus.jsonl --out @index").unwrap();
    for stage in ["tasks", "index"] {
        run(directory, &format!("verify @{stage}")).unwrap();
    }
    let tasks: Vec<Task> = table(directory, "tasks");
    assert_eq!(tasks.len(), 5, "the eleventh question is left over");
    assert_eq!(tasks[1].question, "Where is city 2?; Where is city 3?");
    assert_eq!((tasks[1].source.as_str(), tasks[1].split.as_str()), ("cities", "train"));
    let documents: Vec<Document> = table(directory, "index");
    assert_eq!(
        documents[0],
        Document { doc_id: "0".into(), title: "City 0".into(), text: "City 0 is in land 0.".into() }
    );

    run(directory, &format!("{SAMPLE} --out @rollouts")).unwrap();
    check_rollouts(directory, &tasks);
    run(directory, "show @rollouts --row 2 -n 1").unwrap();
    run(directory, "show @rollouts --where reward=0").unwrap();
    assert_eq!(fails(directory, "show @rollouts --where colour=red").0, 2);
    check_resume(directory);
    check_shards(directory);
    check_stop_strings(directory);
}

fn check_rollouts(directory: &Path, tasks: &[Task]) {
    let trajectories: Vec<Trajectory> = table(directory, "rollouts");
    let steps: Vec<Step> = table(directory, "rollouts");
    let group = |task: &Task| (0..3).map(|index| (task.task_id.clone(), index)).collect::<Vec<_>>();
    let expected: Vec<(String, i32)> = tasks.iter().flat_map(group).collect();
    let keys: Vec<(String, i32)> = trajectories.iter().map(|row| (row.task_id.clone(), row.trajectory_index)).collect();
    assert_eq!(keys, expected);
    assert!(trajectories.iter().all(|row| row.status.is_policy() && row.reward == Some(0.0)));
    assert!(trajectories.iter().any(|row| row.status == Status::Truncated), "24 random tokens rarely end a turn");

    let model = Model::load(&directory.join("model"), &device().resolve().unwrap()).unwrap();
    let tokenizer = Tokenizer::load(&directory.join("model")).unwrap();
    let ends = tokenizer.end_of_turn_ids();
    let mut texts = std::collections::HashSet::new();
    for step in &steps {
        let ids = [step.prompt_ids.clone(), step.completion_ids.clone()].concat();
        let sequence = ScoredSequence { targets: step.prompt_ids.len()..ids.len(), ids };
        let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 4096 };
        let scored = model.completion_logprobs(&[sequence], &options).unwrap().remove(0);
        assert_eq!(scored.len(), step.sampling_logprobs.len());
        for (scored, sampled) in scored.iter().zip(&step.sampling_logprobs) {
            assert!((scored - sampled).abs() < 1e-4, "sampled {sampled}, scored {scored}");
        }
        let allowed = |id: &i32| {
            (*id as usize) < tokenizer.vocabulary_size() && (ends.contains(id) || !tokenizer.control_ids().contains(id))
        };
        assert!(step.completion_ids.iter().all(allowed), "{:?}", step.completion_ids);
        assert_eq!(step.completion, tokenizer.decode(&step.completion_ids));
        texts.insert(step.completion.clone());
    }
    assert_eq!(texts.len(), steps.len(), "every model call draws its own numbers");
    let manifest = manifest(&directory.join("rollouts"));
    let arguments = &manifest["arguments"];
    assert_eq!((&arguments["context"], &arguments["profile"]), (&json!("mempo"), &json!("mempo")));
    assert_eq!((&arguments["temperature"], &arguments["group_size"]), (&json!(1.0), &json!(3)));
    assert_eq!(arguments["max_prompt_tokens"], json!(2048 - 24), "what the model has room for");
    let logprobs = json!({"of": "policy", "temperature": 1.0, "engine": "local"});
    assert_eq!(manifest["summary"]["logprobs"], logprobs);
}

/// A run that lost a unit and its commit gives the same bytes again; other arguments are refused.
fn check_resume(directory: &Path) {
    let rollouts = directory.join("rollouts");
    let before = (bytes(&rollouts), manifest(&rollouts)["summary"].clone());
    for file in ["manifest.json", "trajectories/part-00001.parquet"] {
        fs_err::remove_file(rollouts.join(file)).unwrap();
    }
    run(directory, &format!("{SAMPLE} --out @rollouts")).unwrap();
    assert_eq!((bytes(&rollouts), manifest(&rollouts)["summary"].clone()), before);
    run(directory, &format!("{SAMPLE} --out @rollouts")).unwrap();
    let (code, text) = fails(directory, &format!("{SAMPLE} --out @rollouts --temperature 0.5"));
    assert!(code == 2 && text.contains("temperature"), "{code}: {text}");
}

/// Shards give the rows of the whole.
fn check_shards(directory: &Path) {
    for shard in ["0/2", "1/2"] {
        run(directory, &format!("{SAMPLE} --out @sharded --shard {shard}")).unwrap();
    }
    let shards = ["sharded/shard-0-of-2", "sharded/shard-1-of-2"];
    let rows: Vec<Step> = shards.into_iter().flat_map(|shard| table(directory, shard)).collect();
    assert_eq!(rows, table::<Step>(directory, "rollouts"));
}

/// With a profile of one's own: a completion ends with the token that completes a stop string, and only there.
fn check_stop_strings(directory: &Path) {
    let profile = directory.join("terse");
    fs_err::create_dir(&profile).unwrap();
    fs_err::write(profile.join("system.txt"), "Answer.").unwrap();
    let rules = json!({"name": "terse", "user": "{question}", "stop": ["e", "</answer>"], "memory": "absent",
        "observation": "{results}", "document": "{text}"});
    fs_err::write(profile.join("profile.json"), rules.to_string()).unwrap();
    run(directory, &format!("{SAMPLE} --context react --profile @terse --out @terse-rollouts")).unwrap();
    let steps: Vec<Step> = table(directory, "terse-rollouts");
    let tokenizer = Tokenizer::load(&directory.join("model")).unwrap();
    let stopped = steps.iter().filter(|step| step.stop_reason == StopReason::StopString);
    assert!(stopped.clone().count() > 3);
    for step in stopped {
        let holding = step.completion_ids.iter().map(|id| tokenizer.token_bytes(*id).contains(&b'e'));
        assert_eq!(holding.clone().position(|holds| holds), Some(step.completion_ids.len() - 1));
    }
    assert!(steps.iter().all(|step| step.stop_reason != StopReason::MaxTokens || !step.completion.contains('e')));
}

#[test]
fn a_task_without_a_document_is_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    write_model(directory);
    run(directory, "compose --questions @questions.jsonl --out @tasks").unwrap();
    for context in ["memagent --chunk-tokens 16", "full-document"] {
        let line = format!(
            "sample --tasks @tasks --model @model --context {context} --max-completion-tokens 24 --device cpu --dtype f32 \
             --threads 1 --out @out"
        );
        let (code, text) = fails(directory, &line);
        assert!(code == 4 && text.contains("has no document"), "{line}: {code}: {text}");
        assert!(!directory.join("out").exists(), "{line}");
    }
}

#[test]
fn bad_input_is_refused_by_name_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    let file = |name: &str, text: &str| fs_err::write(directory.join(name), text).unwrap();
    file("cut.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\":");
    file("bare.jsonl", "{\"question\": \"a\"}");
    file("empty.jsonl", "");
    file("twice.jsonl", "{\"id\": 1, \"title\": \"\", \"text\": \"\"}\n{\"id\": 1, \"title\": \"\", \"text\": \"\"}");
    for (line, told) in [
        ("compose --questions @cut.jsonl --out @out", "cut.jsonl:2"),
        ("compose --questions @bare.jsonl --out @out", "bare.jsonl:1"),
        ("compose --questions @empty.jsonl --out @out", "empty.jsonl"),
        ("compose --questions @absent.jsonl --out @out", "absent.jsonl"),
        ("compose --questions @questions.jsonl --objectives 12 --out @out", "no task of 12"),
        ("index --corpus @empty.jsonl --out @out", "empty.jsonl"),
        ("index --corpus @twice.jsonl --out @out", "`1`"),
        ("index --corpus @questions.jsonl --out @out", "questions.jsonl:1"),
        ("sample --tasks @absent --model @absent --search @absent --out @out", "absent"),
        ("show @absent", "absent"),
    ] {
        let (code, text) = fails(directory, line);
        assert!(code == 4 && text.contains(told), "{line}: {code}: {text}");
        // `index` finds out at work, and takes back what it has begun.
        assert!(!directory.join("out/run.json").exists(), "{line}");
    }
}
