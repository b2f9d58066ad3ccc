//! The tools an agent may call: a small table by name. `search` is here, `calculator` beside it; others implement [`Tool`].

use std::sync::Arc;

use mempo_data::Document;
use mempo_text::{Profile, ToolCall, ToolSpec};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde_json::Value;

use crate::{Error, SearchIndex};

/// Queries of one call.
const MOST_QUERIES: usize = 8;
/// Text of a search that found nothing.
const NOTHING: &str = "No results.";

/// Something a policy may call.
pub trait Tool: Send + Sync {
    /// What the policy is told about it; the name is what it is called by.
    fn spec(&self) -> ToolSpec;

    /// Does what the policy asks for; returns the results as text, which is untrusted.
    fn call(&self, arguments: &Value) -> Result<String, ToolFailure>;

    /// Whether the answer comes from elsewhere, nobody knows when: the caller's trajectory waits for it, the others go on.
    fn is_remote(&self) -> bool {
        false
    }
}

/// Something that finds documents.
pub trait Search: Send + Sync {
    /// The `top_k` best documents for `query`, best first; an error is the search's own failure, in words.
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String>;

    /// As [`Tool::is_remote`].
    fn is_remote(&self) -> bool {
        false
    }
}

impl Search for SearchIndex {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        let hits = SearchIndex::search(self, query, top_k).map_err(|error| error.to_string())?;
        Ok(hits.into_iter().map(|hit| hit.document).collect())
    }
}

impl<S: Search + ?Sized> Search for Arc<S> {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        (**self).search(query, top_k)
    }

    fn is_remote(&self) -> bool {
        (**self).is_remote()
    }
}

/// Why a tool call yielded nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolFailure {
    /// The policy's fault; the text tells it what is wrong.
    BadArguments(String),
    /// The tool's own failure, in words.
    Failed(String),
}

/// The tools of one run.
pub struct Toolbox {
    tools: Vec<Arc<dyn Tool>>,
    /// Threads for calls that wait for each other.
    waiting: Option<ThreadPool>,
}

impl Toolbox {
    /// A toolbox of these tools. `waiting` calls to those that are here may be under way at a time: more than there are cores
    /// where what they ask answers many at once; 0 where it does not.
    pub fn new(tools: Vec<Box<dyn Tool>>, waiting: usize) -> Result<Self, Error> {
        let pool = || ThreadPoolBuilder::new().num_threads(waiting).build();
        let waiting = (waiting > 0).then(pool).transpose().map_err(|error| Error::Threads(error.to_string()))?;
        Ok(Self { tools: tools.into_iter().map(Arc::from).collect(), waiting })
    }

    /// Does what the policy asks for; returns the results as text, which is untrusted.
    pub fn call(&self, call: &ToolCall) -> Result<String, ToolFailure> {
        match self.tool(&call.name) {
            Some(tool) => tool.call(&call.arguments),
            None => Err(ToolFailure::BadArguments(self.no_such_tool(&call.name))),
        }
    }

    /// The tool of this name, if it is elsewhere.
    pub(crate) fn remote(&self, name: &str) -> Option<&Arc<dyn Tool>> {
        self.tool(name).filter(|tool| tool.is_remote())
    }

    fn tool(&self, name: &str) -> Option<&Arc<dyn Tool>> {
        self.tools.iter().find(|tool| tool.spec().name == name)
    }

    /// Runs what calls the tools that are here where calls may wait.
    pub(crate) fn side_by_side<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.waiting {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    fn no_such_tool(&self, name: &str) -> String {
        let names: Vec<String> = self.tools.iter().map(|tool| format!("`{}`", tool.spec().name)).collect();
        match &names[..] {
            [] => format!("Error: there is no tool `{name}`; there are no tools."),
            [only] => format!("Error: there is no tool `{name}`; the only tool is {only}."),
            names => format!("Error: there is no tool `{name}`; the tools are {}.", names.join(", ")),
        }
    }
}

/// `search`: the best documents, each as the profile's `document` says.
pub struct SearchTool<S> {
    search: S,
    profile: Profile,
    top_k: usize,
}

impl<S: Search> SearchTool<S> {
    /// Gives the `top_k` best documents that `search` finds.
    pub fn new(search: S, profile: &Profile, top_k: usize) -> Self {
        Self { search, profile: profile.clone(), top_k }
    }

    fn results(&self, query: &str) -> Result<String, ToolFailure> {
        let documents = self.search.search(query, self.top_k).map_err(ToolFailure::Failed)?;
        if documents.is_empty() {
            return Ok(NOTHING.to_owned());
        }
        let documents = documents.iter().enumerate();
        let rendered =
            documents.map(|(index, Document { title, text, .. })| self.profile.render_document(index + 1, title, text));
        Ok(rendered.collect())
    }
}

impl<S: Search> Tool for SearchTool<S> {
    fn spec(&self) -> ToolSpec {
        ToolSpec::search()
    }

    fn call(&self, arguments: &Value) -> Result<String, ToolFailure> {
        let queries = queries(arguments)?;
        if queries.len() > MOST_QUERIES {
            let text =
                format!("Error: {} queries in one call, at most {MOST_QUERIES} are searched for.", queries.len());
            return Err(ToolFailure::BadArguments(text));
        }
        let results: Result<Vec<String>, ToolFailure> = queries.iter().map(|query| self.results(query)).collect();
        Ok(results?.join("\n---\n"))
    }

    fn is_remote(&self) -> bool {
        self.search.is_remote()
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
    use std::sync::Barrier;
    use std::time::Duration;

    use rayon::prelude::*;
    use serde_json::json;

    use super::*;

    struct Scripted(fn(&str) -> Document);

    impl Search for Scripted {
        fn search(&self, query: &str, _: usize) -> Result<Vec<Document>, String> {
            match query {
                "broken" => Err("the index is gone".to_owned()),
                "nothing" => Ok(Vec::new()),
                _ => Ok(vec![(self.0)(query)]),
            }
        }
    }

    /// A toolbox that finds every query once, and fails on `broken`.
    pub(crate) fn scripted(document: fn(&str) -> Document) -> Toolbox {
        let search = SearchTool::new(Scripted(document), &Profile::load("mempo").unwrap(), 3);
        Toolbox::new(vec![Box::new(search)], 0).unwrap()
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
        let many = json!({"query": vec!["red"; MOST_QUERIES + 1]});
        assert!(matches!(call("search", many), Err(ToolFailure::BadArguments(text)) if text.contains("9 queries")));
    }

    #[test]
    fn whose_fault_a_failure_is() {
        for arguments in
            [json!({}), json!({"query": 3}), json!({"query": []}), json!({"q": "red"}), json!({"query": ["a", 1]})]
        {
            assert!(matches!(call("search", arguments), Err(ToolFailure::BadArguments(_))));
        }
        let unknown = call("browse", json!({"query": "red"}));
        let told = "Error: there is no tool `browse`; the only tool is `search`.";
        assert_eq!(unknown, Err(ToolFailure::BadArguments(told.to_owned())));
        assert!(matches!(call("search", json!({"query": "broken"})), Err(ToolFailure::Failed(_))));
    }

    /// Ends only once four calls are under way.
    struct Meeting(Barrier);

    impl Tool for Meeting {
        fn spec(&self) -> ToolSpec {
            ToolSpec { name: "meet".to_owned(), description: String::new(), parameters: json!({}) }
        }

        fn call(&self, _: &Value) -> Result<String, ToolFailure> {
            self.0.wait();
            Ok("met".to_owned())
        }
    }

    #[test]
    fn calls_that_may_wait_are_under_way_together_however_few_cores_there_are() {
        let toolbox = Toolbox::new(vec![Box::new(Meeting(Barrier::new(4)))], 4).unwrap();
        let call = ToolCall { name: "meet".to_owned(), arguments: json!({}) };
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let calls = || vec![call; 8].into_par_iter().with_max_len(1).map(|call| toolbox.call(&call)).collect();
            let results: Vec<_> = toolbox.side_by_side(calls);
            done.send(results).unwrap();
        });
        let results = finished.recv_timeout(Duration::from_secs(20)).expect("calls wait for each other");
        assert_eq!(results, vec![Ok("met".to_owned()); 8]);
    }
}
