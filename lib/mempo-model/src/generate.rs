//! Batched sampling with a key-value cache.

use tch::Tensor;

use crate::cache::Cache;
use crate::random::counter_uniform;
use crate::sampler::{Draw, Sampler};
use crate::{Error, Model};

/// How to sample.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Logits are divided by it; 0 takes the most probable id.
    pub temperature: f64,
    /// Sample from the smallest set of most probable ids that reaches this probability; 1 for all.
    pub top_p: f64,
    /// Ids to generate at most, fewer where the model's window ends first.
    pub max_tokens: usize,
    /// Ids that are never sampled.
    pub banned_ids: Vec<i32>,
    /// Ids that end a completion (and belong to it).
    pub end_ids: Vec<i32>,
    /// Ids from here on are never sampled (rows of the embedding that the tokenizer does not know).
    pub vocabulary_limit: usize,
}

/// A prompt and the key of its random numbers.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Ids before the completion, at least one.
    pub prompt_ids: Vec<i32>,
    /// The uniform number of the i-th id is a function of this seed and i alone.
    pub seed: u64,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The caller's `stop` said so.
    Stop,
    /// An end id was sampled.
    End,
    /// `max_tokens` or the model's window was reached.
    Length,
}

/// A completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Sampled ids, the end id included.
    pub ids: Vec<i32>,
    /// Natural log-probability of each: log-softmax of logits over temperature (1 when greedy), whole vocabulary.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// A row of the batch.
struct Row {
    request: usize,
    seed: u64,
    limit: usize,
    ids: Vec<i32>,
    logprobs: Vec<f32>,
    finish: Option<Finish>,
}

/// Samples one completion a request, all in one batch.
///
/// `stop(row, ids)` is asked after each id that ends nothing by itself, with the request's place and its ids so far.
/// The outcome does not depend on the order of the requests.
pub fn generate(
    model: &Model,
    requests: &[GenerateRequest],
    options: &GenerateOptions,
    stop: &mut dyn FnMut(usize, &[i32]) -> bool,
) -> Result<Vec<Generated>, Error> {
    let sampler = Sampler::new(model, options)?;
    let mut rows = rows(model, requests, options)?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let _guard = tch::no_grad_guard();
    let prompts: Vec<&[i32]> = rows.iter().map(|row| &requests[row.request].prompt_ids[..]).collect();
    let (mut cache, mut hidden) = Cache::prefill(model, &prompts, options.max_tokens);
    let mut live: Vec<usize> = (0..rows.len()).collect();
    loop {
        let uniforms: Vec<f32> =
            live.iter().map(|row| counter_uniform(rows[*row].seed, rows[*row].ids.len() as u64)).collect();
        let draws = sampler.draw(model, &hidden, &uniforms)?;
        for (row, draw) in live.iter().zip(&draws) {
            rows[*row].push(*draw, options, stop);
        }
        let open: Vec<i64> =
            (0..live.len()).filter(|slot| rows[live[*slot]].finish.is_none()).map(|slot| slot as i64).collect();
        if open.is_empty() {
            break;
        }
        let mut ids: Vec<i64> = draws.iter().map(|(id, _)| i64::from(*id)).collect();
        // Moving the cache costs about as much as a step over it, so a finished row stays until a quarter is finished.
        if open.len() * 4 <= live.len() * 3 {
            cache.keep(&open);
            ids = open.iter().map(|slot| ids[*slot as usize]).collect();
            live = open.iter().map(|slot| live[*slot as usize]).collect();
        }
        let ids = Tensor::from_slice(&ids).unsqueeze(1).to_device(model.runtime().device);
        hidden = cache.step(model, &ids);
    }
    rows.sort_by_key(|row| row.request);
    Ok(rows.into_iter().map(Row::into_generated).collect())
}

/// Checks the requests and sorts them by prompt length, prompt and seed.
fn rows(model: &Model, requests: &[GenerateRequest], options: &GenerateOptions) -> Result<Vec<Row>, Error> {
    if options.max_tokens == 0 {
        return Err(Error::Options("max_tokens 0: expected at least 1".to_owned()));
    }
    let window = model.config().max_position_embeddings;
    let mut rows = Vec::with_capacity(requests.len());
    for (request, GenerateRequest { prompt_ids, seed }) in requests.iter().enumerate() {
        model.check_ids(request, prompt_ids)?;
        let limit = options.max_tokens.min(window - prompt_ids.len());
        if limit == 0 {
            let problem = format!("has {window} tokens and fills the model's window; nothing can follow");
            return Err(Error::Sequence { row: request, problem });
        }
        rows.push(Row { request, seed: *seed, limit, ids: Vec::new(), logprobs: Vec::new(), finish: None });
    }
    rows.sort_by(|a, b| {
        let key = |row: &Row| (&requests[row.request].prompt_ids, row.seed);
        let length = |row: &Row| requests[row.request].prompt_ids.len();
        length(a).cmp(&length(b)).then_with(|| key(a).cmp(&key(b)))
    });
    Ok(rows)
}

impl Row {
    /// Takes a draw, unless the row has ended and merely waits to leave the batch.
    fn push(&mut self, (id, logprob): Draw, options: &GenerateOptions, stop: &mut dyn FnMut(usize, &[i32]) -> bool) {
        if self.finish.is_some() {
            return;
        }
        self.ids.push(id);
        self.logprobs.push(logprob);
        self.finish = if options.end_ids.contains(&id) {
            Some(Finish::End)
        } else if stop(self.request, &self.ids) {
            Some(Finish::Stop)
        } else if self.ids.len() >= self.limit {
            Some(Finish::Length)
        } else {
            None
        };
    }

    fn into_generated(self) -> Generated {
        Generated { ids: self.ids, logprobs: self.logprobs, finish: self.finish.unwrap_or(Finish::Length) }
    }
}
