//! The rows of every table, one struct a table, one field a column.
//!
//! Integers are `i32` (Arrow `Int32`), text is `String` (`Utf8`), an `Option` is a nullable column. All log-probabilities
//! are natural logarithms. The meaning of each column stands here once; `schemas/` is generated from
//! [`crate::schema`].

use serde::{Deserialize, Serialize};

/// A question to work on (table `tasks`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Unique name; tables are sorted by it.
    pub task_id: String,
    /// Name of the dataset the task comes from.
    pub source: String,
    /// `train`, `dev` or `test`.
    pub split: String,
    /// Text shown to the agent; n questions joined by `; `, each ending in `?`.
    pub question: String,
    /// The gold answers, one entry an objective.
    pub objectives: Vec<Objective>,
    /// The long text to read; null for search tasks.
    pub document: Option<String>,
    /// Where the document is when it is large: `file#doc_id`.
    pub document_ref: Option<String>,
    /// JSON carried through unchanged.
    pub metadata: Option<String>,
}

/// One of the questions of a task with its accepted answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objective {
    /// The question alone.
    pub question: String,
    /// Accepted answers; the first is canonical, the rest are aliases.
    pub answers: Vec<String>,
}

/// One attempt at a task (table `trajectories`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trajectory {
    /// The task attempted.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Model calls made.
    pub step_count: i32,
    /// How the attempt ended.
    pub status: Status,
    /// Text inside `<answer>`.
    pub answer: Option<String>,
    /// Tags right, exactly one memory from the second step on, as many answers as objectives.
    pub format_valid: bool,
    /// One per objective, 0 or 1; a missing answer is 0.
    pub exact_match: Vec<f32>,
    /// One per objective, word-level F1 in [0, 1].
    pub f1: Vec<f32>,
    /// 1 if every objective is right, or what the rule in the manifest says; 0 unless the format is valid; null if something
    /// other than the policy failed.
    pub reward: Option<f32>,
    /// Tokens sampled over all steps.
    pub generated_tokens: i32,
    /// Prompt and completion tokens summed over all steps (every prompt counted again).
    pub processed_tokens: i32,
    /// Tokens that a perfect prefix cache would compute.
    pub unique_tokens: i32,
    /// Largest prompt + completion of one step.
    pub peak_tokens: i32,
    /// Tool calls made.
    pub tool_calls: i32,
    /// What went wrong, in words.
    pub error: Option<String>,
    /// Digest of the checkpoint that sampled.
    pub policy: String,
    /// Seed of the run.
    pub seed: u64,
}

/// How a trajectory ended. The first four are the policy's own doing; the others are failures around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// An answer was given.
    Ok,
    /// The step limit was reached.
    MaxSteps,
    /// A completion or the prompt hit its length limit.
    Truncated,
    /// A completion held neither a readable tool call nor an answer.
    ParseError,
    /// A tool failed.
    ToolError,
    /// The engine failed.
    EngineError,
    /// A deadline passed.
    Timeout,
}

impl Status {
    /// Whether the policy is answerable for this ending: then the trajectory has a reward.
    pub fn is_policy(self) -> bool {
        matches!(self, Self::Ok | Self::MaxSteps | Self::Truncated | Self::ParseError)
    }
}

/// One model call and what came back (table `steps`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The task attempted.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
    /// Token ids the model saw.
    pub prompt_ids: Vec<i32>,
    /// Token ids the model wrote.
    pub completion_ids: Vec<i32>,
    /// One per completion id, at the sampling temperature.
    pub sampling_logprobs: Vec<f32>,
    /// Ranges over `completion_ids`, in order, never overlapping, tags included.
    pub segments: Vec<Segment>,
    /// The completion as text (derived from the ids).
    pub completion: String,
    /// What the environment replied, as text.
    pub observation: Option<String>,
    /// The reply's ids as spliced into the next prompt.
    pub observation_ids: Option<Vec<i32>>,
    /// Why the model call ended.
    pub stop_reason: StopReason,
}

/// A tagged part of a completion: the half-open range `start..end` over `completion_ids`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Which tag.
    pub kind: SegmentKind,
    /// First id of the range.
    pub start: i32,
    /// One past the last id.
    pub end: i32,
}

/// Kinds of segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SegmentKind {
    /// `<mem>`: what is carried instead of history.
    Memory,
    /// `<think>`: reasoning.
    Think,
    /// `<tool_call>`: a JSON call.
    ToolCall,
    /// `<answer>`: the final answer.
    Answer,
}

/// Why a model call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// A stop string was completed.
    StopString,
    /// An end-of-turn id was sampled.
    Eos,
    /// The length limit was reached.
    MaxTokens,
    /// The engine failed.
    Error,
}

/// How probable the gold answer is given a memory (table `scores`, one row a memory segment).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The task attempted.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
    /// Mean log-probability of the gold answer's tokens given question and memory.
    pub answer_logprob: Option<f64>,
    /// `exp(answer_logprob)`: the geometric mean of the answer tokens' probabilities.
    pub answer_probability: Option<f64>,
    /// The same mean for each objective's own answer tokens, separators left out.
    pub objective_logprobs: Option<Vec<f64>>,
    /// `answer_logprob` given what the bias conditions on.
    pub bias_logprob: Option<f64>,
    /// `exp(bias_logprob)`.
    pub bias_probability: Option<f64>,
    /// `answer_probability - bias_probability`, or as the options say.
    pub memory_reward: Option<f64>,
    /// Tokens of the gold answer.
    pub answer_token_count: i32,
    /// Whether the memory hit a length limit.
    pub truncated: bool,
}

/// Exactly what was scored (table `contexts`, written with `--explain`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Context {
    /// The task attempted.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
    /// `memory` or `bias`.
    pub kind: String,
    /// Ids conditioned on.
    pub context_ids: Vec<i32>,
    /// Ids whose log-probabilities are averaged.
    pub answer_ids: Vec<i32>,
}

/// Log-probabilities of a step's completion (table `logprobs`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// The task attempted.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
    /// One per completion id under the policy, at the sampling temperature.
    pub policy_logprobs: Vec<f32>,
    /// The same under the reference policy.
    pub reference_logprobs: Option<Vec<f32>>,
}

/// What the update needs of a step (table `advantages`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Advantage {
    /// The task attempted.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
    /// For every token of the step.
    pub trajectory_advantage: f32,
    /// Added for the tokens of the memory segment; null if there is none.
    pub memory_advantage: Option<f32>,
    /// First completion id the memory advantage applies to.
    pub memory_start: Option<i32>,
    /// One past the last such id.
    pub memory_end: Option<i32>,
    /// 1 normally, 0 to leave the step out.
    pub loss_weight: f32,
}

/// A training sequence (table `sft_examples`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SftExample {
    /// Unique name; the table is sorted by it.
    pub example_id: String,
    /// The trajectory it comes from.
    pub trajectory_id: String,
    /// The task, where it is known.
    pub task_id: Option<String>,
    /// `train`, `dev` or `test`, where it is known.
    pub split: Option<String>,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
    /// Prompt and target ids.
    pub input_ids: Vec<i32>,
    /// True where the id is a prediction target.
    pub loss_mask: Vec<bool>,
    /// Number of targets.
    pub target_count: i32,
}

/// What a remote search answered (table `queries`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnsweredQuery {
    /// What was searched for.
    pub query: String,
    /// How many documents were asked for.
    pub top_k: i32,
    /// What was found, best first.
    pub documents: Vec<Document>,
}

/// A search document (table `corpus`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// Unique name; the table is sorted by it.
    pub doc_id: String,
    /// Title.
    pub title: String,
    /// Body.
    pub text: String,
}
