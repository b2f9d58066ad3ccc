//! Search-R1's retrieval protocol: queries go to `POST /retrieve`, documents come back. What is sent and read on both sides.
//!
//! `{"queries": [text, …], "topk": number or null, "return_scores": bool}` is answered by `{"result": [[DOC, …], …]}`, one list
//! a query in their order; with scores each DOC is `{"document": DOC, "score": number}`. Ours writes DOC so that clients of
//! Search-R1, MEM1 and verl find what they look for: `{"id", "title", "text", "contents"}`, where `contents` is the title in
//! quotes, a newline and the text.

mod remote;
mod serve;

use mempo_agent::Hit;
use mempo_data::Document;
use serde::Deserialize;
use serde_json::{Value, json};

pub(crate) use self::remote::{RemoteSearch, address};
pub(crate) use self::serve::{ServeSearchArguments, run};
#[cfg(test)]
pub(crate) use self::serve::{Served, serve};

/// Where queries go.
const PATH: &str = "/retrieve";

/// What a client asks. What else it sends is ignored.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Asked {
    queries: Vec<String>,
    /// Documents a query; null or 0: as many as the server likes.
    #[serde(default)]
    topk: Option<usize>,
    /// Some clients send null.
    #[serde(default)]
    return_scores: Option<bool>,
}

/// Found documents as an answer has them.
fn hits_value(hits: Vec<Hit>, with_scores: bool) -> Value {
    let value = |Hit { document, score }| {
        let contents = contents(&document);
        let Document { doc_id, title, text } = document;
        let value = json!({"id": doc_id, "title": title, "text": text, "contents": contents});
        if with_scores { json!({"document": value, "score": score}) } else { value }
    };
    hits.into_iter().map(value).collect()
}

/// A document in Search-R1's form: the title in quotes, a newline and the text.
pub(crate) fn contents(Document { title, text, .. }: &Document) -> String {
    format!("\"{title}\"\n{text}")
}

/// Title and text of Search-R1's `contents`, whose first line is the title, in quotes or not; a single line is all text.
pub(crate) fn split_contents(contents: &str) -> (&str, &str) {
    let (title, text) = contents.split_once('\n').unwrap_or(("", contents));
    let title = title.trim();
    (title.strip_prefix('"').and_then(|title| title.strip_suffix('"')).unwrap_or(title), text)
}
