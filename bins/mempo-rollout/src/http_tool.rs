//! Tools that a user names in a file: a policy's arguments are posted to an address, what comes back is what it sees.

use anyhow::anyhow;
use mempo_agent::{NamedTool, Tool, ToolFailure};
use mempo_run::ResultExt;
use mempo_text::ToolSpec;
use serde_json::Value;

use crate::http::{self, Client, Failure, Limits};

/// Refuses tools whose url is no address; a slash at its end is left out.
pub(crate) fn check_urls(tools: &mut [NamedTool]) -> anyhow::Result<()> {
    for tool in tools {
        let name = tool.spec().name;
        let url = http::address(&tool.url).map_err(|problem| anyhow!("--tools-file: `url` of `{name}`: {problem}"));
        tool.url = url.bad_input()?;
    }
    Ok(())
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

    fn is_remote(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::http::testing::{Reply, answer, serve};

    fn named(url: &str) -> NamedTool {
        let parameters = json!({"type": "object"});
        let tool = json!({"name": "weather", "description": "Tells.", "parameters": parameters, "url": url});
        serde_json::from_value(tool).unwrap()
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
    fn an_url_is_an_address_without_a_key() {
        let mut tools = [named("http://a:1/w/")];
        check_urls(&mut tools).unwrap();
        assert_eq!(tools, [named("http://a:1/w")]);
        for (url, told) in [("a:1", "expected http://"), ("http://me:key@a:1", "from the environment")] {
            let error = check_urls(&mut [named(url)]).unwrap_err().to_string();
            assert!(error.contains("`url` of `weather`") && error.contains(told), "{error}");
        }
    }
}
