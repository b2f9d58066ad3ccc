//! Answers in a box, as `\boxed{Paris}`, compared as in the MATH data set (Hendrycks et al. 2021): MemAgent's reward.

use std::ops::Range;

/// Where MemAgent's reward looks for the box: the last characters of what was said.
const WINDOW: usize = 300;

/// What stands in the last box, trimmed: `\boxed{...}` up to the brace that closes it, or `\boxed ...` up to a `$` or the
/// end. None if there is no box, or the last one is not closed.
///
/// ```
/// assert_eq!(mempo_text::answer::boxed_answer(r"so \boxed{\frac{1}{2}}.").as_deref(), Some(r"\frac{1}{2}"));
/// assert_eq!(mempo_text::answer::boxed_answer(r"\boxed{a} or \boxed{b"), None);
/// ```
pub fn boxed_answer(text: &str) -> Option<String> {
    let (_, inside) = last_box(text.as_bytes())?;
    Some(text[inside].trim().to_owned())
}

/// Where the last box stands in bytes of text, and what is in it.
pub(crate) fn last_box(text: &[u8]) -> Option<(Range<usize>, Range<usize>)> {
    const WORD: &[u8] = br"\boxed";
    let opens = |next: &u8| *next == b'{' || next.is_ascii_whitespace();
    let after = |start: &usize| text[*start..].starts_with(WORD) && text.get(start + WORD.len()).is_some_and(opens);
    let start = (0..text.len()).rev().find(after)?;
    let spaces = text[start + WORD.len()..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    let begin = start + WORD.len() + spaces;
    if text.get(begin) == Some(&b'{') {
        let end = begin + 1 + closing_brace(&text[begin + 1..])?;
        return Some((start..end + 1, begin + 1..end));
    }
    let end = text[begin..].iter().position(|byte| *byte == b'$').map_or(text.len(), |at| begin + at);
    Some((start..end, begin..end))
}

/// Where the brace stands that closes one opened before `text`. A backslash before a brace changes nothing.
fn closing_brace(text: &[u8]) -> Option<usize> {
    let mut open = 1;
    text.iter().position(|byte| {
        open += i32::from(*byte == b'{') - i32::from(*byte == b'}');
        open == 0
    })
}

/// Whether the last box of `text`, if there is one, begins among the last 300 characters: MemAgent's reward sees no other.
pub fn box_is_in_sight(text: &str) -> bool {
    let start = text.char_indices().rev().nth(WINDOW - 1).map_or(0, |(start, _)| start);
    last_box(text.as_bytes()).is_none_or(|(range, _)| range.start >= start)
}

/// Whether an answer, taken out of its box, is one of the accepted ones, in lower case and cleaned as MATH's answers are.
///
/// ```
/// assert!(mempo_text::answer::equal_when_cleaned(r"\dfrac{1}{2} \%", &[r"\frac{1}{2}".to_owned()]));
/// ```
pub fn equal_when_cleaned(given: &str, answers: &[String]) -> bool {
    let given = clean(&given.to_lowercase());
    answers.iter().any(|answer| clean(&answer.to_lowercase()) == given)
}

/// Writes one way what LaTeX can write in several: no line breaks, spaces, size commands, degrees, dollars, percents; nothing
/// from a `\text{ ` on, which is a unit; every fraction as `\frac`; a zero before a decimal point that begins a number.
fn clean(text: &str) -> String {
    let mut text = text.to_owned();
    for (found, instead) in [
        ("\n", ""),
        (r"\!", ""),
        (r"\\", r"\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ] {
        text = text.replace(found, instead);
    }
    if let Some((number, _unit)) = text.split_once(r"\text{ ") {
        text.truncate(number.len());
    }
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.");
    if text.starts_with('.') {
        text.insert(0, '0');
    }
    text.replace(' ', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        answers: Vec<String>,
        boxed: Option<String>,
        r#match: bool,
    }

    #[test]
    fn same_as_the_python_reference() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/golden/boxes.json")).unwrap();
        assert!(cases.len() > 60);
        for case in cases {
            assert_eq!(boxed_answer(&case.text), case.boxed, "{:?}", case.text);
            // There, upper and lower case are one from the start; an agent has to write the command as it is.
            let given = boxed_answer(&case.text.to_lowercase()).filter(|_| box_is_in_sight(&case.text));
            let is_right = given.is_some_and(|given| equal_when_cleaned(&given, &case.answers));
            assert_eq!(is_right, case.r#match, "{:?}", case.text);
        }
    }
}
