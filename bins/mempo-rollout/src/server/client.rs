//! Requests to a server: deadlines, retries with jitter, answers of bounded size, no redirects.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mempo_model::counter_uniform;
use serde_json::Value;
use tracing::debug;
use ureq::http::{HeaderMap, StatusCode};

/// Longest answer read.
const ANSWER_BYTES: u64 = 64 << 20;
/// Longest time until a connection stands.
const CONNECT: Duration = Duration::from_secs(10);
/// The first pause before another attempt; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The environment's word for the server, sent with every request and written nowhere.
const KEY: &str = "MEMPO_SERVER_KEY";

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Another attempt may succeed; the pause that the server asks for.
    Passing(String, Option<Duration>),
    /// This request will never succeed; others may.
    One(String),
    /// No request will succeed.
    Final(String),
}

/// A server at an address.
pub(crate) struct Client {
    agent: ureq::Agent,
    url: String,
    key: Option<String>,
    retries: u32,
    /// Draws of jitter so far.
    draws: AtomicU64,
}

/// A server's address, without what may stand at its end.
pub(crate) fn address(text: &str) -> Result<String, String> {
    let url = text.trim_end_matches('/').trim_end_matches("/v1");
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    if host.is_none_or(|host| host.is_empty() || host.contains('@')) {
        return Err(format!("expected http://HOST:PORT; a key is read from the environment as {KEY}"));
    }
    Ok(url.to_owned())
}

impl Client {
    /// To the server at an [`address`]; a request may take `timeout` in all.
    pub(crate) fn new(url: &str, timeout: Duration, retries: u32) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .timeout_connect(Some(CONNECT.min(timeout)))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_idle_connections(1024)
            .max_idle_connections_per_host(1024)
            // A cluster's proxy must not stand between a job and a server on its own machine.
            .proxy(None)
            .user_agent(concat!("mempo-rollout/", env!("CARGO_PKG_VERSION")));
        let key = std::env::var(KEY).ok().filter(|key| !key.is_empty());
        Self { agent: config.build().into(), url: url.to_owned(), key, retries, draws: AtomicU64::new(0) }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Sends a body, or asks without one; gives what `read` makes of the answer, after as many attempts as are allowed.
    pub(crate) fn ask<T>(
        &self,
        path: &str,
        body: Option<&Value>,
        read: impl Fn(&Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut attempt = 0;
        loop {
            let result = self.ask_once(path, body).and_then(|answer| read(&answer));
            let Err(Failure::Passing(problem, pause)) = result else { return result };
            if attempt == self.retries {
                return Err(Failure::Passing(format!("{problem} ({} attempts)", attempt + 1), None));
            }
            let pause = pause.unwrap_or(FIRST_PAUSE * 2_u32.saturating_pow(attempt)).min(LONGEST_PAUSE);
            let draw = counter_uniform(u64::from(std::process::id()), self.draws.fetch_add(1, Ordering::Relaxed));
            debug!("{}{path}: {problem}; again in {pause:?}", self.url);
            // Up to twice the pause, so that not all come back at once.
            std::thread::sleep(pause.mul_f32(1.0 + draw));
            attempt += 1;
        }
    }

    fn ask_once(&self, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let passing = |error: &dyn std::fmt::Display| Failure::Passing(error.to_string(), None);
        let url = format!("{}{path}", self.url);
        let result = match body {
            Some(body) => {
                let request = self.agent.post(&url).header("content-type", "application/json");
                self.with_key(request).send(body.to_string())
            }
            None => self.with_key(self.agent.get(&url)).call(),
        };
        let mut response = result.map_err(|error| passing(&error))?;
        let (status, pause) = (response.status(), retry_after(response.headers()));
        let body = response.body_mut().with_config().limit(ANSWER_BYTES).read_to_vec();
        let body = body.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => Failure::One(format!("an answer of more than {ANSWER_BYTES} bytes")),
            error => passing(&error),
        })?;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|error| passing(&format!("an answer that is not JSON: {error}")));
        }
        let said = String::from_utf8_lossy(&body);
        let problem = format!("{status}: {}", said.chars().take(300).collect::<String>().trim());
        match status {
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Err(Failure::Passing(problem, pause)),
            status if status.is_server_error() => Err(Failure::Passing(problem, pause)),
            StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
                Err(Failure::One(problem))
            }
            _ => Err(Failure::Final(problem)),
        }
    }

    fn with_key<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        }
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get("retry-after")?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}
