//! The segment grammar against a table of completions and, for any ids, against its promises.

use mempo_text::{ParsedCompletion, Profile, SegmentKind, Tags, Tokenizer, parse_completion, parse_continuation};
use proptest::prelude::*;

use crate::fixture::{Fixture, TINY, fixtures};

const CALL: &str = "<tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"x\"}}\n</tool_call>";

fn parse(fixture: &Fixture, ids: &[i32]) -> ParsedCompletion {
    parse_completion(&fixture.tokenizer, ids, &Profile::load("mempo").unwrap())
}

fn kinds(parsed: &ParsedCompletion) -> Vec<String> {
    parsed.segments.iter().map(|segment| segment.kind.tag(&Tags::default()).to_owned()).collect()
}

#[test]
fn well_formed_steps() {
    for fixture in fixtures() {
        for (text, expected) in [
            (format!("<mem>m</mem><think>t</think>{CALL}"), vec!["mem", "think", "tool_call"]),
            (format!("<think>t</think>\n{CALL}"), vec!["think", "tool_call"]),
            (CALL.to_owned(), vec!["tool_call"]),
            ("\n <mem>東京</mem> so <answer> a; b </answer>".to_owned(), vec!["mem", "answer"]),
        ] {
            let ids = fixture.tokenizer.encode_plain(&text);
            let parsed = parse(fixture, &ids);
            assert_eq!(kinds(&parsed), expected, "{text}");
            assert!(parsed.problems.is_empty(), "{text}: {:?}", parsed.problems);
            assert_eq!(parsed.text, text);
            assert_eq!(parsed.tool_call.is_some(), text.contains("tool_call"));
            assert_eq!(parsed.answer.is_some(), text.contains("<answer>"));
            assert_eq!(parsed.memory_count, text.matches("</mem>").count());
        }
        let call = parse(fixture, &fixture.tokenizer.encode_plain(CALL)).tool_call.unwrap().unwrap();
        assert_eq!((call.name.as_str(), call.arguments["query"].as_str()), ("search", Some("x")));
        let parsed = parse(fixture, &fixture.tokenizer.encode_plain("<answer> a; b\n</answer>"));
        assert_eq!(parsed.answer.as_deref(), Some("a; b"));
    }
}

#[test]
fn what_a_reader_writes_is_its_memory() {
    for fixture in fixtures() {
        let builder = fixture.builder("memagent");
        let end = builder.end_of_turn_id().unwrap();
        let encode = |text: &str| fixture.tokenizer.encode_plain(text);
        for (text, thought) in [("Paris <mem> \\boxed{no}", ""), ("Paris", "<think>so</think>")] {
            let (thought, kept) = (encode(thought), encode(text));
            for ending in [vec![], vec![end]] {
                let ids = [thought.clone(), kept.clone(), ending].concat();
                let parsed = builder.parse_memory(&ids);
                assert_eq!((parsed.memory_count, parsed.answer, parsed.problems.len()), (1, None, 0), "{text}");
                assert_eq!(parsed.segments.len(), 1);
                assert_eq!(parsed.segments[0].range, thought.len()..thought.len() + kept.len(), "{text}");
            }
        }
        for empty in [vec![], vec![end], encode("<think>x</think>")] {
            let parsed = builder.parse_memory(&empty);
            assert_eq!((parsed.segments.len(), parsed.problems.len()), (0, 1));
        }
    }
}

#[test]
fn an_answer_may_stand_in_a_box() {
    let profile = Profile::load("memagent").unwrap();
    for fixture in fixtures() {
        for (text, expected) in [
            ("It is \\boxed{Paris; Rome}.", Some("Paris; Rome")),
            ("\\boxed{a} or \\boxed{ \\frac{1}{2} }", Some("\\frac{1}{2}")),
            ("so \\boxed Paris$ it is", Some("Paris")),
            ("\\boxed{a} or \\boxed{b", None),
            ("\\boxed{", None),
            ("<answer>Paris</answer>", None),
        ] {
            let ids = fixture.tokenizer.encode_plain(text);
            let parsed = parse_completion(&fixture.tokenizer, &ids, &profile);
            assert_eq!(parsed.answer.as_deref(), expected, "{text}");
            assert_eq!(parsed.problems.is_empty(), expected.is_some(), "{text}");
            let answer = parsed.segments.first().map(|segment| fixture.tokenizer.decode(&ids[segment.range.clone()]));
            assert_eq!(answer.is_some_and(|answer| answer.contains(expected.unwrap())), expected.is_some(), "{text}");
        }
    }
}

#[test]
fn a_segment_may_begin_in_the_prompt() {
    let profile = Profile::load("mempo").unwrap();
    for fixture in fixtures() {
        let encode = |text: &str| fixture.tokenizer.encode_plain(text);
        let ids = encode("a; b</answer>");
        let whole = encode("<mem>m</mem><answer>");
        for opening in [encode("<answer>"), whole] {
            let parsed = parse_continuation(&fixture.tokenizer, &opening, &ids, &profile);
            assert_eq!((parsed.answer.as_deref(), parsed.text.as_str()), (Some("a; b"), "a; b</answer>"));
            assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
            // The memory lies in the prompt; the answer is all that was written.
            let ranges: Vec<_> = parsed.segments.iter().map(|segment| segment.range.clone()).collect();
            assert_eq!(ranges, std::slice::from_ref(&(0..ids.len())));
        }
        let step = encode(&format!("<mem>m</mem>{CALL}"));
        assert_eq!(parse_continuation(&fixture.tokenizer, &[], &step, &profile), parse(fixture, &step));
    }
}

#[test]
fn faults_are_listed() {
    let none = "neither a tool call nor an answer";
    for (text, segments, problems) in [
        ("", vec![], vec![none]),
        ("just text", vec![], vec![none]),
        ("<mem>m", vec![], vec!["<mem> is not closed", none]),
        ("<mem>m<think>t</think><answer>a</answer>", vec!["think", "answer"], vec!["<mem> is not closed"]),
        ("m</mem><answer>a</answer>", vec!["answer"], vec!["</mem> without <mem>"]),
        ("<mem>1</mem><mem>2</mem><answer>a</answer>", vec!["mem", "answer"], vec!["more than one <mem>"]),
        ("<think>1</think><mem>2</mem><answer>a</answer>", vec!["think", "mem", "answer"], vec!["<mem> after <think>"]),
        (
            "<think>a <mem>2</mem></think><answer>a</answer>",
            vec!["think", "answer"],
            vec!["another tag inside <think>"],
        ),
        ("<mem>a<mem>b</mem><answer>a</answer>", vec!["mem", "answer"], vec!["another tag inside <mem>"]),
        ("<answer>a</answer><answer>b</answer>", vec!["answer", "answer"], vec!["more than one <answer>"]),
        (
            "<information>x</information><answer>a</answer>",
            vec!["answer"],
            vec!["<information> is for the environment to write", "<information> is for the environment to write"],
        ),
        (
            "<tool_call>{</tool_call>",
            vec!["tool_call"],
            vec!["the tool call is not valid JSON: EOF while parsing an object at line 1 column 1"],
        ),
        ("<Mem>x</Mem><answer>a</answer>", vec!["answer"], vec![]),
    ] {
        for fixture in fixtures() {
            let parsed = parse(fixture, &fixture.tokenizer.encode_plain(text));
            assert_eq!(kinds(&parsed), segments, "{text}");
            assert_eq!(parsed.problems, problems, "{text}");
        }
    }
}

#[test]
fn the_first_action_counts() {
    for (text, called, answer) in [
        (format!("{CALL}<answer>a</answer>"), true, None),
        (format!("<answer>a</answer>{CALL}"), false, Some("a")),
        ("<tool_call>{</tool_call><answer>a</answer>".to_owned(), true, None),
        ("<answer>a</answer><answer>b</answer>".to_owned(), false, Some("a")),
    ] {
        let parsed = parse(&TINY, &TINY.tokenizer.encode_plain(&text));
        assert_eq!(parsed.tool_call.is_some(), called, "{text}");
        assert_eq!(parsed.answer.as_deref(), answer, "{text}");
        assert!(!parsed.problems.is_empty(), "{text}");
    }
}

#[test]
fn which_tags_count_is_the_profile_s_to_say() {
    let text = "<think>so far</think><search>red fish</search>";
    let ids = TINY.tokenizer.encode_plain(text);
    let parse = |name: &str| parse_completion(&TINY.tokenizer, &ids, &Profile::load(name).unwrap());
    let kinds = |name: &str| parse(name).segments.iter().map(|segment| segment.kind).collect::<Vec<_>>();
    assert_eq!(kinds("mem1"), [SegmentKind::Memory, SegmentKind::ToolCall]);
    assert_eq!(kinds("search-r1"), [SegmentKind::Think, SegmentKind::ToolCall]);
    assert_eq!(kinds("mempo"), [SegmentKind::Think]);
    for name in ["mem1", "search-r1"] {
        let parsed = parse(name);
        assert_eq!(parsed.tool_call.unwrap().unwrap().arguments["query"], "red fish");
        assert_eq!((parsed.problems, parsed.memory_count), (Vec::<String>::new(), usize::from(name == "mem1")));
    }
    assert_eq!(parse("mempo").problems, ["neither a tool call nor an answer"]);
}

#[test]
fn a_profile_without_memory_wants_none() {
    let ids = TINY.tokenizer.encode_plain("<mem>m</mem><answer>a</answer>");
    let parsed = parse_completion(&TINY.tokenizer, &ids, &Profile::load("react").unwrap());
    assert_eq!(parsed.problems, ["a memory, where the profile has none"]);
}

#[test]
fn a_straddling_token_belongs_to_the_earlier_segment() {
    for fixture in fixtures() {
        let text = "<mem>Paris</mem><think>t</think><answer>a</answer>";
        let ids = fixture.tokenizer.encode_plain(text);
        let straddling = fixture.id("><");
        let at = ids.iter().position(|id| *id == straddling).unwrap();
        let parsed = parse(fixture, &ids);
        let [memory, think, _] = &parsed.segments[..] else { panic!("{parsed:?}") };
        assert_eq!((memory.range.clone(), think.range.start), (0..at + 1, at + 1), "{}", fixture.name);
    }
}

/// Ids of tags and words, cut into tokens in any way: whole pieces, bytes, unknown ids between.
fn hostile_ids(tokenizer: &Tokenizer, pieces: &[(usize, bool, i32)]) -> Vec<i32> {
    let words = [
        "<mem>",
        "</mem>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<answer>",
        "</answer>",
        "<information>",
        "x",
        "é",
        "{\"query\": \"q\"}",
        "; ",
        "<",
        "mem>",
        "><",
        "</",
    ];
    let mut ids = Vec::new();
    for (word, bytewise, stray) in pieces {
        let word = words[word % words.len()];
        if *bytewise {
            let letters = word.chars().map(String::from);
            ids.extend(letters.flat_map(|letter| tokenizer.encode_plain(&letter)));
        } else {
            ids.extend(tokenizer.encode_plain(word));
        }
        if stray % 4 == 0 {
            ids.push(*stray);
        }
    }
    ids
}

fn check_promises(fixture: &Fixture, ids: &[i32]) -> Result<(), TestCaseError> {
    let parsed = parse(fixture, ids);
    prop_assert_eq!(&parsed.text, &fixture.tokenizer.decode(ids));
    let mut end = 0;
    for segment in &parsed.segments {
        prop_assert!(end <= segment.range.start && segment.range.start < segment.range.end);
        end = segment.range.end;
        let text = fixture.tokenizer.decode(&ids[segment.range.clone()]);
        let closing = format!("</{}>", segment.kind.tag(&Tags::default()));
        prop_assert!(text.contains(&closing), "{text:?}");
    }
    prop_assert!(end <= ids.len());
    let memories = parsed.segments.iter().filter(|segment| segment.kind == SegmentKind::Memory).count();
    prop_assert_eq!(memories, parsed.memory_count.min(1));
    prop_assert!(parsed.tool_call.is_none() || parsed.answer.is_none());
    // The same text in other tokens says the same.
    let again = parse(fixture, &fixture.tokenizer.encode_plain(&parsed.text));
    if !parsed.text.contains('\u{fffd}') {
        prop_assert_eq!(kinds(&again), kinds(&parsed));
        prop_assert_eq!(again.problems, parsed.problems);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_pieces_parse(pieces in proptest::collection::vec((any::<usize>(), any::<bool>(), any::<i32>()), 0..14)) {
        for fixture in fixtures() {
            check_promises(fixture, &hostile_ids(&fixture.tokenizer, &pieces))?;
        }
    }

    #[test]
    fn any_ids_parse(ids in proptest::collection::vec(prop_oneof![any::<i32>(), 0..703], 0..60)) {
        parse(&TINY, &ids);
    }
}
