//! What a row of questions says of the passages that tell its answer.

use anyhow::{Context, bail};
use serde_json::Value;

use crate::rows::{Located, scalar, texts};

/// Columns that are read for it, beside `metadata`.
pub(crate) const COLUMNS: [&str; 4] = ["context", "supporting_facts", "doc_ids", "supporting_doc_ids"];

/// The passages of a row: documents of the corpus by their ids, and those that came with the row.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Evidence {
    pub(crate) ids: Vec<String>,
    pub(crate) passages: Vec<Passage>,
}

/// A passage in the row itself.
#[derive(Debug, PartialEq)]
pub(crate) struct Passage {
    pub(crate) title: String,
    pub(crate) text: String,
    /// Whether it tells the answer: its title is among the row's `supporting_facts`, or there are none.
    pub(crate) is_gold: bool,
}

impl Evidence {
    /// Reads `metadata.hops[].doc_id`, lists of ids as `doc_ids` or `supporting_doc_ids` (a column or in `metadata`), and
    /// HotpotQA's `context` with its `supporting_facts`.
    pub(crate) fn parse(row: &Located) -> anyhow::Result<Self> {
        let mut evidence = Self { ids: ids(row)?, passages: Vec::new() };
        if let Some(context) = row.fields.get("context") {
            evidence.passages = passages(context, row.fields.get("supporting_facts")).with_context(|| {
                format!(
                    "{}: column `context`: expected HotpotQA's {{\"title\": [...], \"sentences\": [[...]]}} or [[title, [sentences]], ...]",
                    row.place
                )
            })?;
        }
        if evidence.ids.is_empty() && !evidence.passages.iter().any(|passage| passage.is_gold) {
            let there: Vec<&str> = row.fields.keys().map(String::as_str).collect();
            bail!(
                "{}: does not say which documents tell its answer: expected `metadata.hops[].doc_id`, a list `doc_ids` or \
                 `supporting_doc_ids` (a column, or in `metadata`), or HotpotQA's `context`; found of those that are read `{}`",
                row.place,
                there.join("`, `")
            );
        }
        Ok(evidence)
    }
}

fn ids(row: &Located) -> anyhow::Result<Vec<String>> {
    let parsed = match row.fields.get("metadata") {
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_default(),
        Some(value) => value.clone(),
        None => Value::Null,
    };
    let mut found = Vec::new();
    for hop in parsed["hops"].as_array().into_iter().flatten() {
        found.extend(hop.get("doc_id").and_then(scalar));
    }
    for name in ["doc_ids", "supporting_doc_ids"] {
        for value in [row.fields.get(name), parsed.get(name)].into_iter().flatten() {
            let ids = texts(value);
            found.extend(ids.with_context(|| format!("{}: `{name}` is expected to be a list of ids", row.place))?);
        }
    }
    Ok(found)
}

fn passages(context: &Value, supporting_facts: Option<&Value>) -> Option<Vec<Passage>> {
    let gold = match supporting_facts {
        Some(Value::Object(fields)) => Some(texts(fields.get("title")?)?),
        Some(Value::Array(pairs)) => Some(pairs.iter().map(|pair| scalar(pair.get(0)?)).collect::<Option<_>>()?),
        Some(_) => return None,
        None => None,
    };
    let pairs: Vec<(&Value, &Value)> = match context {
        Value::Object(fields) => {
            let (titles, sentences) = (fields.get("title")?.as_array()?, fields.get("sentences")?.as_array()?);
            (titles.len() == sentences.len()).then(|| titles.iter().zip(sentences).collect())?
        }
        Value::Array(pairs) => pairs.iter().map(|pair| Some((pair.get(0)?, pair.get(1)?))).collect::<Option<_>>()?,
        _ => return None,
    };
    let passage = |(title, sentences): (&Value, &Value)| {
        let title = scalar(title)?;
        let is_gold = gold.as_ref().is_none_or(|titles: &Vec<String>| titles.contains(&title));
        // Sentences after the first begin with their own space.
        Some(Passage { title, text: texts(sentences)?.concat(), is_gold })
    };
    pairs.into_iter().map(passage).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(row: &Value) -> anyhow::Result<Evidence> {
        Evidence::parse(&Located { place: "q.jsonl:3".to_owned(), fields: row.as_object().unwrap().clone() })
    }

    #[test]
    fn ids_stand_in_metadata_or_columns() {
        for row in [
            json!({"metadata": {"hops": [{"doc_id": "a"}, {"doc_id": 7}]}}),
            json!({"metadata": "{\"doc_ids\": [\"a\", \"7\"]}"}),
            json!({"supporting_doc_ids": ["a", 7]}),
            json!({"doc_ids": ["a"], "metadata": {"supporting_doc_ids": [7]}}),
        ] {
            assert_eq!(parse(&row).unwrap().ids, ["a", "7"], "{row}");
        }
    }

    #[test]
    fn hotpotqa_is_read_in_both_its_forms() {
        let row = json!({
            "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
            "supporting_facts": {"title": ["B"], "sent_id": [0]},
        });
        let lists = json!({"context": [["A", ["One.", " Two."]], ["B", ["Three."]]], "supporting_facts": [["B", 0]]});
        let passage = |title: &str, text: &str, is_gold| Passage { title: title.into(), text: text.into(), is_gold };
        let expected = [passage("A", "One. Two.", false), passage("B", "Three.", true)];
        assert_eq!(parse(&row).unwrap().passages, expected);
        assert_eq!(parse(&lists).unwrap().passages, expected);
        let all = parse(&json!({"context": lists["context"]})).unwrap().passages;
        assert!(all.iter().all(|passage| passage.is_gold));
    }

    #[test]
    fn a_row_that_says_nothing_is_told_what_was_looked_for() {
        for (row, told) in [
            (json!({"question": "Where?"}), "`question`"),
            (json!({"context": "a text"}), "HotpotQA's {\"title\""),
            (json!({"context": {"title": ["A"], "sentences": []}}), "HotpotQA's {\"title\""),
            (json!({"doc_ids": [[1]]}), "`doc_ids` is expected to be a list of ids"),
            (json!({"context": [["A", ["One."]]], "supporting_facts": [["C", 0]]}), "does not say which"),
        ] {
            let error = format!("{:#}", parse(&row).unwrap_err());
            assert!(error.contains("q.jsonl:3") && error.contains(told), "{error}");
        }
    }
}
