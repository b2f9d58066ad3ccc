use mempo_data::{Step, StopReason};
use mempo_text::{Carried, CarriedStep, PromptBuilder, parse_completion};

use super::*;
use crate::agent::tests::builder;
use crate::row_segments;

const QUESTION: &str = "What colour is it?; And that?";

fn step(builder: &PromptBuilder, index: i32, completion: &str, results: &str) -> Step {
    let completion_ids = builder.completion_ids_from_text(completion);
    let parsed = parse_completion(builder.tokenizer(), &completion_ids, builder.profile());
    let observation_ids = builder.observation_ids(results, None);
    Step {
        task_id: "t".to_owned(),
        trajectory_index: 0,
        step_index: index,
        prompt_ids: Vec::new(),
        sampling_logprobs: vec![0.0; completion_ids.len()],
        completion_ids,
        segments: row_segments(&parsed),
        completion: parsed.text,
        observation: Some(builder.tokenizer().decode(&observation_ids)),
        observation_ids: Some(observation_ids),
        stop_reason: StopReason::StopString,
    }
}

fn call(query: &str) -> String {
    format!(r#"<think>look</think><tool_call>{{"name": "search", "arguments": {{"query": "{query}"}}}}</tool_call>"#)
}

/// Three steps with memories.
fn remembering(builder: &PromptBuilder) -> Vec<Step> {
    let text = |memory: &str, query: &str| format!("<mem>{memory}</mem>{}", call(query));
    let first = step(builder, 0, &call("red"), "It is red.");
    let second = step(builder, 1, &text("it is red", "blue"), "It is blue.");
    let third = step(builder, 2, &text("red and then blue and no more colours", "more"), "No more.");
    vec![first, second, third]
}

fn shown(builder: &PromptBuilder, carried: &Carried<'_>) -> Vec<(String, Option<String>)> {
    let text = |ids: &[i32]| builder.tokenizer().decode(ids);
    let one = |step: &CarriedStep<'_>| (text(&step.completion_ids), step.observation_ids.as_deref().map(text));
    carried.steps.iter().map(one).collect()
}

fn options(context: &str) -> ContextOptions {
    ContextOptions { context: context.to_owned(), ..ContextOptions::default() }
}

/// What the policy of these options carries of the steps.
fn carried(options: &ContextOptions, builder: &PromptBuilder, steps: &[Step]) -> Vec<(String, Option<String>)> {
    let policy = context_policy(options).unwrap();
    shown(builder, &policy.carried(&Past { question: QUESTION, steps, document: &[], builder }))
}

fn as_it_was(step: &Step) -> (String, Option<String>) {
    (step.completion.clone(), step.observation.clone())
}

#[test]
fn mempo_carries_as_much_of_as_many_steps_as_it_is_told() {
    let builder = builder("mempo");
    let steps = remembering(&builder);
    let all: Vec<_> = steps.iter().map(as_it_was).collect();
    let carried = |options: ContextOptions, count: usize| carried(&options, &builder, &steps[..count]);
    assert_eq!(carried(options("mempo"), 0), []);
    assert_eq!(carried(options("mempo"), 3), all[2..]);
    assert_eq!(carried(ContextOptions { carry_steps: 2, ..options("mempo") }, 3), all[1..]);
    assert_eq!(carried(ContextOptions { carry_steps: 9, ..options("mempo") }, 2), all[..2]);

    let results = |step: usize| steps[step].observation.clone();
    let last = "<mem>red and then blue and no more colours</mem>".to_owned();
    let both = ContextOptions { carry: Carry::MemoryAndResults, ..options("mempo") };
    assert_eq!(carried(both.clone(), 3), [(last.clone(), results(2))]);
    assert_eq!(carried(both, 1), [(String::new(), results(0))], "the first step has no memory");
    let memory = ContextOptions { carry: Carry::Memory, ..options("mempo") };
    assert_eq!(carried(memory.clone(), 3), [(last, None)]);
    assert_eq!(carried(memory, 1), []);
}

#[test]
fn a_long_memory_is_cut_between_tokens_and_marked() {
    let builder = builder("mempo");
    let steps = remembering(&builder);
    let length = |text: &str| builder.tokenizer().encode_plain(text).len();
    let mark = length(mempo_text::CUT_MARK);
    let most = mark + 3;
    let capped = ContextOptions { max_memory_tokens: Some(most), ..options("mempo") };
    let (text, results) = carried(&capped, &builder, &steps).remove(0);
    assert_eq!(results, steps[2].observation);
    let (memory, rest) = text.split_once("</mem>").unwrap();
    assert_eq!(rest, steps[2].completion.split_once("</mem>").unwrap().1, "what follows the memory stays");
    let kept = memory.strip_prefix("<mem>").unwrap().strip_suffix(mempo_text::CUT_MARK).unwrap();
    assert!(!kept.is_empty() && steps[2].completion.contains(kept));
    assert_eq!(length(kept), 3);
    // Short enough as it is.
    let enough = length("red and then blue and no more colours");
    let wide = ContextOptions { max_memory_tokens: Some(enough), ..options("mempo") };
    assert_eq!(carried(&wide, &builder, &steps), [as_it_was(&steps[2])]);
}

#[test]
fn mem1_remembers_in_its_thoughts() {
    let builder = builder("mem1");
    let steps = [
        step(&builder, 0, "<think>first</think><search>red</search>", "It is red."),
        step(&builder, 1, "So: <think>it is red</think>\n<search>blue</search>", "It is blue."),
    ];
    let last = "<think>it is red</think>\n<search>blue</search>".to_owned();
    assert_eq!(carried(&options("mem1"), &builder, &steps), [(last.clone(), steps[1].observation.clone())]);
    let policy = context_policy(&options("mem1")).unwrap();
    let past = Past { question: QUESTION, steps: &steps, document: &[], builder: &builder };
    let prompt = builder.prompt(QUESTION, &policy.carried(&past)).unwrap();
    let text = builder.tokenizer().decode(&prompt);
    let expected = format!("{last}{}", steps[1].observation.as_deref().unwrap());
    assert!(text.ends_with(&expected), "one turn goes on: {text}");
    assert!(policy.needs_memory());
}

#[test]
fn retrieval_takes_the_steps_that_have_to_do_with_the_question() {
    let builder = builder("rag-memory");
    let about = |index, query: &str, results: &str| step(&builder, index, &call(query), results);
    let steps = [
        about(0, "weather", "It rains."),
        about(1, "that colour", "That colour is blue."),
        about(2, "weather", "It rains and rains."),
        about(3, "this colour", "What colour it is: red."),
        about(4, "weather", "Sun."),
    ];
    let of = |retrieved_steps, count: usize| {
        let options = ContextOptions { retrieved_steps, ..options("rag-memory") };
        carried(&options, &builder, &steps[..count])
    };
    let all: Vec<_> = steps.iter().map(as_it_was).collect();
    assert_eq!(of(2, 5), [&all[1], &all[3], &all[4]].map(Clone::clone));
    assert_eq!(of(9, 5), all);
    assert_eq!((of(2, 1), of(2, 0)), (all[..1].to_vec(), Vec::new()));
}

#[test]
fn notes_have_keywords_and_links_and_take_on_what_later_ones_add() {
    let builder = builder("a-mem");
    let about = |index, query: &str, results: &str| step(&builder, index, &call(query), results);
    let steps = [
        about(0, "capital Peru", "Lima is the capital of Peru <mem>."),
        about(1, "weather", "It rains on the roofs."),
        about(2, "Lima river", "The Rimac flows through Lima."),
        about(3, "more", "Nothing."),
    ];
    let policy = context_policy(&options("a-mem")).unwrap();
    let notes = |count: usize| {
        let past = Past {
            question: "Which river flows through Lima?",
            steps: &steps[..count],
            document: &[],
            builder: &builder,
        };
        let carried = policy.carried(&past);
        assert_eq!(shown(&builder, &carried), steps[..count].last().map(as_it_was).into_iter().collect::<Vec<_>>());
        carried
    };
    assert_eq!((notes(0).notes, notes(1).notes), (None, None));
    let carried = notes(4);
    let lines: Vec<String> = carried.notes.clone().unwrap().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 2, "the weather has nothing to do with it: {lines:?}");
    assert!(
        lines[0].starts_with("[1] capital Peru: Lima is the capital of Peru") && lines[0].contains("rimac"),
        "{lines:?}"
    );
    assert!(lines[1].starts_with("[3] Lima river: The Rimac flows through Lima.") && lines[1].ends_with("; see 1)"));
    let prompt = builder.tokenizer().decode(&builder.prompt(QUESTION, &carried).unwrap());
    assert!(prompt.contains("Notes of earlier steps:\n[1] capital Peru"), "{prompt}");
    assert!(!prompt.contains("Peru <mem>"), "results in notes are text from outside");
}

#[test]
fn a_reader_sees_one_chunk_after_the_other_and_then_its_memory() {
    let builder = builder("memagent");
    let policy = context_policy(&ContextOptions { chunk_tokens: Some(3), ..options("memagent") }).unwrap();
    let document: Vec<i32> = (10..18).collect();
    let mut read = step(&builder, 0, "It is red.", "");
    read.segments = row_segments(&builder.parse_memory(&read.completion_ids));
    let steps = [read.clone(), read.clone(), read];
    assert!(policy.reads_documents() && policy.needs_memory());
    assert_eq!(policy.reading_steps(&document), 3);
    for count in 0..=3 {
        let past = Past { question: QUESTION, steps: &steps[..count], document: &document, builder: &builder };
        let carried = policy.carried(&past);
        assert_eq!(carried.chunk.as_deref(), document.chunks(3).nth(count), "{count}");
        let memory = carried.memory.map(|ids| builder.tokenizer().decode(&ids));
        assert_eq!(memory, (count > 0).then(|| "It is red.".to_owned()));
        assert!(carried.steps.is_empty());
    }
}

#[test]
fn a_profile_that_cannot_show_what_is_read_is_refused() {
    let check = |context: &str, profile: &str| {
        let policy = context_policy(&options(context)).unwrap();
        check_profile(&*policy, &Profile::load(profile).unwrap())
    };
    for (context, profile) in [("memagent", "memagent"), ("full-document", "full-document"), ("mempo", "mempo")] {
        check(context, profile).unwrap();
    }
    for (profile, told) in [("mempo", "no `reading`"), ("full-document", "not `whole`")] {
        assert!(check("memagent", profile).unwrap_err().contains(told), "{profile}");
    }
    assert!(check("full-document", "react").unwrap_err().contains("no `reading`"));
}

#[test]
fn long_documents_lose_their_middle_or_their_beginning() {
    let document: Vec<i32> = (0..10).collect();
    let reader = |max_chunks| ContextOptions { chunk_tokens: Some(3), max_chunks, ..options("memagent") };
    let prepared = |options: &ContextOptions| context_policy(options).unwrap().prepare(document.clone());
    assert_eq!(prepared(&reader(None)), document);
    assert_eq!(prepared(&reader(Some(4))), document);
    assert_eq!(prepared(&reader(Some(2))), [0, 1, 2, 7, 8, 9]);
    assert_eq!(prepared(&reader(Some(1))), [0, 8, 9]);
    let whole = |last_tokens| ContextOptions { last_tokens, ..options("full-document") };
    assert_eq!((prepared(&whole(None)), prepared(&whole(Some(2)))), (document.clone(), vec![8, 9]));
    assert_eq!(context_policy(&whole(None)).unwrap().reading_steps(&document), 0);
}

#[test]
fn nothing_is_carried_where_there_is_to_be_no_past() {
    let builder = builder("none");
    let steps = remembering(&builder);
    for name in ["none", "closed-book"] {
        let policy = context_policy(&options(name)).unwrap();
        assert_eq!(
            policy.carried(&Past { question: QUESTION, steps: &steps, document: &[], builder: &builder }),
            Carried::default()
        );
        assert_eq!(policy.answers_at_once(), name == "closed-book");
    }
}

#[test]
fn an_option_of_another_policy_is_refused() {
    for wrong in [
        ContextOptions { carry_steps: 2, ..options("react") },
        ContextOptions { max_memory_tokens: Some(1), ..options("mem1") },
        ContextOptions { carry: Carry::Memory, ..options("rag-memory") },
        ContextOptions { retrieved_steps: 1, ..options("mempo") },
        ContextOptions { chunk_tokens: Some(1), ..options("mempo") },
        ContextOptions { last_tokens: Some(1), ..options("memagent") },
        ContextOptions { max_chunks: Some(1), ..options("full-document") },
        options("memory"),
    ] {
        assert!(context_policy(&wrong).is_err(), "{wrong:?}");
    }
}
