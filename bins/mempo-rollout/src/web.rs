//! Search of the web: by a SearXNG instance, or by Serper.

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use mempo_agent::Search;
use mempo_data::Document;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use crate::http::{Client, Failure, Limits, Secret, address};
use crate::tools::KEY;

/// The environment's word for the address.
const URL: &str = "MEMPO_SEARCH_URL";
/// Where Serper is.
const SERPER: &str = "https://google.serper.dev";
/// Longest title and text of a result, in characters.
const TITLE: usize = 300;
const TEXT: usize = 2000;
/// Characters of a query that are sent.
const QUERY: usize = 400;

/// Who searches the web.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// `GET /search?q=…&format=json`
    Searxng,
    /// `POST /search`, as google.serper.dev answers it
    Serper,
}

/// Asks one of them.
pub(crate) struct WebSearch {
    pub(crate) engine: Engine,
    pub(crate) client: Client,
}

impl Engine {
    /// As it is named after `web:`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Searxng => "searxng",
            Self::Serper => "serper",
        }
    }
}

impl WebSearch {
    /// With the address and the key that the environment names.
    pub(crate) fn from_environment(engine: Engine, limits: Limits, private: bool) -> anyhow::Result<Self> {
        let (url, secret) = match engine {
            Engine::Searxng => {
                let url = place(engine).with_context(|| format!("web:searxng needs an instance's address in {URL}"))?;
                (url, Secret::bearer(KEY))
            }
            Engine::Serper => {
                let key = variable(KEY).with_context(|| format!("web:serper needs a key in {KEY}"))?;
                (place(engine).unwrap_or_default(), Some(Secret::key("x-api-key", key)))
            }
        };
        let url = address(&url).map_err(|problem| anyhow!("{URL}: {problem}"))?;
        let client = if private { Client::new(&url, secret, limits) } else { Client::public(&url, secret, limits) };
        Ok(Self { engine, client })
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The address that is asked, where one is known.
pub(crate) fn place(engine: Engine) -> Option<String> {
    variable(URL).or_else(|| (engine == Engine::Serper).then(|| SERPER.to_owned()))
}

impl Search for WebSearch {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        // What engines refuse would be the policy's doing, not theirs.
        let query: String = query.trim().chars().take(QUERY).collect();
        if query.is_empty() {
            return Ok(Vec::new());
        }
        let found = match self.engine {
            Engine::Searxng => {
                let path = format!("/search?q={}&format=json", utf8_percent_encode(&query, NON_ALPHANUMERIC));
                self.client.ask(&path, None, |answer| read(answer, "results", ["title", "content", "url"], top_k))
            }
            Engine::Serper => {
                let body = json!({"q": query, "num": top_k});
                let fields = ["title", "snippet", "link"];
                self.client.ask("/search", Some(&body), |answer| read(answer, "organic", fields, top_k))
            }
        };
        found.map_err(|failure| format!("{}/search: {}", self.client.url(), failure.problem()))
    }
}

/// The first results of an answer, by the names of their list and of title, text and address.
fn read(answer: &Value, list: &str, [title, text, url]: [&str; 3], most: usize) -> Result<Vec<Document>, Failure> {
    let results = answer.get(list).and_then(Value::as_array);
    let results = results.ok_or_else(|| Failure::One(format!("expected a list `{list}`")))?;
    let cut = |result: &Value, field: &str, most: usize| -> String {
        result.get(field).and_then(Value::as_str).unwrap_or_default().chars().take(most).collect()
    };
    let document = |result: &Value| Document {
        doc_id: cut(result, url, TEXT),
        title: cut(result, title, TITLE),
        text: cut(result, text, TEXT),
    };
    Ok(results.iter().map(document).filter(|found| !found.text.is_empty()).take(most).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::http::testing::{Reply, answer, serve};

    fn limits() -> Limits {
        let second = Duration::from_secs(1);
        Limits {
            attempt: second,
            call: Some(second),
            retries: 0,
            answer_bytes: 1 << 20,
            per_minute: None,
            leaves_alone: true,
        }
    }

    fn document(doc_id: &str, title: &str, text: &str) -> Document {
        Document { doc_id: doc_id.to_owned(), title: title.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn both_services_are_asked_and_read_in_their_own_shapes() {
        let long = "é".repeat(5000);
        let searxng = {
            let long = long.clone();
            serve(move |path, _| match path {
                "/search?q=r%C3%A9d%20%26%20blue%3Fq%3D1&format=json" => Reply::Json(
                    200,
                    json!({"query": "x", "number_of_results": 0, "results": [
                        {"url": "http://a", "title": "A", "content": "red", "engine": "e", "score": 1.0},
                        {"url": "http://b", "title": "B", "content": ""},
                        {"url": "http://c", "title": long, "content": long},
                        {"url": "http://d", "title": null, "content": "d"},
                    ]}),
                ),
                _ => Reply::Json(404, json!(path)),
            })
        };
        let search = WebSearch { engine: Engine::Searxng, client: Client::new(&searxng, None, limits()) };
        let (title, text) = ("é".repeat(TITLE), "é".repeat(TEXT));
        let found = vec![document("http://a", "A", "red"), document("http://c", &title, &text)];
        assert_eq!(search.search("réd & blue?q=1", 2), Ok(found));
        assert!(search.search("other", 2).unwrap_err().contains("/search: 404"));

        let serper = serve(|path, body| match (path, body["q"].as_str(), body["num"].as_u64()) {
            ("/search", Some("red"), Some(3)) => Reply::Json(
                200,
                json!({"searchParameters": {}, "organic": [
                    {"title": "A", "link": "http://a", "snippet": "red", "position": 1}, {"title": "B", "link": "http://b"},
                ]}),
            ),
            ("/search", Some("none"), _) => Reply::Json(200, json!({"message": "no credits"})),
            _ => answer("302 Found", "location: http://127.0.0.1:1/\r\n", ""),
        });
        let client = Client::new(&serper, Some(Secret::key("x-api-key", "secret".to_owned())), limits());
        let search = WebSearch { engine: Engine::Serper, client };
        assert_eq!(search.search("red", 3), Ok(vec![document("http://a", "A", "red")]));
        assert!(search.search("none", 3).unwrap_err().contains("expected a list `organic`"));
        assert!(search.search("elsewhere", 3).unwrap_err().contains("302"));
    }

    #[test]
    fn private_addresses_are_refused_by_number_and_by_name() {
        let url = serve(|_, _| panic!("it is not asked"));
        let port = url.rsplit(':').next().unwrap();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"] {
            let client = Client::public(&format!("http://{host}:{port}"), None, limits());
            let told = WebSearch { engine: Engine::Searxng, client }.search("red", 1).unwrap_err();
            assert!(told.contains("private address: give --allow-private-addresses"), "{host}: {told}");
        }
    }
}
