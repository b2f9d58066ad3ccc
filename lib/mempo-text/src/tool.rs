//! Tools as the policy sees them ([`ToolSpec`]) and the calls it writes ([`ToolCall`]).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::json::python_json;

/// Name of the search tool.
const SEARCH: &str = "search";

/// What the policy is told about a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolSpec {
    /// The name it is called by.
    pub name: String,
    /// What it does, in a sentence.
    pub description: String,
    /// JSON schema of the arguments object.
    pub parameters: Value,
}

impl ToolSpec {
    /// The built-in search tool: one string, `query`.
    pub fn search() -> Self {
        Self {
            name: SEARCH.to_owned(),
            description: "Searches a document collection and returns the best matching passages.".to_owned(),
            parameters: json!({
                "type": "object",
                "properties": {"query": {"type": "string", "description": "Keywords or a short question about one thing."}},
                "required": ["query"],
            }),
        }
    }

    /// One line of JSON in the form function-calling models are trained on.
    pub(crate) fn render(&self) -> String {
        python_json(&json!({
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }))
    }
}

/// A tool call as the policy wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Name of the tool.
    pub name: String,
    /// Its arguments, a JSON object. Of a search the query is always under `query`: a string, or a list of several.
    pub arguments: Value,
}

impl ToolCall {
    /// Reads what stands between `<tool_call>` and `</tool_call>`.
    ///
    /// Accepted: `{"name": …, "arguments": {…}}`, arguments as a string holding JSON (OpenAI's form), and for a search
    /// also the arguments alone (`{"query": …}`, `{"query_list": […]}`) or the bare query. The error says what is wrong,
    /// in words for the policy.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err("the tool call is empty".to_owned());
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(call)) => Self::from_object(call),
            Ok(Value::String(query)) => Ok(Self::search(&query)),
            Ok(Value::Array(_)) => Err("the tool call is a JSON list, not an object: one call a step".to_owned()),
            Err(error) if text.starts_with(['{', '[']) => Err(format!("the tool call is not valid JSON: {error}")),
            Ok(_) | Err(_) => Ok(Self::search(text)),
        }
    }

    /// The call with its tags, as a policy is taught to write it.
    pub fn render(&self) -> String {
        let call = python_json(&json!({"name": self.name, "arguments": self.arguments}));
        format!("<tool_call>\n{call}\n</tool_call>")
    }

    fn search(query: &str) -> Self {
        Self { name: SEARCH.to_owned(), arguments: json!({"query": query}) }
    }

    fn from_object(mut call: Map<String, Value>) -> Result<Self, String> {
        let name = match call.shift_remove("name") {
            Some(Value::String(name)) => name,
            Some(_) => return Err("`name` of the tool call is not a string".to_owned()),
            None if call.contains_key("query") || call.contains_key("query_list") => {
                return Ok(Self { name: SEARCH.to_owned(), arguments: Value::Object(one_query_key(call)) });
            }
            None => return Err("the tool call has no `name`".to_owned()),
        };
        let arguments = match call.shift_remove("arguments") {
            Some(Value::String(text)) => string_arguments(&name, text)?,
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err("`arguments` of the tool call is not an object".to_owned()),
            None => return Err("the tool call has no `arguments`".to_owned()),
        };
        let arguments = if name == SEARCH { one_query_key(arguments) } else { arguments };
        Ok(Self { name, arguments: Value::Object(arguments) })
    }
}

/// Arguments given as text: JSON in a string, or for a search the query itself.
fn string_arguments(name: &str, text: String) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(&text) {
        Ok(Value::Object(arguments)) => Ok(arguments),
        _ if name == SEARCH && !text.trim_start().starts_with(['{', '[']) => {
            Ok(Map::from_iter([("query".to_owned(), Value::String(text))]))
        }
        _ => Err("`arguments` of the tool call is not an object".to_owned()),
    }
}

/// `query_list` becomes `query`, a list of one becomes its element.
fn one_query_key(mut arguments: Map<String, Value>) -> Map<String, Value> {
    if let Some(queries) = arguments.shift_remove("query_list") {
        arguments.entry("query").or_insert(queries);
    }
    if let Some(query) = arguments.get_mut("query")
        && let Value::Array(queries) = query
        && queries.len() == 1
    {
        *query = queries.remove(0);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn whatever_stands_between_the_tags_it_is_a_call_or_refused(
            text in r#"([{}\[\]":,\\ 0-9a-z\x00é]|"name"|"arguments"|"query"|"query_list"|"search"|null|1e999){0,24}"#
        ) {
            if let Ok(call) = ToolCall::parse(&text) {
                let rendered = call.render();
                let inner = rendered.trim_start_matches("<tool_call>").trim_end_matches("</tool_call>");
                prop_assert_eq!(ToolCall::parse(inner), Ok(call));
            }
        }
    }

    #[test]
    fn every_accepted_form_of_a_search() {
        for text in [
            r#"{"name": "search", "arguments": {"query": "x y"}}"#,
            r#"{"name": "search", "arguments": {"query": ["x y"]}}"#,
            r#"{"name": "search", "arguments": {"query_list": ["x y"]}}"#,
            r#"{"name": "search", "arguments": "{\"query\": \"x y\"}"}"#,
            r#"{"name": "search", "arguments": "x y"}"#,
            r#"{"query": "x y"}"#,
            r#"{"query_list": ["x y"]}"#,
            r#""x y""#,
            "\n x y \n",
        ] {
            let call = ToolCall::parse(text).unwrap();
            assert_eq!(call, ToolCall { name: "search".into(), arguments: json!({"query": "x y"}) }, "{text}");
            let rendered = call.render();
            let inside = rendered.trim_start_matches("<tool_call>").trim_end_matches("</tool_call>");
            assert_eq!(ToolCall::parse(inside).unwrap(), call);
        }
        let several = ToolCall::parse(r#"{"query_list": ["x", "y"]}"#).unwrap();
        assert_eq!(several.arguments, json!({"query": ["x", "y"]}));
        let year = ToolCall::parse("1889").unwrap();
        assert_eq!(year.arguments, json!({"query": "1889"}));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, part) in [
            ("", "empty"),
            ("{\"name\": \"search\"", "not valid JSON"),
            ("[1]", "list"),
            ("{}", "no `name`"),
            (r#"{"name": 3}"#, "not a string"),
            (r#"{"name": "search"}"#, "no `arguments`"),
            (r#"{"name": "search", "arguments": 3}"#, "not an object"),
            (r#"{"name": "other", "arguments": "x"}"#, "not an object"),
        ] {
            let error = ToolCall::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn other_tools_keep_their_arguments() {
        let call = ToolCall::parse(r#"{"name": "add", "arguments": {"query_list": [1]}}"#).unwrap();
        assert_eq!(call.arguments, json!({"query_list": [1]}));
    }
}
