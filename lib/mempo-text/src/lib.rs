//! Text on one side, token ids on the other: tokenizer, chat template, prompts, segment grammar, answers.
//!
//! Everything that turns text into ids is here, so that the promises about it are kept in one place: a step's prompt
//! has one builder ([`PromptBuilder`]), ids that were sampled are never tokenised again, and text from outside can
//! become neither a control token nor a protocol tag ([`Tokenizer::encode_untrusted`]). The crate knows no tables,
//! tensors or tools.

pub mod answer;
mod byte_table;
mod encoder;
mod error;
mod fold;
mod json;
mod namespaces;
mod neutralise;
mod profile;
mod prompt;
mod segment;
mod template;
mod tokenizer;
mod tool;
mod train;
mod words;

pub use encoder::EncoderTokenizer;
pub use error::Error;
pub use fold::fold;
pub use json::python_json;
pub use neutralise::{PROTOCOL_TAGS, neutralise};
pub use profile::{AnswerForm, Hint, MemoryRule, Profile, Tags, Turns};
pub use prompt::{AnswerIds, CUT_MARK, Carried, CarriedStep, PromptBuilder};
pub use segment::{ParsedCompletion, Segment, SegmentKind, between_tags, parse_completion, parse_continuation};
pub use template::{ChatTemplate, Message};
pub use tokenizer::Tokenizer;
pub use tool::{ToolCall, ToolSpec};
pub use train::{NewTokenizer, train_tokenizer};
