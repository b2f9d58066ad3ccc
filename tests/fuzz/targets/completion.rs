//! A completion of any ids: its segments are in order, inside it, and its text is what the ids decode to.
#![no_main]

use std::sync::LazyLock;

use mempo_text::{NewTokenizer, Profile, Tokenizer, parse_completion, train_tokenizer};

static PARTS: LazyLock<(Tokenizer, Profile)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let lines = (0..120).map(|line| {
        format!(
            "<mem>Land {line}: Paris.</mem><think>Next.</think><tool_call>\n{{\"query\": \"land {line}\"}}\n</tool_call>\
             <information>Zürich</information><answer>Paris; {line}</answer>"
        )
    });
    train_tokenizer(lines, &NewTokenizer::of_size(700), folder.path()).expect("a small tokenizer");
    (Tokenizer::load(folder.path()).expect("as written"), Profile::load("mempo").expect("a built-in profile"))
});

libfuzzer_sys::fuzz_target!(|ids: Vec<u16>| {
    let (tokenizer, profile) = &*PARTS;
    let ids: Vec<i32> = ids.into_iter().map(|id| i32::from(id) % (tokenizer.vocabulary_size() as i32 + 2)).collect();
    let parsed = parse_completion(tokenizer, &ids, profile);
    assert_eq!(parsed.text, tokenizer.decode(&ids));
    let mut end = 0;
    for segment in &parsed.segments {
        assert!(end <= segment.range.start && segment.range.start < segment.range.end);
        end = segment.range.end;
    }
    assert!(end <= ids.len());
    assert!(parsed.tool_call.is_none() || parsed.answer.is_none());
});
