//! Tests of the crate from outside: tokenizer, prompts, segments, with a tokenizer trained here and, where
//! `MEMPO_TEST_QWEN_TOKENIZER` names a folder, with Qwen's own.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "tests: a panic is a failure, tables are long")]

mod fixture;
mod prompts;
mod segments;
mod tokenizers;
mod training;
