//! Question rows as question-answering data sets ship them.

use std::borrow::Cow;

use anyhow::{Context, bail};
use mempo_data::Objective;
use serde_json::Value;

use crate::rows::{Located, texts};

/// A row: one question with its gold answers, or several that belong together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Question {
    /// Its own id, or file name and line.
    pub(crate) id: String,
    pub(crate) source: String,
    pub(crate) split: String,
    /// Each question ends in `?`; the first of its answers is canonical.
    pub(crate) objectives: Vec<Objective>,
    pub(crate) metadata: Option<Value>,
    /// What no other question of its task may share.
    pub(crate) distinct: Vec<String>,
}

/// What a row lacks.
pub(crate) struct Defaults<'a> {
    pub(crate) source: &'a str,
    pub(crate) split: &'a str,
    /// The column that [`Question::distinct`] is read from.
    pub(crate) distinct: Option<&'a str>,
}

/// What a question is read from, beside the column that [`Question::distinct`] is.
pub(crate) const COLUMNS: [&str; 14] = [
    "id",
    "_id",
    "question",
    "query",
    "golden_answers",
    "answers",
    "answer",
    "source",
    "data_source",
    "split",
    "metadata",
    "prompt",
    "reward_model",
    "extra_info",
];

impl Question {
    /// Reads a row; also gives how many answers were left out because they hold `;`, which separates answers. Without any
    /// answer left there is no question.
    pub(crate) fn parse(row: &Located, defaults: &Defaults<'_>) -> anyhow::Result<(Option<Self>, u64)> {
        let row = &*plain(row);
        let place = &row.place;
        let mut objectives = objectives(row)?;
        let count =
            |objectives: &[Objective]| objectives.iter().map(|objective| objective.answers.len()).sum::<usize>();
        let all = count(&objectives);
        for objective in &mut objectives {
            objective.answers.retain(|answer| !answer.contains(';'));
        }
        let rejected = (all - count(&objectives)) as u64;
        if objectives.iter().any(|objective| objective.answers.is_empty()) {
            return Ok((None, rejected));
        }
        let question = Self {
            id: row.optional_text(&["id", "_id"])?.unwrap_or_else(|| file_name(place).to_owned()),
            source: row.optional_text(&["source", "data_source"])?.unwrap_or_else(|| defaults.source.to_owned()),
            split: row.optional_text(&["split"])?.unwrap_or_else(|| defaults.split.to_owned()),
            objectives,
            metadata: row.fields.get("metadata").cloned(),
            distinct: distinct(row, defaults.distinct)?,
        };
        Ok((Some(question), rejected))
    }
}

/// A row of verl's prompts for reinforcement learning with its question and answers where other rows have them: the question
/// from `extra_info`, or else what the user says last.
fn plain(row: &Located) -> Cow<'_, Located> {
    let Some(truth) = row.fields.get("reward_model").and_then(|reward| reward.get("ground_truth")) else {
        return Cow::Borrowed(row);
    };
    let said = |message: &&Value| message["role"] == "user";
    let prompt = row.fields.get("prompt").and_then(Value::as_array);
    let prompt = || Some(&prompt?.iter().rev().find(said)?["content"]);
    let question = row.fields.get("extra_info").and_then(|extra| extra.get("question")).or_else(prompt);
    let mut fields = row.fields.clone();
    fields.entry("golden_answers").or_insert_with(|| truth.get("target").unwrap_or(truth).clone());
    if let Some(question) = question {
        fields.entry("question").or_insert_with(|| question.clone());
    }
    Cow::Owned(Located { place: row.place.clone(), fields })
}

/// The row's question with its answers; or the `questions` that `extra_info` lists, or those that its prompt ends in, each with
/// a list of answers.
fn objectives(row: &Located) -> anyhow::Result<Vec<Objective>> {
    let place = &row.place;
    let answers = row.first_of(&["golden_answers", "answers", "answer"])?;
    let several = answers.as_array().filter(|lists| lists.iter().any(Value::is_array));
    let Some(lists) = several else {
        return Ok(vec![objective(place, &row.text(&["question", "query"])?, answers)?]);
    };
    let listed = row.fields.get("extra_info").and_then(|extra| texts(extra.get("questions")?));
    let questions = listed.or_else(|| asked(row, lists.len())).unwrap_or_default();
    if questions.len() != lists.len() {
        let (found, expected) = (questions.len(), lists.len());
        bail!(
            "{place}: answers of {expected} questions, expected as many in `extra_info.questions` or, joined by `; `, at the end of the prompt, found {found}"
        );
    }
    questions.iter().zip(lists).map(|(question, answers)| objective(place, question, answers)).collect()
}

/// Several questions in one text, as MEM1 asks them: after its rules and `questions:`, or else the last colon, joined by `; `.
/// Nothing where that does not give as many as there are lists of answers.
fn asked(row: &Located, count: usize) -> Option<Vec<String>> {
    let text = row.optional_text(&["question", "query"]).ok()??;
    let after =
        text.rsplit_once("questions:").or_else(|| text.rsplit_once(':')).map_or(text.as_str(), |(_, rest)| rest);
    let parts: Vec<String> = after.split("; ").map(|part| part.trim().to_owned()).collect();
    (count > 1 && parts.len() == count && parts.iter().all(|part| !part.is_empty())).then_some(parts)
}

fn objective(place: &str, question: &str, answers: &Value) -> anyhow::Result<Objective> {
    let question = question.trim();
    if question.is_empty() {
        bail!("{place}: the question is empty");
    }
    let question = if question.ends_with('?') { question.to_owned() } else { format!("{question}?") };
    let answers =
        texts(answers).with_context(|| format!("{place}: answers are expected as text or a list of texts"))?;
    let answers: Vec<String> =
        answers.iter().map(|answer| answer.trim().to_owned()).filter(|answer| !answer.is_empty()).collect();
    if answers.is_empty() {
        bail!("{place}: there is no answer; remove the row or give its answer");
    }
    Ok(Objective { question, answers })
}

fn distinct(row: &Located, column: Option<&str>) -> anyhow::Result<Vec<String>> {
    let Some(column) = column else {
        return Ok(Vec::new());
    };
    let value = row.first_of(&[column])?;
    texts(value).with_context(|| format!("{}: column `{column}` is expected to hold a list of texts", row.place))
}

/// The place without the folder, so that where a file lies changes nothing.
fn file_name(place: &str) -> &str {
    place.rsplit('/').next().unwrap_or(place)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(row: &Value, distinct: Option<&str>) -> anyhow::Result<(Option<Question>, u64)> {
        let fields = row.as_object().unwrap().clone();
        let row = Located { place: "data/nq.jsonl:7".to_owned(), fields };
        Question::parse(&row, &Defaults { source: "nq", split: "train", distinct })
    }

    fn objective(question: &str, answers: &[&str]) -> Objective {
        Objective { question: question.to_owned(), answers: answers.iter().map(ToString::to_string).collect() }
    }

    #[test]
    fn every_shape_of_answers_is_read() {
        for (column, value) in [
            ("golden_answers", json!(["Paris"])),
            ("answers", json!({"text": ["Paris"], "answer_start": [3]})),
            ("answer", json!(" Paris ")),
        ] {
            let (question, rejected) = parse(&json!({"query": "Where", column: value}), None).unwrap();
            let question = question.unwrap();
            assert_eq!((question.objectives, rejected), (vec![objective("Where?", &["Paris"])], 0));
            assert_eq!(
                (question.id.as_str(), question.source.as_str(), question.split.as_str()),
                ("nq.jsonl:7", "nq", "train")
            );
        }
        let hotpot = json!({"_id": "5a7a", "question": "When?", "answer": "1889", "supporting_facts": [["A", 0]]});
        assert_eq!(parse(&hotpot, None).unwrap().0.unwrap().id, "5a7a");
        let full = json!({"id": 3, "question": "When?", "answer": 1889, "data_source": "web", "split": "dev", "entities": ["E"]});
        let question = parse(&full, Some("entities")).unwrap().0.unwrap();
        assert_eq!((question.id.as_str(), question.source.as_str(), question.split.as_str()), ("3", "web", "dev"));
        assert_eq!(
            (question.objectives, question.distinct),
            (vec![objective("When?", &["1889"])], vec!["E".to_owned()])
        );
    }

    #[test]
    fn rows_of_verl_are_questions() {
        let truth = json!({"style": "rule", "ground_truth": {"target": ["Paris", "paris"]}});
        let prompt = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "Answer: where?"}]);
        let row = json!({"data_source": "searchR1_nq", "prompt": prompt, "reward_model": truth, "extra_info": {"question": "Where"}});
        let question = parse(&row, None).unwrap().0.unwrap();
        assert_eq!(question.source, "searchR1_nq");
        assert_eq!(question.objectives, [objective("Where?", &["Paris", "paris"])]);
        let row = json!({"prompt": prompt, "reward_model": {"ground_truth": "Paris"}, "extra_info": null});
        let question = parse(&row, None).unwrap().0.unwrap();
        assert_eq!(question.objectives, [objective("Answer: where?", &["Paris"])]);
        let truth = json!({"ground_truth": {"target": [["Paris"], ["1889", "89"]]}});
        let extra = json!({"questions": ["Where", "When?"]});
        let question = parse(&json!({"reward_model": truth, "extra_info": extra}), None).unwrap().0.unwrap();
        assert_eq!(question.objectives, [objective("Where?", &["Paris"]), objective("When?", &["1889", "89"])]);
    }

    #[test]
    fn mem1_s_rows_hold_their_questions_in_the_prompt() {
        let row = |content: &str| {
            json!({"data_source": "nq", "prompt": [{"role": "user", "content": content}], "extra_info": {"split": "train"},
                "reward_model": {"style": "rule", "ground_truth": {"target": [["Paris"], ["1889", "89"]]}}})
        };
        let expected = [objective("Where: land?", &["Paris"]), objective("When?", &["1889", "89"])];
        let content = "Rules: think; search. Answer the following questions: Where: land?; When?\n";
        assert_eq!(parse(&row(content), None).unwrap().0.unwrap().objectives, expected);
        let content = "Answer both: Where is it?; When";
        let expected = [objective("Where is it?", &["Paris"]), objective("When?", &["1889", "89"])];
        assert_eq!(parse(&row(content), None).unwrap().0.unwrap().objectives, expected);
        for content in ["Answer the following questions: Where?; When?; Who?", "Answer: Where?;", "Answer: Where?; "] {
            let error = parse(&row(content), None).unwrap_err().to_string();
            assert!(error.contains("answers of 2 questions") && error.contains("found 0"), "{content}: {error}");
        }
    }

    #[test]
    fn answers_with_the_separator_are_left_out_and_counted() {
        let (question, rejected) = parse(&json!({"question": "q", "answers": ["a; b", "c"]}), None).unwrap();
        assert_eq!((question.unwrap().objectives, rejected), (vec![objective("q?", &["c"])], 1));
        assert_eq!(parse(&json!({"question": "q", "answers": ["a;b"]}), None).unwrap(), (None, 1));
    }

    #[test]
    fn faults_name_file_and_line() {
        for (row, told) in [
            (json!({"answer": "x"}), "`question` or `query`, found of those that are read `answer`"),
            (json!({"question": "q"}), "`golden_answers` or `answers` or `answer`"),
            (json!({"question": "q", "answers": []}), "no answer"),
            (json!({"question": "q", "answers": [" "]}), "no answer"),
            (
                json!({"question": "q", "answers": [["nested"]]}),
                "answers of 1 questions, expected as many in `extra_info.questions` or, joined by `; `, at the end of the prompt, found 0",
            ),
            (json!({"question": "q", "answers": [{"a": 1}]}), "list of texts"),
            (json!({"question": " ", "answer": "x"}), "question is empty"),
            (json!({"question": "q", "answer": "x", "links": ["y"]}), "`entities`"),
        ] {
            let error = format!("{:#}", parse(&row, Some("entities")).unwrap_err());
            assert!(error.contains("data/nq.jsonl:7") && error.contains(told), "{row}: {error}");
        }
    }
}
