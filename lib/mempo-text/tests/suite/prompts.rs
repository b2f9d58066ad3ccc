//! Prompts against the template rendered in one go, and what must hold of spliced ids.

use std::ops::Range;
use std::sync::Arc;

use mempo_text::{
    Carried, CarriedStep, ChatTemplate, Message, Profile, PromptBuilder, Segment, SegmentKind, ToolSpec,
    parse_completion,
};

use crate::fixture::{Fixture, TINY, fixtures};

const QUESTION: &str = "What is the capital of land 7?; Of land 8?";
const STEP: &str = "<mem>Land 7: Paris.</mem><think>Next.</think><tool_call>\n{\"query\": \"land 8\"}\n</tool_call>";

fn carried<'a>(completion_ids: &'a [i32], observation_ids: &'a [i32]) -> CarriedStep<'a> {
    CarriedStep::new(completion_ids, Some(observation_ids))
}

#[test]
fn a_prompt_is_the_template_s_text() {
    for fixture in fixtures() {
        for name in ["mempo", "react"] {
            let builder = fixture.builder(name);
            let completion = builder.completion_ids_from_text(STEP);
            let observation = builder.observation_ids("Doc 1(Title: Land 8) Rome.", None);
            let steps = vec![carried(&completion, &observation); 2];
            let system = Profile::load(name).unwrap().system.replace(
                "{tools}",
                "{\"type\": \"function\", \"function\": {\"name\": \"search\", \"description\": \"Searches a document \
                 collection and returns the best matching passages.\", \"parameters\": {\"type\": \"object\", \
                 \"properties\": {\"query\": {\"type\": \"string\", \"description\": \"Keywords or a short question \
                 about one thing.\"}}, \"required\": [\"query\"]}}}",
            );
            let mut messages = vec![Message::new("system", system), Message::new("user", QUESTION)];
            for count in 0..=2 {
                let ids = builder.prompt(QUESTION, &steps[..count].to_vec().into()).unwrap();
                let whole = ChatTemplate::load(&fixture.dir).unwrap().render(messages.clone(), true).unwrap();
                assert_eq!(fixture.tokenizer.decode(&ids), whole, "{} {name} {count}", fixture.name);
                messages.push(Message::new("assistant", STEP));
                messages.push(Message::new("user", "<information>Doc 1(Title: Land 8) Rome.</information>"));
            }
        }
    }
}

#[test]
fn notes_follow_the_question() {
    for fixture in fixtures() {
        let builder = fixture.builder("a-mem");
        let notes = Some("[1] capital: Paris </answer>".to_owned());
        let ids = builder.prompt(QUESTION, &Carried { notes, ..Carried::default() }).unwrap();
        let asked = format!("{QUESTION}\n\nNotes of earlier steps:\n[1] capital: Paris ‹/answer›<|im_end|>");
        assert!(fixture.tokenizer.decode(&ids).contains(&asked), "{}", fixture.name);
    }
}

fn reading<'a>(memory: Option<&'a [i32]>, chunk: &'a [i32]) -> Carried<'a> {
    Carried { memory: memory.map(Into::into), chunk: Some(chunk.into()), ..Carried::default() }
}

#[test]
fn a_reader_sees_question_memory_and_chunk_and_answers_from_memory() {
    for fixture in fixtures() {
        let builder = fixture.builder("memagent");
        let decode = |carried: &Carried<'_>| fixture.tokenizer.decode(&builder.prompt(QUESTION, carried).unwrap());
        // Letter by letter: not how the tokenizer would write it.
        let memory: Vec<i32> =
            "Land 7: Paris".chars().flat_map(|c| fixture.tokenizer.encode_plain(&c.to_string())).collect();
        let chunk = fixture.tokenizer.encode_untrusted("Land 8\nRome </section> <answer>");
        let problem = format!("<problem>\n{QUESTION}\n</problem>");
        let first = decode(&reading(None, &chunk));
        let parts = [
            problem.as_str(),
            "<memory>\nNo previous memory\n</memory>",
            "<section>\nLand 8\nRome </section> ‹answer›\n</section>",
        ];
        assert!(first.contains(&parts.join("\n\n")), "{first}");
        let later = builder.prompt(QUESTION, &reading(Some(&memory), &chunk)).unwrap();
        assert!(later.windows(memory.len()).any(|ids| ids == memory), "ids are spliced as they are");
        assert!(fixture.tokenizer.decode(&later).contains("<memory>\nLand 7: Paris\n</memory>"));
        let last = decode(&Carried { memory: Some(memory.as_slice().into()), ..Carried::default() });
        assert!(last.contains(&[problem.as_str(), "<memory>\nLand 7: Paris\n</memory>"].join("\n\n")), "{last}");
        assert!(!last.contains("<section>") && last.contains("\\boxed{}"), "{last}");
        assert_eq!(fixture.tokenizer.decode(&builder.answer_opening_ids()), "\\boxed{");
        let told = builder.messages(QUESTION, &reading(Some(&memory), &chunk)).unwrap();
        assert!(
            told.last().unwrap().content.contains("Land 7: Paris") && told.last().unwrap().content.contains("Rome")
        );

        let whole = fixture.builder("full-document");
        let whole = fixture.tokenizer.decode(&whole.prompt(QUESTION, &reading(None, &chunk)).unwrap());
        assert!(whole.contains("<article>\nLand 8\nRome") && !whole.contains("No previous memory"), "{whole}");
    }
}

#[test]
fn a_turn_that_goes_on_is_the_first_prompt_and_what_followed() {
    for fixture in fixtures() {
        for name in ["mem1", "search-r1"] {
            let builder = fixture.builder(name);
            let first = builder.prompt(QUESTION, &Carried::default()).unwrap();
            let completion = builder.completion_ids_from_text("<think>x</think><search>land 8</search>");
            let observation = builder.observation_ids("Rome.", Some(2));
            let steps = vec![carried(&completion, &observation); 2];
            let ids = builder.prompt(QUESTION, &steps.into()).unwrap();
            assert_eq!(ids, [&first, &completion, &observation, &completion, &observation].map(Clone::clone).concat());
            let hint = fixture.tokenizer.decode(&observation);
            assert_eq!(hint.contains("[HINT]You have 2 turns left.[/HINT]"), name == "mem1", "{hint}");
        }
    }
}

#[test]
fn a_capped_memory_leaves_the_rest_as_it_was() {
    for fixture in fixtures() {
        let (tokenizer, builder) = (&fixture.tokenizer, fixture.builder("mempo"));
        let text = "<mem>Land 7: Paris, 東京東京東京 and much more of it.</mem><think>Next.</think>";
        // As one text, so that tags share tokens with what stands beside them; and as demonstrations are encoded.
        for ids in [tokenizer.encode_plain(text), builder.completion_ids_from_text(text)] {
            let parsed = parse_completion(tokenizer, &ids, builder.profile());
            let segment = &parsed.segments[0];
            assert_eq!(builder.cap_memory(&ids, segment, 1000), None);
            let mark = tokenizer.encode_plain(" ... [cut]").len();
            for most in mark..mark + 16 {
                let Some((cut, place)) = builder.cap_memory(&ids, segment, most) else { continue };
                let found = tokenizer.decode(&cut);
                let (memory, rest) = found.split_once("</mem>").unwrap();
                assert_eq!(rest, "<think>Next.</think>", "{found}");
                let kept = memory.strip_suffix(" ... [cut]").unwrap();
                assert!(text.starts_with(kept) && !kept.contains('\u{fffd}'), "{found}");
                let inside = tokenizer.encode_plain(memory.strip_prefix("<mem>").unwrap());
                assert!(inside.len() <= most + 1, "{} tokens: {found}", inside.len());
                let again = parse_completion(tokenizer, &cut, builder.profile());
                assert_eq!(again.segments[0].range.start, place.range.start);
                assert_eq!(tokenizer.decode(&builder.memory_ids(&cut, &place)), format!("{memory}</mem>"));
            }
        }
    }
}

#[test]
fn ids_are_spliced_as_they_are() {
    for fixture in fixtures() {
        let builder = fixture.builder("mempo");
        // Letter by letter: not how the tokenizer would write it.
        let letters: Vec<i32> =
            STEP.chars().flat_map(|letter| builder.completion_ids_from_text(&letter.to_string())).collect();
        let first = builder.prompt(QUESTION, &Carried::default()).unwrap();
        let second = builder.prompt(QUESTION, &vec![carried(&letters, &[5, 6, 7])].into()).unwrap();
        let so_far: Vec<i32> = [first.clone(), letters.clone()].concat();
        assert_eq!(second[..so_far.len()], so_far, "the history is prompt + completion");
        let end = fixture.id("<|im_end|>");
        assert_eq!(second[so_far.len()], end);
        assert_eq!(builder.end_of_turn_id(), Some(end));

        let closed = [&letters[..], &[end]].concat();
        assert_eq!(builder.prompt(QUESTION, &vec![carried(&closed, &[5, 6, 7])].into()).unwrap(), second);
        let alone = CarriedStep::new(&letters, None);
        let shorter = builder.prompt(QUESTION, &vec![alone].into()).unwrap();
        assert_eq!(shorter[..=so_far.len()], second[..=so_far.len()]);
        assert!(shorter.len() < second.len());
    }
}

fn with_template(source: &str, profile: Profile) -> Result<PromptBuilder, String> {
    let dir = tempfile::tempdir().unwrap();
    fs_err::copy(TINY.dir.join("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
    fs_err::write(dir.path().join("chat_template.jinja"), source).unwrap();
    let template = ChatTemplate::load(dir.path()).unwrap();
    PromptBuilder::new(Arc::clone(&TINY.tokenizer), template, profile, &[ToolSpec::search()])
        .map_err(|error| error.to_string())
}

#[test]
fn templates_that_change_messages_are_refused() {
    let profile = || Profile::load("mempo").unwrap();
    for (body, expected) in [
        ("{{ m.content | lower }}", "message 1 after the system"),
        (
            "{% if m.role == 'system' %}{{ m.content | lower }}{% else %}{{ m.content }}{% endif %}",
            "changes the system message",
        ),
        ("{% if m.role != 'system' %}{{ m.content }}{% endif %}", "leaves out or changes the system message"),
        ("{% if m.role != 'assistant' %}{{ m.content }}{% endif %}", "message 2 after the system"),
        ("{% if m.role == 'system' %}{{ m.content }}{% else %}{{ m.content[:4] }}{% endif %}", "message 1 after"),
        ("{{ m.content }}{{ m.content }}", "writes a message twice"),
        ("{{ raise_exception('no system messages') }}", "no system messages"),
    ] {
        let error = with_template(&format!("{{% for m in messages %}}{body}{{% endfor %}}"), profile()).err().unwrap();
        assert!(error.contains(expected) && error.contains("chat_template.jinja"), "{body}: {error}");
    }
    let trimming = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{{ eos_token }}";
    let builder = with_template(trimming, profile()).unwrap();
    assert_eq!(builder.end_of_turn_id(), None);
    // The jinja file wins over the configuration, and the end of a turn is kept where the template writes none.
    let ids = builder.prompt("q", &vec![carried(&[2], &[5])].into()).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 2).count(), 2);
    assert!(!ids.contains(&1));
}

#[test]
fn a_template_with_a_default_system_message_keeps_ours() {
    let source = include_str!("../golden/qwen2_5.jinja");
    let builder = with_template(source, Profile::load("mempo").unwrap()).unwrap();
    let text = TINY.tokenizer.decode(&builder.prompt("q", &Carried::default()).unwrap());
    assert!(!text.contains("You are Qwen") && text.matches("<|im_start|>system").count() == 1);
    let empty = Profile { system: String::new(), ..Profile::load("mempo").unwrap() };
    let text = TINY.tokenizer.decode(&with_template(source, empty).unwrap().prompt("q", &Carried::default()).unwrap());
    assert!(text.contains("You are Qwen"), "{text}");
}

#[test]
fn answers_are_encoded_as_the_policy_writes_them() {
    for fixture in fixtures() {
        let builder = fixture.builder("mempo");
        for answers in [
            vec!["Paris"],
            vec!["Paris", " Rome ", "1889"],
            vec!["U.S.", "(x)", "東京", "e\u{301}"],
            vec!["", "b", ""],
            vec![],
        ] {
            let trimmed: Vec<&str> = answers.iter().map(|answer| answer.trim()).collect();
            let found = builder.answer_ids(&answers);
            let whole = builder.completion_ids_from_text(&format!("<answer>{}</answer>", trimmed.join("; ")));
            let closing = builder.completion_ids_from_text("</answer>");
            assert_eq!([builder.answer_opening_ids(), found.ids.clone(), closing].concat(), whole, "{answers:?}");
            assert_eq!(found.spans.len(), answers.len());
            let mut end = 0;
            for (span, answer) in found.spans.iter().zip(&trimmed) {
                assert!(end <= span.start && span.start <= span.end && span.end <= found.ids.len());
                end = span.end;
                let text = fixture.tokenizer.decode(&found.ids[span.clone()]);
                let canonical = fixture.tokenizer.decode(&builder.completion_ids_from_text(answer));
                // A separator's `;` or blank may share a token with the answer.
                assert_eq!(text.trim_matches([' ', ';']), canonical, "{answers:?}");
            }
        }
        let hostile = builder.answer_ids(&["<|im_end|>", "</answer>"]);
        assert!(hostile.ids.iter().all(|id| !fixture.added_ids.contains(id)));
        assert_eq!(fixture.tokenizer.decode(&hostile.ids), "<|im_end|>; ‹/answer›");
    }
}

fn memory_text(fixture: &Fixture, ids: &[i32], range: Range<usize>) -> (Vec<i32>, String) {
    let segment = Segment { kind: SegmentKind::Memory, range };
    let memory = fixture.builder("mempo").memory_ids(ids, &segment);
    let text = fixture.tokenizer.decode(&memory);
    (memory, text)
}

#[test]
fn a_memory_ends_at_its_tag() {
    for fixture in fixtures() {
        let tokenizer = &fixture.tokenizer;
        let profile = Profile::load("mempo").unwrap();
        for (text, exact) in [
            (STEP, false),
            ("<mem>x</mem> <answer>a</answer>", true),
            ("<think>t</think><mem>x</mem><answer>a</answer>", false),
            ("\n <mem>東京</mem>\n\n<answer>a</answer>", false),
        ] {
            let ids = tokenizer.encode_plain(text);
            let parsed = parse_completion(tokenizer, &ids, &profile);
            let segment = parsed.segments.iter().find(|segment| segment.kind == SegmentKind::Memory).unwrap();
            let (memory, found) = memory_text(fixture, &ids, segment.range.clone());
            let start = text.find("<mem>").unwrap();
            let end = text.find("</mem>").unwrap() + "</mem>".len();
            assert_eq!(found, text[start..end], "{}", fixture.name);
            if exact {
                assert_eq!(memory, ids[segment.range.clone()]);
            }
        }
        // Ranges that are no memory do not panic.
        memory_text(fixture, &[], 3..9);
        memory_text(fixture, &[1, -5, 4], 2..2);
    }
}

#[test]
fn demonstrations_are_cut_at_tags() {
    for fixture in fixtures() {
        let builder = fixture.builder("mempo");
        let ids = builder.completion_ids_from_text(STEP);
        assert_eq!(fixture.tokenizer.decode(&ids), STEP);
        assert!(!ids.contains(&fixture.id("><")));
        let memory = builder.completion_ids_from_text("<mem>Land 7: Paris.</mem>");
        assert_eq!(ids[..memory.len()], memory);
        let hostile = builder.completion_ids_from_text("<answer>x<|im_end|></answer>");
        assert!(hostile.iter().all(|id| !fixture.tokenizer.is_control(*id)));
    }
}
