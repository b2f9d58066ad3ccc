//! Comparison of answers as in SQuAD and HotpotQA: normalised exact match and word-level F1; as in RULER-HQA: either in the
//! other; as in MATH: in a box.
//!
//! The arithmetic is that of the `evaluate` scripts of the datasets (Rajpurkar et al. 2016, Yang et al. 2018),
//! down to Python's idea of a word and of white space.

mod boxed;

pub(crate) use boxed::last_box;
pub use boxed::{box_is_in_sight, boxed_answer, equal_when_cleaned};

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

/// A word as Python's `\w` sees it: letters, numbers, underscore, no combining marks.
static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").expect("a constant pattern compiles"));

/// Lower case, ASCII punctuation deleted, then the words `a`, `an`, `the` dropped, then white space squeezed.
///
/// ```
/// assert_eq!(mempo_text::answer::normalize(" The U.S. Open! "), "us open");
/// ```
pub fn normalize(text: &str) -> String {
    let mut text = text.to_lowercase();
    text.retain(|character| !character.is_ascii_punctuation());
    let text = WORD.replace_all(&text, |word: &regex::Captures| match &word[0] {
        "a" | "an" | "the" => " ".to_owned(),
        word => word.to_owned(),
    });
    let words: Vec<&str> = text.split(is_python_space).filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

/// Python's `str.split()` also splits at the four ASCII information separators.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Whether the prediction equals one of the accepted answers once both are normalised.
pub fn exact_match(prediction: &str, answers: &[String]) -> bool {
    let prediction = normalize(prediction);
    answers.iter().any(|answer| normalize(answer) == prediction)
}

/// Whether one of the accepted answers stands in the prediction, or the prediction in it, once both are normalised: the
/// `sub_em` of RULER-HQA (MemAgent, arXiv 2507.02259), which asks for the first answer only. Nothing said is no answer, and
/// what normalising leaves nothing of stands in no text, so every exact match counts here, too.
///
/// ```
/// assert!(mempo_text::answer::sub_exact_match("It is Paris, I think.", &["paris".to_owned()]));
/// ```
pub fn sub_exact_match(prediction: &str, answers: &[String]) -> bool {
    let given = normalize(prediction);
    let said = prediction.split(is_python_space).any(|word| !word.is_empty());
    let within = |text: &str, part: &str| !part.is_empty() && text.contains(part);
    let matches = |answer: String| given == answer || within(&given, &answer) || within(&answer, &given);
    said && answers.iter().map(|answer| normalize(answer)).any(matches)
}

/// Word-level F1 in [0, 1], words counted as often as they occur, the best over the accepted answers.
///
/// `yes`, `no` and `noanswer` count only as a whole (HotpotQA's rule).
pub fn f1(prediction: &str, answers: &[String]) -> f64 {
    let prediction = normalize(prediction);
    answers.iter().map(|answer| f1_of_normalized(&prediction, &normalize(answer))).fold(0.0, f64::max)
}

fn f1_of_normalized(prediction: &str, answer: &str) -> f64 {
    let closed = |text: &str| matches!(text, "yes" | "no" | "noanswer");
    if prediction != answer && (closed(prediction) || closed(answer)) {
        return 0.0;
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in answer.split_ascii_whitespace() {
        *left.entry(word).or_default() += 1;
    }
    let answer_words: usize = left.values().sum();
    let mut prediction_words = 0usize;
    let mut common = 0usize;
    for word in prediction.split_ascii_whitespace() {
        prediction_words += 1;
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let precision = common as f64 / prediction_words as f64;
    let recall = common as f64 / answer_words as f64;
    2.0 * precision * recall / (precision + recall)
}

/// The answers in the text of an `<answer>`: cut at `;`, trimmed. Empty ones in the middle keep their place, empty
/// ones at the end are dropped.
///
/// ```
/// assert_eq!(mempo_text::answer::split_answers("Paris; ; 1889;"), ["Paris", "", "1889"]);
/// ```
pub fn split_answers(text: &str) -> Vec<String> {
    let mut answers: Vec<String> = text.split(';').map(|answer| answer.trim().to_owned()).collect();
    while answers.last().is_some_and(String::is_empty) {
        answers.pop();
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        prediction: String,
        answers: Vec<String>,
        normalized: String,
        exact_match: bool,
        sub_exact_match: bool,
        f1: f64,
    }

    #[test]
    fn same_as_the_python_reference() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../tests/golden/answers.json")).unwrap();
        assert!(cases.len() > 60);
        for case in cases {
            assert_eq!(normalize(&case.prediction), case.normalized, "{:?}", case.prediction);
            assert_eq!(exact_match(&case.prediction, &case.answers), case.exact_match, "{:?}", case.prediction);
            let found = sub_exact_match(&case.prediction, &case.answers);
            assert_eq!(found, case.sub_exact_match, "{:?}", case.prediction);
            let score = f1(&case.prediction, &case.answers);
            assert!((score - case.f1).abs() < 1e-12, "{:?}: {score} != {}", case.prediction, case.f1);
        }
    }

    #[test]
    fn answers_are_split_by_position() {
        for (text, expected) in
            [("", vec![]), (" ; ", vec![]), ("a", vec!["a"]), ("a; b ;c", vec!["a", "b", "c"]), (";b", vec!["", "b"])]
        {
            assert_eq!(split_answers(text), expected, "{text:?}");
        }
    }
}
