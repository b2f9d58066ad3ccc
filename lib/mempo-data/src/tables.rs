//! The columns of every table: name, type, unit, null?, meaning. `schemas/` is written from here.

use std::sync::LazyLock;

use arrow::datatypes::DataType::{Boolean, Float32, Float64, Int32, UInt64, Utf8};

use crate::{
    Column,
    schema::{list, structure},
};

/// The names of all tables, in the order in which the stages make them.
pub const TABLES: &[&str] = &[
    "tasks",
    "trajectories",
    "steps",
    "queries",
    "scores",
    "contexts",
    "logprobs",
    "advantages",
    "sft_examples",
    "corpus",
];

/// The columns of a table, in the order in which they stand in its files; `None` if there is no such table.
pub fn columns(table: &str) -> Option<&'static [Column]> {
    static COLUMNS: LazyLock<Vec<Vec<Column>>> = LazyLock::new(|| {
        vec![
            tasks(),
            trajectories(),
            steps(),
            queries(),
            scores(),
            contexts(),
            logprobs(),
            advantages(),
            sft_examples(),
            corpus(),
        ]
    });
    let position = TABLES.iter().position(|&name| name == table)?;
    Some(&COLUMNS[position])
}

/// One paragraph on what a table is.
pub(crate) fn about(table: &str) -> &'static str {
    match table {
        "tasks" => "Questions to work on: one row a task, sorted by `task_id`.",
        "trajectories" => {
            "One row an attempt at a task, sorted by `(task_id, trajectory_index)`. All rows of one task are a group. \
             How it was sampled (temperature, context policy, limits) is in the manifest beside the table."
        }
        "steps" => {
            "One row a model call and what came back, sorted by `(task_id, trajectory_index, step_index)`. \
             Token ids are as sampled and never re-tokenised; texts are derived from them."
        }
        "queries" => {
            "What a remote search answered: one row a distinct query of a unit (one part a unit), sorted by \
             `(query, top_k)` within the part. `sample --search` replays them."
        }
        "scores" => {
            "How probable the gold answer is given a memory: one row a memory segment that counts, sorted by \
             `(task_id, trajectory_index, step_index)`. A context past the model's window gives null columns."
        }
        "contexts" => {
            "Exactly what was scored, to recompute it with another tool (`--explain`): one or two rows a score, sorted \
             by `(task_id, trajectory_index, step_index)`."
        }
        "logprobs" => {
            "Log-probabilities of every step's completion, one row a step, sorted by \
             `(task_id, trajectory_index, step_index)`."
        }
        "advantages" => {
            "What the update needs of a step, one row a step, sorted by `(task_id, trajectory_index, step_index)`. \
             Trajectories with a null reward have no rows."
        }
        "sft_examples" => "Supervised training sequences, one row each, sorted by `example_id`.",
        "corpus" => {
            "Documents, one row each, sorted by `doc_id`: those to search; beside `tasks`, the long ones that tasks are \
             about, a file each."
        }
        _ => "",
    }
}

/// The key columns of everything sampled.
fn step_key() -> Vec<Column> {
    vec![
        Column::new("task_id", Utf8, "", "The task attempted."),
        Column::new("trajectory_index", Int32, "", "Position in the task's group, from 0."),
        Column::new("step_index", Int32, "", "Position in the trajectory, from 0."),
    ]
}

fn tasks() -> Vec<Column> {
    let objective = structure(&[("question", Utf8), ("answers", list(Utf8))]);
    vec![
        Column::new("task_id", Utf8, "", "Unique name."),
        Column::new("source", Utf8, "", "Name of the dataset the task comes from."),
        Column::new("split", Utf8, "", "`train`, `dev` or `test`."),
        Column::new(
            "question",
            Utf8,
            "",
            "Text shown to the agent; n questions are joined by `; `, each ending in `?`.",
        ),
        Column::new(
            "objectives",
            list(objective),
            "",
            "Gold answers, one entry an objective: its question alone, and the accepted answers, of which the first is \
             canonical and the rest are aliases.",
        ),
        Column::new("document", Utf8, "", "The long text to read; null for search tasks.").nullable(),
        Column::new(
            "document_ref",
            Utf8,
            "",
            "Instead of `document` where that is large: `file#doc_id`, the row of that id in a corpus table; the file is \
             named from the tasks' directory (`corpus/part-00012.parquet#NAME`) and lies inside it.",
        )
        .nullable(),
        Column::new("metadata", Utf8, "", "JSON, carried through unchanged.").nullable(),
    ]
}

fn trajectories() -> Vec<Column> {
    let mut columns = step_key();
    columns.truncate(2);
    columns.extend([
        Column::new("step_count", Int32, "steps", "Model calls made."),
        Column::new(
            "status",
            Utf8,
            "",
            "How it ended. The policy's own: `ok`, `max_steps`, `truncated`, `parse_error`. Not the policy's: \
             `tool_error`, `engine_error`, `timeout`.",
        ),
        Column::new("answer", Utf8, "", "Text inside `<answer>`; null without one.").nullable(),
        Column::new(
            "format_valid",
            Boolean,
            "",
            "Tags right, exactly one `<mem>` from the second step on, no more answers than objectives.",
        ),
        Column::new("exact_match", list(Float32), "0 or 1", "One per objective, by position; a missing answer is 0."),
        Column::new("f1", list(Float32), "0 to 1", "Word-level F1, one per objective; a missing answer is 0."),
        Column::new(
            "reward",
            Float32,
            "0 to 1",
            "1 if every answer is right, or what the rule in the manifest says; 0 unless the format is valid; null if something \
             other than the policy failed.",
        )
        .nullable(),
        Column::new("generated_tokens", Int32, "tokens", "Sampled over all steps."),
        Column::new(
            "processed_tokens",
            Int32,
            "tokens",
            "Every prompt, counted again each step, and all sampled ones.",
        ),
        Column::new("unique_tokens", Int32, "tokens", "What a perfect prefix cache would compute."),
        Column::new("peak_tokens", Int32, "tokens", "Largest prompt + completion of one step."),
        Column::new("tool_calls", Int32, "calls", "Tool calls made."),
        Column::new("error", Utf8, "", "What went wrong, in words.").nullable(),
        Column::new("policy", Utf8, "", "Digest of the checkpoint that sampled."),
        Column::new("seed", UInt64, "", "Seed of the run."),
    ]);
    columns
}

fn steps() -> Vec<Column> {
    let segment = structure(&[("kind", Utf8), ("start", Int32), ("end", Int32)]);
    let mut columns = step_key();
    columns.extend([
        Column::new("prompt_ids", list(Int32), "token ids", "What the model saw."),
        Column::new("completion_ids", list(Int32), "token ids", "What the model wrote."),
        Column::new(
            "sampling_logprobs",
            list(Float32),
            "natural log",
            "One per completion id, at the sampling temperature, over the whole vocabulary.",
        ),
        Column::new(
            "segments",
            list(segment),
            "",
            "Half-open ranges over `completion_ids`, tags included (an opening tag that ends the prompt is not), in order, \
             never overlapping; a token that straddles two belongs to the earlier. Kinds: `memory`, `think`, `tool_call`, `answer`.",
        ),
        Column::new("completion", Utf8, "", "The completion as text (derived)."),
        Column::new("observation", Utf8, "", "What the environment replied, as text; null if nothing did.").nullable(),
        Column::new("observation_ids", list(Int32), "token ids", "The reply as spliced into the next prompt.")
            .nullable(),
        Column::new(
            "stop_reason",
            Utf8,
            "",
            "Why the model call ended: `stop_string`, `eos`, `max_tokens`, `error`.",
        ),
    ]);
    columns
}

fn queries() -> Vec<Column> {
    let document = structure(&[("doc_id", Utf8), ("title", Utf8), ("text", Utf8)]);
    vec![
        Column::new("query", Utf8, "", "What was searched for."),
        Column::new("top_k", Int32, "documents", "How many documents were asked for."),
        Column::new("documents", list(document), "", "What was found, best first."),
    ]
}

fn scores() -> Vec<Column> {
    let mut columns = step_key();
    columns.extend([
        Column::new(
            "answer_logprob",
            Float64,
            "natural log",
            "Mean over the gold answer's tokens, given question and memory.",
        )
        .nullable(),
        Column::new(
            "answer_probability",
            Float64,
            "0 to 1",
            "`exp(answer_logprob)`: geometric mean of the answer tokens' probabilities.",
        )
        .nullable(),
        Column::new(
            "objective_logprobs",
            list(Float64),
            "natural log",
            "The same mean for each objective's own answer tokens, separators left out.",
        )
        .nullable(),
        Column::new("bias_logprob", Float64, "natural log", "`answer_logprob` given what the bias conditions on.")
            .nullable(),
        Column::new("bias_probability", Float64, "0 to 1", "`exp(bias_logprob)`.").nullable(),
        Column::new(
            "memory_reward",
            Float64,
            "-1 to 1",
            "`answer_probability - bias_probability`, or as the options in the manifest say.",
        )
        .nullable(),
        Column::new("answer_token_count", Int32, "tokens", "Tokens of the gold answer, tags left out."),
        Column::new("truncated", Boolean, "", "Whether the memory hit a length limit."),
    ]);
    columns
}

fn contexts() -> Vec<Column> {
    let mut columns = step_key();
    columns.extend([
        Column::new("kind", Utf8, "", "`memory` or `bias`."),
        Column::new("context_ids", list(Int32), "token ids", "What was conditioned on."),
        Column::new("answer_ids", list(Int32), "token ids", "What was scored after it."),
    ]);
    columns
}

fn logprobs() -> Vec<Column> {
    let mut columns = step_key();
    columns.extend([
        Column::new(
            "policy_logprobs",
            list(Float32),
            "natural log",
            "One per completion id, under the policy, at the sampling temperature.",
        ),
        Column::new("reference_logprobs", list(Float32), "natural log", "The same under the reference policy.")
            .nullable(),
    ]);
    columns
}

fn advantages() -> Vec<Column> {
    let mut columns = step_key();
    columns.extend([
        Column::new("trajectory_advantage", Float32, "", "For every token of the step."),
        Column::new(
            "memory_advantage",
            Float32,
            "",
            "Added for the tokens of the memory segment; null if there is none.",
        )
        .nullable(),
        Column::new("memory_start", Int32, "token position", "First completion id the memory advantage applies to.")
            .nullable(),
        Column::new("memory_end", Int32, "token position", "One past the last such id.").nullable(),
        Column::new("loss_weight", Float32, "", "1 normally, 0 to leave the step out."),
    ]);
    columns
}

fn sft_examples() -> Vec<Column> {
    vec![
        Column::new("example_id", Utf8, "", "Unique name."),
        Column::new("trajectory_id", Utf8, "", "The trajectory it comes from."),
        Column::new("task_id", Utf8, "", "The task, where it is known.").nullable(),
        Column::new("split", Utf8, "", "`train`, `dev` or `test`, where it is known.").nullable(),
        Column::new("step_index", Int32, "", "Position in the trajectory, from 0."),
        Column::new("input_ids", list(Int32), "token ids", "The whole sequence: prompt, then targets."),
        Column::new("loss_mask", list(Boolean), "", "One per id: true where the id is a prediction target."),
        Column::new("target_count", Int32, "tokens", "Number of targets."),
    ]
}

fn corpus() -> Vec<Column> {
    vec![
        Column::new("doc_id", Utf8, "", "Unique name."),
        Column::new("title", Utf8, "", "Title."),
        Column::new("text", Utf8, "", "Body."),
    ]
}
