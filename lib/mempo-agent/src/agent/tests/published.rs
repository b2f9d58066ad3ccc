//! Whole trajectories as agents of published checkpoints have them.

use super::*;
use crate::Mem1;

/// What follows each completion in the prompt of the next.
fn follows(steps: &[Step]) {
    for pair in steps.windows(2) {
        let said = [pair[0].completion_ids.as_slice(), pair[0].observation_ids.as_deref().unwrap()].concat();
        assert!(pair[1].prompt_ids.ends_with(&said), "{:?}", pair[0].observation);
    }
}

#[test]
fn mem1_remembers_its_last_thought_and_ends_where_it_neither_searches_nor_answers() {
    let builder = builder("mem1");
    let setting = Setting { context: &Mem1, ..Setting::new(&builder) };
    let search = "<think>nothing yet</think><search>red</search>";
    let (trajectory, steps) = setting.play(&[
        search,
        "<think>red</think><search>blue</search>",
        "<think>both</think><answer>red; blue</answer>",
    ]);
    assert_eq!((trajectory.status, trajectory.reward), (Status::Ok, Some(1.0)), "{:?}", trajectory.error);
    assert_eq!((trajectory.format_valid, trajectory.tool_calls, steps.len()), (true, 2, 3));
    follows(&steps);
    assert!(!contains(&steps[2].prompt_ids, &steps[0].completion_ids), "older steps are dropped");
    let told = steps[0].observation.as_ref().unwrap();
    let results = "[HINT]You have 3 turns left.[/HINT]\n\nDoc 1(Title: red) It is red.\n\n</information>";
    assert!(told.contains(results), "{told}");
    let (trajectory, steps) = setting.play(&[search, "<think>red</think> It is red."]);
    assert_eq!((trajectory.status, trajectory.reward, steps.len()), (Status::ParseError, Some(0.0), 2));
}

#[test]
fn search_r1_is_corrected_in_its_own_words_and_goes_on() {
    let builder = builder("search-r1");
    let setting = Setting { context: &React, ..Setting::new(&builder) };
    let (search, answer) = ("<think>look</think><search>red</search>", "<think>so</think><answer>red; blue</answer>");
    let correction = builder.profile().correction.clone().unwrap();
    let (trajectory, steps) = setting.play(&[search, answer]);
    assert_eq!((trajectory.status, trajectory.reward, trajectory.format_valid), (Status::Ok, Some(1.0), true));
    assert_eq!(
        steps[0].observation.as_deref(),
        Some("\n\n<information>Doc 1(Title: red) It is red.\n</information>\n\n")
    );
    follows(&steps);
    for wrong in ["<think>It is red.</think>", "<search></search>", "<search>{\"name\": </search>", "red blue[max]"] {
        let (trajectory, steps) = setting.play(&[wrong, search, answer]);
        assert_eq!((trajectory.status, trajectory.step_count), (Status::Ok, 3), "{wrong}: {:?}", trajectory.error);
        assert_eq!(
            (trajectory.format_valid, trajectory.reward, trajectory.tool_calls),
            (false, Some(0.0), 1),
            "{wrong}"
        );
        assert_eq!(trajectory.exact_match, [1.0, 1.0], "{wrong}");
        assert_eq!(steps[0].observation.as_ref(), Some(&correction), "{wrong}");
        follows(&steps);
    }
    let (trajectory, steps) = setting.play(&["It is red."]);
    assert_eq!((trajectory.status, trajectory.reward, steps.len()), (Status::ParseError, Some(0.0), 4));
    assert!(steps[2].observation.is_some() && steps[3].observation.is_none());
}
