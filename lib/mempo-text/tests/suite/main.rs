//! Tests of the crate from outside: tokenizer, prompts, segments, with a tokenizer trained here and, where
//! `MEMPO_TEST_TOKENIZERS` names folders, with those of published models (`./just tokenizers`).

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "tests: a panic is a failure, tables are long")]

mod fixture;
mod outside;
mod prompts;
mod segments;
mod tokenizers;
mod training;
mod words;
