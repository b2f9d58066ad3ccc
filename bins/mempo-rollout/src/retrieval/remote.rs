//! Search by a server that speaks Search-R1's protocol.

use mempo_agent::Search;
use mempo_data::Document;
use serde_json::{Value, json};

use super::{PATH, split_contents};
use crate::http::{self, Client, Failure};

/// A server's address, with or without what queries are sent to.
pub(crate) fn address(text: &str) -> Result<String, String> {
    http::address(text.trim_end_matches('/').trim_end_matches(PATH))
}

/// Asks a server, one query at a time.
pub(crate) struct RemoteSearch(pub(crate) Client);

impl Search for RemoteSearch {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        let body = json!({"queries": [query], "topk": top_k, "return_scores": true});
        let found = self.0.ask(PATH, Some(&body), |answer| read_documents(answer, top_k).map_err(Failure::One));
        found.map_err(|failure| format!("{}{PATH}: {}", self.0.url(), failure.problem()))
    }
}

/// At most so many documents of the answer to one query, with scores or without.
fn read_documents(answer: &Value, most: usize) -> Result<Vec<Document>, String> {
    let result = answer.get("result").and_then(Value::as_array).map(Vec::as_slice);
    let Some([Value::Array(found)]) = result else {
        return Err("expected {\"result\": [[document, ...]]}, one list for the one query".to_owned());
    };
    found.iter().take(most).map(|found| read_document(found.get("document").unwrap_or(found))).collect()
}

/// A document by its title and text, or by its `contents`.
fn read_document(value: &Value) -> Result<Document, String> {
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    let contents = field("contents").or(value.as_str()).map(split_contents);
    let text = field("text").or(contents.map(|(_, text)| text));
    let title = field("title").or(contents.map(|(title, _)| title)).unwrap_or_default();
    let Some(text) = text else { return Err("a document has neither `text` nor `contents`".to_owned()) };
    let doc_id = match value.get("id").or(value.get("doc_id")) {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => String::new(),
    };
    Ok(Document { doc_id, title: title.to_owned(), text: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(doc_id: &str, title: &str, text: &str) -> Document {
        Document { doc_id: doc_id.to_owned(), title: title.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn documents_are_read_in_every_shape_that_servers_give_them() {
        let accra = document("7", "Accra", "A city.\nIn Ghana.");
        let contents = "\"Accra\"\nA city.\nIn Ghana.";
        for shape in [
            json!({"id": "7", "contents": contents}),
            json!({"id": 7, "contents": contents}),
            json!({"id": "7", "title": "Accra", "text": "A city.\nIn Ghana."}),
            json!({"id": "7", "title": "Accra", "text": "A city.\nIn Ghana.", "contents": contents}),
            json!({"id": "7", "title": "Accra", "contents": contents}),
            json!({"doc_id": "7", "contents": "Accra\nA city.\nIn Ghana."}),
        ] {
            let bare = json!({"result": [[shape.clone()]]});
            let scored = json!({"result": [[{"document": shape, "score": 1.5}]]});
            for answer in [bare, scored] {
                assert_eq!(read_documents(&answer, 3), Ok(vec![accra.clone()]), "{answer}");
            }
        }
        let several = json!({"result": [[{"text": "a"}, {"contents": "b"}, "c", {"text": "d"}]]});
        let found = ["a", "b", "c"].map(|text| document("", "", text));
        assert_eq!(read_documents(&several, 3), Ok(found.to_vec()));
        assert_eq!(read_documents(&json!({"result": [[]]}), 3), Ok(vec![]));
    }

    #[test]
    fn what_is_no_answer_is_said() {
        for answer in [
            json!({}),
            json!({"result": []}),
            json!({"result": {}}),
            json!({"result": [{"contents": "a"}]}),
            json!({"result": [[], []]}),
            json!({"detail": "no"}),
            json!([]),
            json!(null),
        ] {
            assert!(read_documents(&answer, 3).unwrap_err().contains("expected {\"result\""), "{answer}");
        }
        for found in [json!({}), json!(3), json!({"text": 3}), json!({"document": {"title": "a"}}), json!(null)] {
            let error = read_documents(&json!({"result": [[found]]}), 3).unwrap_err();
            assert!(error.contains("neither `text` nor `contents`"), "{error}");
        }
    }
}
