//! Tools that a user names in a file: a policy's arguments are posted to an address, what comes back is what it sees.

use std::path::Path;

use anyhow::{Context, ensure};
use mempo_agent::{Tool, ToolFailure};
use mempo_run::ResultExt;
use mempo_text::ToolSpec;
use serde::Deserialize;
use serde_json::Value;

use crate::http::{self, Client, Failure, Limits};

/// What the file says of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedTool {
    name: String,
    description: String,
    /// JSON schema of the arguments object.
    parameters: Value,
    /// Where the arguments are posted.
    pub(crate) url: String,
}

/// The tools of a file: a JSON list.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<NamedTool>> {
    let read = || -> anyhow::Result<Vec<NamedTool>> {
        let text = fs_err::read_to_string(path)?;
        let in_file = || path.display().to_string();
        let expected = r#"expected [{"name": …, "description": …, "parameters": {JSON schema}, "url": "http://…"}, …]"#;
        let mut tools: Vec<NamedTool> =
            serde_json::from_str(&text).with_context(|| format!("{}: {expected}", in_file()))?;
        for tool in &mut tools {
            let name = &tool.name;
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            ensure!(!name.is_empty() && name.chars().all(is_word), "{}: `{name}` is no name for a tool", in_file());
            ensure!(tool.parameters.is_object(), "{}: `parameters` of `{name}` is no JSON schema", in_file());
            let url = http::address(&tool.url)
                .map_err(|problem| anyhow::anyhow!("{}: `url` of `{name}`: {problem}", in_file()))?;
            tool.url = url;
        }
        Ok(tools)
    };
    read().bad_input()
}

impl NamedTool {
    /// What the policy is told.
    pub(crate) fn spec(&self) -> ToolSpec {
        let Self { name, description, parameters, .. } = self.clone();
        ToolSpec { name, description, parameters }
    }
}

/// Calls such a tool.
pub(crate) struct HttpTool {
    tool: NamedTool,
    client: Client,
}

impl HttpTool {
    pub(crate) fn new(tool: NamedTool, limits: Limits) -> Self {
        Self { client: Client::new(&tool.url, None, limits), tool }
    }
}

impl Tool for HttpTool {
    fn spec(&self) -> ToolSpec {
        self.tool.spec()
    }

    fn call(&self, arguments: &Value) -> Result<String, ToolFailure> {
        let text = |answer: &[u8]| Ok(String::from_utf8_lossy(answer).into_owned());
        self.client.ask_bytes("", Some(arguments), text).map_err(|failure| match failure {
            // It has looked at the arguments, which are the policy's.
            Failure::Refused(problem) => ToolFailure::BadArguments(format!("Error: {problem}")),
            failure => ToolFailure::Failed(format!("{}: {}", self.tool.url, failure.problem())),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::http::testing::{Reply, answer, serve};

    fn named(url: &str) -> NamedTool {
        let (name, description) = ("weather".to_owned(), "Tells the weather.".to_owned());
        NamedTool { name, description, parameters: json!({"type": "object"}), url: url.to_owned() }
    }

    #[test]
    fn arguments_are_posted_and_what_comes_back_is_seen() {
        let url = serve(|path, body| match (path, body["city"].as_str()) {
            ("/weather", Some("Accra")) => answer("200 OK", "", "31 degrees, {not JSON"),
            ("/weather", Some("Atlantis")) => Reply::Json(422, json!({"detail": "no such city"})),
            ("/weather", Some("Rome")) => Reply::Flood(1 << 30),
            _ => Reply::Json(500, json!("broken")),
        });
        let second = Duration::from_secs(1);
        let limits = Limits {
            attempt: second,
            call: Some(second),
            retries: 0,
            answer_bytes: 1000,
            per_minute: None,
            leaves_alone: true,
        };
        let tool = HttpTool::new(named(&format!("{url}/weather")), limits);
        let call = |city: &str| tool.call(&json!({ "city": city }));
        assert_eq!(call("Accra"), Ok("31 degrees, {not JSON".to_owned()));
        assert!(matches!(call("Atlantis"), Err(ToolFailure::BadArguments(told)) if told.contains("no such city")));
        assert!(matches!(call("Rome"), Err(ToolFailure::Failed(told)) if told.contains("more than 1000 bytes")));
        assert!(matches!(call("Oslo"), Err(ToolFailure::Failed(told)) if told.contains("/weather: 500")));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tools.json");
        let mut tool = json!({
            "name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"}, "url": "http://a:1/w/",
        });
        let mut with = |name: &str, value: Value| {
            let before = tool[name].clone();
            tool[name] = value;
            fs_err::write(&path, json!([tool]).to_string()).unwrap();
            tool[name] = before;
            read(&path).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(with("name", json!("weather")), Ok(vec![named("http://a:1/w")]));
        for (name, value, told) in [
            ("name", json!("a tool"), "`a tool` is no name"),
            ("name", json!(3), "expected [{"),
            ("parameters", json!("none"), "no JSON schema"),
            ("url", json!("a:1"), "expected http://"),
            ("url", json!("http://me:key@a:1"), "from the environment"),
        ] {
            let error = with(name, value).unwrap_err();
            assert!(error.contains("tools.json") && error.contains(told), "{error}");
        }
    }
}
