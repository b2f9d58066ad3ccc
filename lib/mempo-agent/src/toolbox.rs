//! The tools an agent may call: `search` over a [`SearchIndex`].

use mempo_text::{Profile, ToolCall, ToolSpec};
use serde_json::Value;

use crate::{Error, Hit, SearchIndex};

/// Text of a search that found nothing.
const NOTHING: &str = "No results.";

type Search = dyn Fn(&str) -> Result<Vec<Hit>, Error> + Send + Sync;

/// The tools of one run.
pub struct Toolbox {
    search: Box<Search>,
    profile: Profile,
}

/// Why a tool call yielded nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolFailure {
    /// The policy's fault; the text tells it what is wrong.
    BadArguments(String),
    /// The tool's own failure, in words.
    Failed(String),
}

impl Toolbox {
    /// A toolbox whose `search` gives the `top_k` best documents of `index`, each as the profile's `document` says.
    pub fn new(index: SearchIndex, profile: &Profile, top_k: usize) -> Self {
        Self { search: Box::new(move |query| index.search(query, top_k)), profile: profile.clone() }
    }

    /// What the prompt tells the policy about the tools.
    pub fn specs(&self) -> Vec<ToolSpec> {
        vec![ToolSpec::search()]
    }

    /// Does what the policy asks for; returns the results as text, which is untrusted.
    pub fn call(&self, call: &ToolCall) -> Result<String, ToolFailure> {
        if call.name != "search" {
            let text = format!("Error: there is no tool `{}`; the only tool is `search`.", call.name);
            return Err(ToolFailure::BadArguments(text));
        }
        let queries = queries(&call.arguments)?;
        let results: Result<Vec<String>, ToolFailure> = queries.iter().map(|query| self.results(query)).collect();
        Ok(results?.join("\n---\n"))
    }

    fn results(&self, query: &str) -> Result<String, ToolFailure> {
        let hits = (self.search)(query).map_err(|error| ToolFailure::Failed(error.to_string()))?;
        if hits.is_empty() {
            return Ok(NOTHING.to_owned());
        }
        let documents = hits.iter().enumerate();
        let rendered = documents.map(|(index, Hit { document, .. })| {
            self.profile.render_document(index + 1, &document.title, &document.text)
        });
        Ok(rendered.collect())
    }
}

/// The queries of a call: `query` holds one or several.
fn queries(arguments: &Value) -> Result<Vec<String>, ToolFailure> {
    let texts = match arguments.get("query") {
        Some(Value::String(query)) => Some(vec![query.clone()]),
        Some(Value::Array(items)) if !items.is_empty() => {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        }
        _ => None,
    };
    texts.ok_or_else(|| {
        let text = "Error: `search` takes {\"query\": \"words to look for\"}.";
        ToolFailure::BadArguments(text.to_owned())
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use mempo_data::Document;
    use serde_json::json;

    use super::*;

    /// A toolbox that finds every query once, and fails on `broken`.
    pub(crate) fn scripted(document: fn(&str) -> Document) -> Toolbox {
        let search = move |query: &str| match query {
            "broken" => Err(Error::Document { path: "index".into(), field: "text" }),
            "nothing" => Ok(Vec::new()),
            _ => Ok(vec![Hit { document: document(query), score: 1.0 }]),
        };
        Toolbox { search: Box::new(search), profile: Profile::load("mempo").unwrap() }
    }

    fn call(name: &str, arguments: Value) -> Result<String, ToolFailure> {
        let document =
            |query: &str| Document { doc_id: "d".into(), title: format!("{{text}} {query}"), text: "{title}".into() };
        scripted(document).call(&ToolCall { name: name.to_owned(), arguments })
    }

    #[test]
    fn results_are_laid_out_as_the_profile_says() {
        let found = "Doc 1(Title: {text} red) {title}\n".to_owned();
        assert_eq!(call("search", json!({"query": "red"})), Ok(found.clone()), "names in a document are not filled in");
        let several = json!({"query": ["red", "nothing"]});
        assert_eq!(call("search", several), Ok(format!("{found}\n---\nNo results.")));
    }

    #[test]
    fn whose_fault_a_failure_is() {
        for arguments in
            [json!({}), json!({"query": 3}), json!({"query": []}), json!({"q": "red"}), json!({"query": ["a", 1]})]
        {
            assert!(matches!(call("search", arguments), Err(ToolFailure::BadArguments(_))));
        }
        assert!(
            matches!(call("browse", json!({"query": "red"})), Err(ToolFailure::BadArguments(text)) if text.contains("browse"))
        );
        assert!(matches!(call("search", json!({"query": "broken"})), Err(ToolFailure::Failed(_))));
    }
}
