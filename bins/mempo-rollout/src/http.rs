//! Requests to servers of others: deadlines, retries with jitter, answers of bounded size, no redirects, a breaker for hosts
//! that answer nothing. Generation, search and tools all ask through it.

mod breaker;
mod pace;
mod public;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mempo_model::counter_uniform;
use mempo_run::check_interrupt;
use serde_json::Value;
use tracing::debug;
use ureq::config::Config;
use ureq::http::{HeaderMap, StatusCode};
use ureq::unversioned::transport::DefaultConnector;

use self::breaker::Breaker;
use self::pace::Pace;
use self::public::PublicOnly;

/// Longest time until a connection stands.
const CONNECT: Duration = Duration::from_secs(10);
/// The first pause before another attempt; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Calls in a row that may come to nothing before a host is left alone, and for how long it is.
const IN_VAIN: u32 = 16;
const LEFT_ALONE: Duration = Duration::from_secs(30);

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Another attempt may succeed; the pause that the server asks for.
    Passing(String, Option<Duration>),
    /// The server will not take this request; others it may.
    Refused(String),
    /// This request will never succeed; others may.
    One(String),
    /// No request will succeed.
    Final(String),
}

impl Failure {
    /// What went wrong.
    pub(crate) fn problem(&self) -> &str {
        let (Self::Passing(problem, _) | Self::Refused(problem) | Self::One(problem) | Self::Final(problem)) = self;
        problem
    }
}

/// How much a server may take.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Longest time of an attempt, from the lookup of its name to the last byte.
    pub(crate) attempt: Duration,
    /// Longest time of a call, with all its attempts and pauses, from when it is its turn.
    pub(crate) call: Option<Duration>,
    /// Attempts after the first.
    pub(crate) retries: u32,
    /// Longest answer, in bytes.
    pub(crate) answer_bytes: u64,
    /// Most attempts in a minute, of all calls together.
    pub(crate) per_minute: Option<u32>,
    /// Whether a host that answers nothing is left alone for a while.
    pub(crate) leaves_alone: bool,
}

/// A header that says who asks. It is sent, and written nowhere.
pub(crate) struct Secret {
    header: &'static str,
    /// What stands before the token.
    scheme: &'static str,
    token: String,
}

impl Secret {
    /// A bearer's token from the environment.
    pub(crate) fn bearer(variable: &str) -> Option<Self> {
        let token = std::env::var(variable).ok().filter(|value| !value.is_empty())?;
        Some(Self { header: "authorization", scheme: "Bearer ", token })
    }

    /// A token in a header of its own.
    pub(crate) fn key(header: &'static str, token: String) -> Self {
        Self { header, scheme: "", token }
    }
}

/// A server at an address.
pub(crate) struct Client {
    agent: ureq::Agent,
    url: String,
    secret: Option<Secret>,
    limits: Limits,
    breaker: Option<Breaker>,
    pace: Option<Pace>,
    /// Draws of jitter so far.
    draws: AtomicU64,
}

/// A server's address, without the slash at its end.
pub(crate) fn address(text: &str) -> Result<String, String> {
    let url = text.trim_end_matches('/');
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    if host.is_none_or(|host| host.is_empty() || host.starts_with(['/', ':']) || host.contains(['@', '?', '#'])) {
        return Err("expected http://HOST:PORT; a key is read from the environment, never from an address".to_owned());
    }
    Ok(url.to_owned())
}

fn config(limits: &Limits) -> Config {
    ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT.min(limits.attempt)))
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .max_idle_connections(1024)
        .max_idle_connections_per_host(1024)
        // A cluster's proxy must not stand between a job and a server on its own machine.
        .proxy(None)
        .user_agent(concat!("mempo-rollout/", env!("CARGO_PKG_VERSION")))
        .build()
}

impl Client {
    /// To the server at an [`address`].
    pub(crate) fn new(url: &str, secret: Option<Secret>, limits: Limits) -> Self {
        let agent = ureq::Agent::new_with_config(config(&limits));
        Self::with(agent, url, secret, limits)
    }

    /// The same, if it is on the public internet: calls to private addresses fail.
    pub(crate) fn public(url: &str, secret: Option<Secret>, limits: Limits) -> Self {
        let agent = ureq::Agent::with_parts(config(&limits), DefaultConnector::default(), PublicOnly::default());
        Self::with(agent, url, secret, limits)
    }

    fn with(agent: ureq::Agent, url: &str, secret: Option<Secret>, limits: Limits) -> Self {
        let breaker = limits.leaves_alone.then(|| Breaker::new(IN_VAIN, LEFT_ALONE));
        let pace = limits.per_minute.map(Pace::new);
        Self { agent, url: url.to_owned(), secret, limits, breaker, pace, draws: AtomicU64::new(0) }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Sends a body, or asks without one; gives what `read` makes of the answer's JSON, after as many attempts as are allowed.
    pub(crate) fn ask<T>(
        &self,
        path: &str,
        body: Option<&Value>,
        read: impl Fn(&Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.ask_bytes(path, body, |answer| {
            let not_json = |error| Failure::Passing(format!("an answer that is not JSON: {error}"), None);
            read(&serde_json::from_slice(answer).map_err(not_json)?)
        })
    }

    /// The same of an answer that need not be JSON.
    pub(crate) fn ask_bytes<T>(
        &self,
        path: &str,
        body: Option<&Value>,
        read: impl Fn(&[u8]) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Some(breaker) = &self.breaker else { return self.attempts(path, body, &read) };
        breaker.enter(Instant::now()).map_err(|problem| Failure::Passing(problem, None))?;
        let result = self.attempts(path, body, &read);
        let outcome = match &result {
            Err(Failure::Passing(problem, _)) => Err(problem.as_str()),
            _ => Ok(()),
        };
        breaker.record(Instant::now(), outcome);
        result
    }

    fn attempts<T>(
        &self,
        path: &str,
        body: Option<&Value>,
        read: &impl Fn(&[u8]) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.take_turn();
        let deadline = self.limits.call.map(|longest| Instant::now() + longest);
        let left = || deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()));
        let mut attempt = 0;
        loop {
            let result = self.attempt(path, body, self.limits.attempt.min(left())).and_then(|answer| read(&answer));
            let Err(Failure::Passing(problem, pause)) = result else { return result };
            let pause = pause.unwrap_or(FIRST_PAUSE * 2_u32.saturating_pow(attempt)).min(LONGEST_PAUSE);
            let draw = counter_uniform(u64::from(std::process::id()), self.draws.fetch_add(1, Ordering::Relaxed));
            // Up to twice the pause, so that not all come back at once.
            let pause = pause.mul_f32(1.0 + draw);
            attempt += 1;
            if attempt > self.limits.retries || pause >= left() || check_interrupt().is_err() {
                return Err(Failure::Passing(format!("{problem} ({attempt} attempts)"), None));
            }
            debug!("{}{path}: {problem}; again in {pause:?}", self.url);
            std::thread::sleep(pause);
            self.take_turn();
        }
    }

    /// Waits until another attempt may be made.
    fn take_turn(&self) {
        std::thread::sleep(self.pace.as_ref().map_or(Duration::ZERO, |pace| pace.wait(Instant::now())));
    }

    fn attempt(&self, path: &str, body: Option<&Value>, longest: Duration) -> Result<Vec<u8>, Failure> {
        let passing = |error: &dyn std::fmt::Display| Failure::Passing(error.to_string(), None);
        let url = format!("{}{path}", self.url);
        let result = match body {
            Some(body) => {
                let request = self.agent.post(&url).header("content-type", "application/json");
                self.prepared(request, longest).send(body.to_string())
            }
            None => self.prepared(self.agent.get(&url), longest).call(),
        };
        let mut response = result.map_err(|error| match error {
            // No address to ask.
            ureq::Error::Other(error) => Failure::Final(error.to_string()),
            error => passing(&error),
        })?;
        let (status, pause) = (response.status(), retry_after(response.headers()));
        let most = self.limits.answer_bytes;
        let body = response.body_mut().with_config().limit(most).read_to_vec();
        let body = body.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => Failure::One(format!("an answer of more than {most} bytes")),
            error => passing(&error),
        })?;
        if status.is_success() {
            return Ok(body);
        }
        let said = self.without_token(&String::from_utf8_lossy(&body));
        let problem = format!("{status}: {}", said.chars().take(300).collect::<String>().trim());
        Err(match status {
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Failure::Passing(problem, pause),
            status if status.is_server_error() => Failure::Passing(problem, pause),
            StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
                Failure::Refused(problem)
            }
            _ => Failure::Final(problem),
        })
    }

    fn prepared<B>(&self, request: ureq::RequestBuilder<B>, longest: Duration) -> ureq::RequestBuilder<B> {
        // No time at all would be no limit.
        let request = request.config().timeout_global(Some(longest.max(Duration::from_millis(1)))).build();
        match &self.secret {
            Some(Secret { header, scheme, token }) => request.header(*header, format!("{scheme}{token}")),
            None => request,
        }
    }

    /// Some servers quote what they were sent.
    fn without_token(&self, said: &str) -> String {
        self.secret.as_ref().map_or_else(|| said.to_owned(), |secret| said.replace(&secret.token, "[key]"))
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get("retry-after")?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}
