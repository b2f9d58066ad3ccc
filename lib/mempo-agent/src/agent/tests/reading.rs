//! Trajectories that read a document chunk by chunk.

use super::*;

#[test]
fn a_reader_writes_a_memory_for_each_chunk_and_answers_from_the_last() {
    let builder = builder("memagent");
    let context = MemAgent { chunk_tokens: 4, max_chunks: None };
    let document = builder.tokenizer().encode_untrusted("one two three four five six");
    let chunks = document.len().div_ceil(4);
    assert!(chunks >= 3);
    let play = |script: &dyn Fn(usize) -> (&'static str, StopReason)| {
        let said = |call: usize, _, _| Ok((script(call).0.to_owned(), script(call).1));
        let mut engine = Scripted { builder: &builder, calls: Vec::new(), bytewise: false, script: said };
        let setting =
            Setting { context: &context, limits: LimitOptions { max_steps: 1, ..LIMITS }, ..Setting::new(&builder) };
        let task = task("a");
        let start = |trajectory_index| Start { task: &task, trajectory_index, steps: &[], document: &document };
        let unit = setting.with_agent(|agent| agent.run(&mut engine, vec![start(0), start(1)]).unwrap());
        assert_eq!(engine.calls, vec![2; chunks + 1], "a step of the group is one batch");
        (unit.trajectories[0].clone(), unit.steps[..=chunks].to_vec())
    };
    let (trajectory, steps) = play(&|call| match call {
        0 => ("red \\boxed{no}", StopReason::MaxTokens),
        call if call < chunks => ("red; blue", StopReason::Eos),
        _ => ("\\boxed{red; blue}", StopReason::Eos),
    });
    assert_eq!((trajectory.status, trajectory.reward, trajectory.tool_calls), (Status::Ok, Some(1.0), 0));
    assert_eq!((trajectory.answer.as_deref(), trajectory.step_count as usize), (Some("red; blue"), chunks + 1));
    let told = |step: usize| builder.tokenizer().decode(&steps[step].prompt_ids);
    for (index, chunk) in document.chunks(4).enumerate() {
        assert!(contains(&steps[index].prompt_ids, chunk), "{index}");
    }
    assert!(told(0).contains("No previous memory") && told(1).contains("red \\boxed{no}"));
    assert!(told(chunks).contains("red; blue") && !told(chunks).contains("<section>"));
    let kinds = |step: &Step| step.segments.iter().map(|segment| segment.kind).collect::<Vec<_>>();
    assert!(steps[..chunks].iter().all(|step| kinds(step) == [SegmentKind::Memory]));
    assert_eq!(kinds(&steps[chunks]), [SegmentKind::Answer]);

    let (trajectory, _) = play(&|call| (if call < chunks { "red" } else { "red; blue" }, StopReason::Eos));
    assert_eq!((trajectory.status, trajectory.reward), (Status::ParseError, Some(0.0)), "no box");
    let (trajectory, _) = play(&|call| (if call == 1 { "" } else { "\\boxed{red; blue}" }, StopReason::Eos));
    assert_eq!((trajectory.format_valid, trajectory.reward), (false, Some(0.0)), "an empty memory");
}

#[test]
fn a_box_far_from_the_end_earns_nothing_by_memagent_s_rule() {
    let builder = builder("full-document");
    let context = FullDocument { last_tokens: None };
    // The box takes 17 of the 300 characters, what ends the turn none.
    for (reward, after, earned) in [
        (RewardKind::Boxed, 10, 1.0),
        (RewardKind::Boxed, 283, 1.0),
        (RewardKind::Boxed, 284, 0.0),
        (RewardKind::SubExactMatch, 300, 1.0),
    ] {
        let setting = Setting { context: &context, reward, ..Setting::new(&builder) };
        let (trajectory, _) = setting.play(&[&format!("\\boxed{{red; blue}}{}", ".".repeat(after))]);
        assert_eq!((trajectory.status, trajectory.reward), (Status::Ok, Some(earned)), "{reward:?} {after}");
        assert_eq!(trajectory.exact_match, [1.0, 1.0]);
    }
}

#[test]
fn a_document_is_read_at_once_or_its_end() {
    let builder = builder("full-document");
    let document = builder.tokenizer().encode_untrusted("one two three four five six");
    for last_tokens in [None, Some(3)] {
        let context = FullDocument { last_tokens };
        let read = context.prepare(document.clone());
        assert_eq!(read, document[document.len() - last_tokens.unwrap_or(document.len())..]);
        let said = |_, _, _| Ok(("\\boxed{red; blue}".to_owned(), StopReason::Eos));
        let mut engine = Scripted { builder: &builder, calls: Vec::new(), bytewise: false, script: said };
        let setting = Setting { context: &context, ..Setting::new(&builder) };
        let task = task("a");
        let start = Start { task: &task, trajectory_index: 0, steps: &[], document: &read };
        let unit = setting.with_agent(|agent| agent.run(&mut engine, vec![start]).unwrap());
        let (trajectory, steps) = (&unit.trajectories[0], &unit.steps);
        assert_eq!((trajectory.status, trajectory.reward, steps.len()), (Status::Ok, Some(1.0), 1), "{trajectory:?}");
        assert!(contains(&steps[0].prompt_ids, &read));
        assert_eq!(contains(&steps[0].prompt_ids, &document), last_tokens.is_none());
    }
}
