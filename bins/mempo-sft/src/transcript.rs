//! One text in which a policy and its world take turns, as Search-R1 and MEM1 log it: `… </tool_call><information>found
//! </information> …`.

use crate::chat::{Demonstration, Ignored, Turn};

/// What stands around what came back.
const TAGS: [(&str, &str); 2] = [("<information>", "</information>"), ("<tool_response>", "</tool_response>")];

/// The turns of a transcript: all that is not between the tags is the policy's.
pub(crate) fn split(question: &str, text: &str) -> Result<Demonstration, String> {
    let mut turns = Vec::new();
    let mut rest = text;
    while let Some((at, (opening, closing))) = next(rest) {
        let (completion, after) = (rest[..at].trim(), &rest[at + opening.len()..]);
        let end = after.find(closing).ok_or_else(|| format!("{opening} without {closing}"))?;
        if completion.is_empty() {
            return Err(format!("{opening} follows nothing: expected what the policy wrote before it"));
        }
        let observation = Some(after[..end].trim().to_owned());
        turns.push(Turn { completion: completion.to_owned(), observation, trained: true });
        rest = &after[end + closing.len()..];
    }
    if !rest.trim().is_empty() {
        turns.push(Turn { completion: rest.trim().to_owned(), observation: None, trained: true });
    }
    if turns.is_empty() {
        return Err("the transcript is empty: there is nothing to learn".to_owned());
    }
    Ok(Demonstration { question: question.to_owned(), turns, ignored: Ignored::new() })
}

/// The first opening tag and its place.
fn next(text: &str) -> Option<(usize, (&'static str, &'static str))> {
    TAGS.into_iter().filter_map(|tags| Some((text.find(tags.0)?, tags))).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(completion: &str, observation: Option<&str>) -> Turn {
        Turn { completion: completion.to_owned(), observation: observation.map(str::to_owned), trained: true }
    }

    #[test]
    fn a_transcript_is_cut_at_what_came_back() {
        let text = "<mem></mem><tool_call>a</tool_call>\n\n<information>Doc 1 <b>\n</information>\n\n<mem>x</mem> \
                    <tool_call>b</tool_call><tool_response>y</tool_response><answer>Ann</answer>\n";
        let found = split("Who?", text).unwrap();
        let expected = [
            turn("<mem></mem><tool_call>a</tool_call>", Some("Doc 1 <b>")),
            turn("<mem>x</mem> <tool_call>b</tool_call>", Some("y")),
            turn("<answer>Ann</answer>", None),
        ];
        assert_eq!((found.question.as_str(), found.turns.as_slice()), ("Who?", expected.as_slice()));
    }

    #[test]
    fn what_is_no_transcript_is_refused() {
        for (text, told) in [
            (" \n", "nothing to learn"),
            ("<information>x</information>", "<information> follows nothing"),
            ("a<information>x", "<information> without </information>"),
            ("a<tool_response>x</information>", "<tool_response> without </tool_response>"),
        ] {
            let error = split("q", text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
