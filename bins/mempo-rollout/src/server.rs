//! A vLLM or SGLang server that generates in this program's place, once it is known to serve the checkpoint.
//!
//! A checkpoint has a name that only its own files give ([`served_name`]). vLLM bears it as `--served-model-name`, and refuses
//! requests for another; SGLang bears it as the version of its weights, and says it with every answer.

mod engine;
mod protocol;
mod teacher;

use std::path::Path;
use std::time::Duration;

use clap::Args;
use mempo_agent::{Request, SamplingOptions};
use mempo_model::Config;
use mempo_text::{Carried, PromptBuilder};
use serde_json::{Value, json};

pub(crate) use self::engine::Remote;
use self::protocol::{Asking, Kind, Protocol};
pub(crate) use self::teacher::TeacherOptions;
use crate::http::{self, Client, Failure, Limits, Secret};
use crate::local_engine::SampledIds;

/// Hexadecimal digits of a digest in a name.
const NAME_DIGITS: usize = 16;
/// Longest answer read, in bytes.
const ANSWER_BYTES: u64 = 64 << 20;
/// The environment's word for the server.
const KEY: &str = "MEMPO_SERVER_KEY";

/// Where completions come from, if not from this process.
#[derive(Debug, Args)]
pub(crate) struct ServerOptions {
    /// Let this vLLM or SGLang server generate. It has to serve --model: vLLM started with
    /// `--served-model-name "$(mempo-rollout served-name --model DIR)" --logprobs-mode processed_logprobs`, SGLang given its
    /// weights by --update-server. A key, if it wants one, is read from the environment as MEMPO_SERVER_KEY
    #[arg(long, value_name = "URL", value_parser = address)]
    pub(crate) server: Option<String>,
    /// Have SGLang load the weights of --model first, from the same path
    #[arg(long, requires = "server")]
    pub(crate) update_server: bool,
    /// Take it on trust that the server has the weights of --model
    #[arg(long, requires = "server", conflicts_with = "update_server")]
    pub(crate) trust_server: bool,
    /// Longest time of one attempt at a completion
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) server_timeout: u64,
    /// Longest time for one completion, with all attempts and pauses; then its trajectory ends as engine_error
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) server_deadline: u64,
    /// How often a request is made again that failed, each time after a longer pause
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub(crate) server_retries: u32,
    /// Most requests in a minute, evenly spread
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) server_requests_per_minute: Option<u32>,
}

impl ServerOptions {
    /// What a rollout is known by: parts of two engines must not be mixed.
    pub(crate) fn recorded(&self) -> Option<&'static str> {
        let _ = self.server.as_ref()?;
        Some(if self.trust_server { "trusted" } else { "proven" })
    }
}

/// A server's address, with or without the path of its protocol.
fn address(text: &str) -> Result<String, String> {
    http::address(text.trim_end_matches('/').trim_end_matches("/v1"))
}

/// How much a server may take: it is given up by who asks, not left alone.
fn limits(options: &ServerOptions) -> Limits {
    Limits {
        attempt: Duration::from_secs(options.server_timeout),
        call: Some(Duration::from_secs(options.server_deadline)),
        retries: options.server_retries,
        answer_bytes: ANSWER_BYTES,
        per_minute: options.server_requests_per_minute,
        // Generation has a rule of its own for servers that are of no use.
        leaves_alone: false,
    }
}

/// What a server has to call the checkpoint with this digest.
pub(crate) fn served_name(digest: &str) -> String {
    format!("mempo-{}", &digest[..NAME_DIGITS.min(digest.len())])
}

/// Looks what kind of server it is and which model it serves, of which `digest` has to be the digest and `dir` the place.
pub(crate) fn open(
    url: &str,
    options: &ServerOptions,
    (dir, digest, config): (&Path, &str, &Config),
    builder: &PromptBuilder,
    sampling: &SamplingOptions,
) -> Result<Remote, String> {
    let client = Client::new(url, Secret::bearer(KEY), limits(options));
    let name = served_name(digest);
    let kind = kind(&client)?;
    if options.update_server {
        update(&client, kind, dir, &name)?;
    }
    let model = match kind {
        Kind::Vllm => vllm_model(&client, &name, options.trust_server)?,
        Kind::Sglang => name.clone(),
    };
    let (tokenizer, SampledIds { end_ids, mut banned_ids }) = (builder.tokenizer(), SampledIds::of(builder));
    // Rows of the embedding that no text has.
    banned_ids.extend((tokenizer.vocabulary_size() as i32)..config.vocab_size as i32);
    let is_proven = model == name && (kind == Kind::Vllm || !options.trust_server);
    let described = json!({"protocol": kind, "model": model, "is_proven": is_proven});
    let asking = Asking {
        kind,
        model,
        weights: (kind == Kind::Sglang && !options.trust_server).then_some(name),
        sampling: sampling.clone(),
        stop: builder.profile().stop.clone(),
        end_ids,
        banned_ids,
        vocabulary_size: tokenizer.vocabulary_size(),
    };
    check_answers(&client, &asking, builder)?;
    Ok(Remote { client, protocol: Box::new(asking), described })
}

/// Completions of one token, read as all will be; and log-probabilities have to be those at the sampling temperature: what is
/// not most probable becomes more so as the temperature grows, unless they are of the model's raw numbers; and what is most
/// probable stays as it is where --top-p leaves nothing else, unless they are of what was left.
fn check_answers(client: &Client, asking: &Asking, builder: &PromptBuilder) -> Result<(), String> {
    let prompt_ids = builder.prompt("?", &Carried::default()).map_err(|error| error.to_string())?;
    let request = Request { trajectory: 0, prompt_ids, messages: Vec::new(), seed: 1 };
    let first = |temperature: f64, top_p: f64| {
        let sampling = SamplingOptions { temperature, top_p, max_completion_tokens: 1 };
        let asking = Asking { sampling, ..asking.clone() };
        let read = |answer: &Value| {
            asking.generation(answer)?;
            Ok(asking.most_probable(answer))
        };
        let path = asking.path();
        client.ask(path, Some(&asking.body(&request, 5)), read).map_err(|failure| told(client, path, &failure))
    };
    let runner_up = |found: &[f64]| {
        let lacking = || format!("{}: it names no second most probable token", client.url());
        found.get(1).copied().ok_or_else(lacking)
    };
    let SamplingOptions { temperature, top_p, .. } = asking.sampling;
    let cold = runner_up(&first(temperature, 1.0)?)?;
    if temperature == 0.0 {
        return Ok(());
    }
    let hot = first(4.0 * temperature, 1.0)?;
    if (cold - runner_up(&hot)?).abs() < 1e-4 {
        return Err(format!(
            "{}: its log-probabilities do not depend on the temperature, so they are not those it samples from (vLLM gives \
             these when started with --logprobs-mode processed_logprobs)",
            client.url()
        ));
    }
    if top_p < 1.0 && first(4.0 * temperature, 1e-6)?.first().is_none_or(|best| (best - hot[0]).abs() >= 1e-4) {
        return Err(format!(
            "{}: its log-probabilities are of what --top-p leaves, and those of the whole distribution are wanted: give --top-p 1",
            client.url()
        ));
    }
    Ok(())
}

fn told(client: &Client, path: &str, failure: &Failure) -> String {
    format!("{}{path}: {}", client.url(), failure.problem())
}

/// SGLang tells of its model where vLLM has nothing.
fn kind(client: &Client) -> Result<Kind, String> {
    match client.ask("/get_model_info", None, |_| Ok(())) {
        Ok(()) => Ok(Kind::Sglang),
        Err(Failure::Final(_)) => Ok(Kind::Vllm),
        Err(failure) => Err(told(client, "/get_model_info", &failure)),
    }
}

/// The name to ask vLLM for.
fn vllm_model(client: &Client, name: &str, is_trusted: bool) -> Result<String, String> {
    let path = "/v1/models";
    let names = |answer: &Value| {
        let models = answer["data"].as_array().ok_or_else(|| Failure::One("it lists no models".to_owned()))?;
        Ok(models.iter().filter_map(|model| Some(model["id"].as_str()?.to_owned())).collect::<Vec<_>>())
    };
    let names = client.ask(path, None, names).map_err(|failure| told(client, path, &failure))?;
    match names.first() {
        _ if names.iter().any(|found| found == name) => Ok(name.to_owned()),
        Some(first) if is_trusted => Ok(first.clone()),
        _ => Err(format!(
            "{}: serves `{}`, expected `{name}`, as this checkpoint is called: start vLLM on it with --served-model-name \
             {name}, or give --trust-server",
            client.url(),
            names.join("`, `")
        )),
    }
}

/// Has SGLang load other weights.
fn update(client: &Client, kind: Kind, dir: &Path, name: &str) -> Result<(), String> {
    if kind == Kind::Vllm {
        let url = client.url();
        return Err(format!("{url}: vLLM cannot be told to load --model; start it anew, without --update-server"));
    }
    let path = "/update_weights_from_disk";
    let body = json!({"model_path": dir, "weight_version": name, "flush_cache": true});
    let done = |answer: &Value| {
        if answer["success"] == true { Ok(()) } else { Err(Failure::Final(format!("it says {answer}"))) }
    };
    client.ask(path, Some(&body), done).map_err(|failure| told(client, path, &failure))
}

#[cfg(test)]
mod tests;
