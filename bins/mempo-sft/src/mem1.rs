//! Rows of MEM1's rollouts (arXiv 2506.15841): `q`, then for each turn `t0` (its thought), `r0` (what it wrote), `i0` (what
//! came back), `t1`, ….
//!
//! In the files that MEM1's own scripts write, `r0` is the whole response and holds `t0` already; its builder of examples
//! joins the two, so that each thought is there twice. Here `t0` is put before `r0` only where `r0` does not hold it.

use serde_json::{Map, Value};

use crate::chat::{Demonstration, Ignored, Turn, observe};
use crate::record::text_of;

/// The trajectory of a row.
pub(crate) fn demonstration(row: &Map<String, Value>) -> Result<Demonstration, String> {
    let question = part(row, "q")?.ok_or("no column `q`, which holds the question")?;
    if question.trim().is_empty() {
        return Err("`q` is empty: there is no question".to_owned());
    }
    let mut turns: Vec<Turn> = Vec::new();
    loop {
        let index = turns.len();
        let (thought, response) = (part(row, &format!("t{index}"))?, part(row, &format!("r{index}"))?);
        let Some(completion) = completion(thought, response) else { break };
        if turns.last().is_some_and(|turn| turn.observation.is_none()) {
            return Err(format!(
                "no `i{}` between `r{}` and turn {index}: what came back is missing",
                index - 1,
                index - 1
            ));
        }
        let mut observation = None;
        if let Some(found) = part(row, &format!("i{index}"))?.filter(|found| !found.trim().is_empty()) {
            observe(&mut observation, without_hint(&found));
        }
        turns.push(Turn { completion, observation, trained: true });
    }
    if turns.is_empty() {
        return Err("neither `t0` nor `r0`: the row has no targets".to_owned());
    }
    let is_late = |(name, value): &(&String, &Value)| {
        let is_there = !value.is_null() && value.as_str().is_none_or(|text| !text.trim().is_empty());
        is_there && turn_of(name).is_some_and(|turn| turn > turns.len() as u64)
    };
    match row.iter().find(is_late) {
        Some((name, _)) => Err(format!("`{name}`, but no turn {}: the turns have a gap", turns.len())),
        None => Ok(Demonstration { question, turns, ignored: Ignored::new() }),
    }
}

/// What came back without how many turns were left: that is the profile's to say.
fn without_hint(found: &str) -> &str {
    let inside = found.trim_start();
    let inside = inside.strip_prefix("<information>").unwrap_or(inside).trim_start();
    match inside.strip_prefix("[HINT]").and_then(|rest| rest.split_once("[/HINT]")) {
        Some((_, rest)) => rest.trim_end().trim_end_matches("</information>").trim(),
        None => found,
    }
}

/// What was written in a turn.
fn completion(thought: Option<String>, response: Option<String>) -> Option<String> {
    let written = |text: Option<String>| text.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    match (written(thought), written(response)) {
        (Some(thought), Some(response)) if !response.contains(&thought) => Some(format!("{thought}\n{response}")),
        (thought, response) => response.or(thought),
    }
}

/// A column as text; null is as if it were not there.
fn part(row: &Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    let value = row.get(name).filter(|value| !value.is_null());
    value.map(|value| text_of(value.clone(), name)).transpose()
}

/// The turn that a column is of.
fn turn_of(name: &str) -> Option<u64> {
    name.strip_prefix(['t', 'r'])?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(row: &Value) -> Result<Demonstration, String> {
        demonstration(row.as_object().unwrap())
    }

    #[test]
    fn a_response_that_holds_its_thought_is_not_doubled() {
        let row = json!({
            "q": "Who?; When?", "t0": "<think>a</think>", "r0": "<think>a</think>\n<search>x</search>",
            "i0": "\n\n<information>\n[HINT]You have 4 turns left.[/HINT]\n\nDoc 1\n</information>\n\n", "t1": "<think>b</think>", "r1": "<answer>Ann; 1</answer>",
            "i1": null, "t2": null, "r2": null, "i2": null, "t3": null, "r3": "", "Golden_answer": [["Ann"], ["1"]], "Exact_match": 2, "time_taken": 3.5,
        });
        let found = read(&row).unwrap();
        let turns: Vec<_> =
            found.turns.iter().map(|turn| (turn.completion.as_str(), turn.observation.as_deref())).collect();
        assert_eq!(found.question, "Who?; When?");
        assert_eq!(
            turns,
            [
                ("<think>a</think>\n<search>x</search>", Some("Doc 1")),
                ("<think>b</think>\n<answer>Ann; 1</answer>", None)
            ]
        );
    }

    #[test]
    fn refusals_say_what_was_found() {
        let check = |row: Value, expected: &str| {
            let error = read(&row).unwrap_err();
            assert!(error.contains(expected), "{row}\n  found    {error}\n  expected {expected}");
        };
        check(json!({"t0": "a"}), "no column `q`");
        check(json!({"q": " ", "r0": "a"}), "`q` is empty");
        check(json!({"q": "Who?", "t0": "", "r0": null}), "neither `t0` nor `r0`");
        check(json!({"q": "Who?", "r0": "a", "r1": "b"}), "no `i0` between `r0` and turn 1");
        check(json!({"q": "Who?", "r0": "a", "i0": "x", "r2": "b"}), "`r2`, but no turn 1");
        check(json!({"q": "Who?", "r0": ["a"]}), "`r0` is a list, expected text");
    }
}
