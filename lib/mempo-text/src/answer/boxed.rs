//! Answers in a box, as `\boxed{Paris}`, compared as in the MATH data set (Hendrycks et al. 2021): MemAgent's reward.

/// Where MemAgent's reward looks for the box: the last characters of what was said.
const WINDOW: usize = 300;

/// What stands in the last box, trimmed: `\boxed{...}` up to the brace that closes it, or `\boxed ...` up to a `$` or the
/// end. One that is not closed is none.
///
/// ```
/// assert_eq!(mempo_text::answer::boxed_answer(r"so \boxed{\frac{1}{2}}.").as_deref(), Some(r"\frac{1}{2}"));
/// assert_eq!(mempo_text::answer::boxed_answer(r"\boxed{a} or \boxed{b").as_deref(), Some("a"));
/// ```
pub fn boxed_answer(text: &str) -> Option<String> {
    let inside = text.rmatch_indices(r"\boxed").find_map(|(start, word)| inside_box(&text[start + word.len()..]))?;
    Some(inside.trim().to_owned())
}

/// What stands in a box, given what follows its name.
fn inside_box(rest: &str) -> Option<&str> {
    let opened = rest.trim_start();
    match opened.strip_prefix('{') {
        Some(inside) => Some(&inside[..closing_brace(inside)?]),
        None if opened.len() < rest.len() => opened.split('$').next(),
        None => None,
    }
}

/// Where the brace stands that closes one opened before `text`. A backslash before a brace changes nothing.
fn closing_brace(text: &str) -> Option<usize> {
    let mut open = 1;
    for (place, character) in text.char_indices() {
        match character {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(place);
        }
    }
    None
}

/// Whether what stands in the last box of `text` is one of the accepted answers, in lower case and cleaned as MATH's answers
/// are. Only the last 300 characters are looked at.
pub fn boxed_match(text: &str, answers: &[String]) -> bool {
    let start = text.char_indices().rev().nth(WINDOW - 1).map_or(0, |(start, _)| start);
    boxed_answer(&text[start..].to_lowercase()).is_some_and(|given| equal_when_cleaned(&given, answers))
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
            assert_eq!(boxed_match(&case.text, &case.answers), case.r#match, "{:?}", case.text);
            if let Some(given) = case.boxed.filter(|_| case.text.chars().count() <= WINDOW) {
                assert_eq!(equal_when_cleaned(&given, &case.answers), case.r#match, "{:?}", case.text);
            }
        }
    }
}
