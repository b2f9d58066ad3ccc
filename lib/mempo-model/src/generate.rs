//! Sampling with continuous batching: rows of a cache decode together; one that ends makes room at once for what comes
//! next, which goes on from as much of the row as it shares.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use tch::Tensor;

use crate::cache::{Cache, Continuation};
use crate::random::counter_uniform;
use crate::sampler::{Draw, Sampler};
use crate::{Error, Model};

/// Rows that decode for each that may wait: a pass over prompts costs about as much as a step of all rows, so it is done
/// for several at a time, and with completions of some hundred tokens eight is near the best.
const LIVE_PER_WAITING: usize = 8;
/// How long the row of a session that waits is kept for it while others have none: answers take less as a rule, and running a
/// prompt again is dear; but what hangs must not hold up those who could work.
const KEPT: Duration = Duration::from_secs(1);

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
    /// Sequences in the cache at a time; the others wait for their turn.
    pub max_rows: usize,
}

/// A prompt and the key of its random numbers.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Whose turn it is: one completion at a time a session. A later prompt of the same session is run from where it
    /// differs from what was there.
    pub session: usize,
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

/// What the caller of [`generate`] decides while it runs.
pub trait GenerateEvents {
    /// Asked after each id that ends nothing by itself, with a session's ids so far.
    fn is_complete(&mut self, session: usize, ids: &[i32]) -> bool;
    /// Takes the completions (with their sessions) that ended together, after every id of all rows; gives what is to be
    /// sampled next.
    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<GenerateRequest>;
    /// Sessions that have no request as yet and may have one later.
    fn waiting(&self) -> BTreeSet<usize> {
        BTreeSet::new()
    }
    /// Called when there is nothing to do until one of them has: waits for a while.
    fn wait(&mut self) {}
}

/// Samples a completion for every request, and for those that follow from them, until none is left and no session waits.
///
/// Sessions get their rows in the order of their first requests. The row of one that waits is kept for it, though no longer
/// than a second if another could have it. With the same requests in the same order the outcome is
/// the same; what runs beside a row changes at most the last bits of its log-probabilities.
pub fn generate(
    model: &Model,
    requests: Vec<GenerateRequest>,
    options: &GenerateOptions,
    events: &mut dyn GenerateEvents,
) -> Result<(), Error> {
    let model = model.for_decoding();
    let sampler = Sampler::new(model, options)?;
    let _guard = mempo_native::InferenceMode::new();
    let mut batch = Batch::new(model, options)?;
    let mut waiting = BTreeSet::new();
    batch.admit(requests, &waiting)?;
    let mut hidden: Option<Tensor> = None;
    loop {
        if let Some(new) = batch.start_waiting() {
            hidden = Some(hidden.map_or_else(|| new.shallow_clone(), |old| Tensor::cat(&[&old, &new], 0)));
        }
        let finished = match hidden {
            Some(states) => batch.push(&sampler.draw(model, &states, &batch.uniforms())?, events),
            None if waiting.is_empty() => return Ok(()),
            None => {
                events.wait();
                Vec::new()
            }
        };
        let next = events.next(finished);
        waiting = events.waiting();
        batch.admit(next, &waiting)?;
        hidden = batch.step();
    }
}

/// A request that is refused is named by its session.
fn check(model: &Model, GenerateRequest { session, prompt_ids, .. }: &GenerateRequest) -> Result<(), Error> {
    model.check_ids(*session, prompt_ids)?;
    let window = model.config().max_position_embeddings;
    if prompt_ids.len() < window {
        return Ok(());
    }
    let problem = format!("has {window} tokens and fills the model's window; nothing can follow");
    Err(Error::Sequence { row: *session, problem })
}

/// A completion in the making.
struct Work {
    prompt_ids: Vec<i32>,
    seed: u64,
    limit: usize,
    ids: Vec<i32>,
    logprobs: Vec<f32>,
}

/// A row of the cache.
#[derive(Default)]
struct Row {
    /// Whose row it is, until a session ends.
    session: Option<usize>,
    /// The ids whose keys and values it holds.
    held: Vec<i32>,
    work: Option<Work>,
    /// When its last work ended.
    ended: Option<Instant>,
}

struct Batch<'a> {
    model: &'a Model,
    options: &'a GenerateOptions,
    cache: Cache,
    /// Rows that decode come first, `live` of them; then those that wait to start and those without work.
    rows: Vec<Row>,
    live: usize,
    /// Requests of sessions that have no row.
    queue: VecDeque<GenerateRequest>,
    /// Sessions that waited too long to keep their rows.
    displaced: BTreeSet<usize>,
}

impl<'a> Batch<'a> {
    fn new(model: &'a Model, options: &'a GenerateOptions) -> Result<Self, Error> {
        if options.max_tokens == 0 || options.max_rows == 0 {
            let (tokens, rows) = (options.max_tokens, options.max_rows);
            return Err(Error::Options(format!("max_tokens {tokens}, max_rows {rows}: expected at least 1 of each")));
        }
        let (rows, queue, displaced) = (Vec::new(), VecDeque::new(), BTreeSet::new());
        Ok(Self { model, options, cache: Cache::new(model), rows, live: 0, queue, displaced })
    }

    /// Takes requests in: each in its session's row, or in one that is free, or in the queue. Sessions that asked for
    /// nothing and do not wait have ended.
    fn admit(&mut self, requests: Vec<GenerateRequest>, waiting: &BTreeSet<usize>) -> Result<(), Error> {
        for request in requests {
            check(self.model, &request)?;
            let own = self.rows.iter().position(|row| row.session == Some(request.session));
            match own {
                Some(row) => self.rows[row].assign(request, self.model, self.options),
                // The sooner what has begun goes on, the less is left to the end.
                None if self.displaced.remove(&request.session) => self.queue.push_front(request),
                None => self.queue.push_back(request),
            }
        }
        for row in self.rows.iter_mut().filter(|row| row.work.is_none()) {
            row.session = row.session.filter(|session| waiting.contains(session));
        }
        let free = self.rows.iter().filter(|row| row.session.is_none()).count();
        let needed = self.rows.len() + self.queue.len().saturating_sub(free);
        self.rows.resize_with(needed.min(self.options.max_rows), Row::default);
        self.give_rows(|row| row.session.is_none());
        self.give_rows(|row| row.work.is_none() && row.ended.is_some_and(|ended| ended.elapsed() >= KEPT));
        Ok(())
    }

    /// Gives such rows to the requests in the queue.
    fn give_rows(&mut self, may_be_given: impl Fn(&Row) -> bool) {
        for row in self.rows.iter_mut().filter(|row| may_be_given(row)) {
            let Some(request) = self.queue.pop_front() else { return };
            self.displaced.extend(row.session);
            row.assign(request, self.model, self.options);
        }
    }

    /// Runs the prompts of the rows that wait, unless they are few beside those that decode: a pass over a prompt costs
    /// about as much as a step of all. Gives the hidden states at their ends.
    fn start_waiting(&mut self) -> Option<Tensor> {
        let waiting = || self.rows[self.live..].iter().filter_map(|row| row.work.as_ref());
        let count = waiting().count();
        if count == 0 || count * LIVE_PER_WAITING < self.live {
            return None;
        }
        let room = waiting().map(Work::room).max().unwrap_or(0);
        self.cache.reserve(self.rows.len(), room);
        let started = self.live..self.live + count;
        self.bring_forward(started.clone(), self.rows.len());
        let continuation = |row: usize| {
            let Row { held, work, .. } = &self.rows[row];
            let prompt = work.as_ref().map_or(&[][..], |work| &work.prompt_ids);
            // The last id of a prompt is always run: what follows is drawn from its hidden state.
            let shared = held.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
            // Going on from a short prefix costs more (a mask, and the prefix gathered) than running it again.
            let kept = if 2 * shared < prompt.len() { 0 } else { shared };
            Continuation { row, kept, ids: &prompt[kept..] }
        };
        let continuations: Vec<Continuation> = started.clone().map(continuation).collect();
        let hidden = self.cache.extend(self.model, &continuations);
        for row in &mut self.rows[started.clone()] {
            row.held.clear();
            row.held.extend(row.work.iter().flat_map(|work| &work.prompt_ids));
        }
        self.live = started.end;
        Some(hidden)
    }

    /// The numbers that decide the next id of each row that decodes.
    fn uniforms(&self) -> Vec<f32> {
        let work = self.rows[..self.live].iter().filter_map(|row| row.work.as_ref());
        work.map(|work| counter_uniform(work.seed, work.ids.len() as u64)).collect()
    }

    /// Gives each row its draw; takes out the completions that end with it, and puts the rows that go on first.
    fn push(&mut self, draws: &[Draw], events: &mut dyn GenerateEvents) -> Vec<(usize, Generated)> {
        let mut finished = Vec::new();
        for (row, draw) in self.rows.iter_mut().zip(draws) {
            finished.extend(row.push(*draw, self.options, events));
        }
        let live = self.live - finished.len();
        self.bring_forward(0..live, self.live);
        self.live = live;
        finished
    }

    /// Makes `front` rows with work only: the others there change places with rows with work behind them, before `end`.
    fn bring_forward(&mut self, front: Range<usize>, end: usize) {
        let idle = front.clone().filter(|row| self.rows[*row].work.is_none());
        let busy = (front.end..end).filter(|row| self.rows[*row].work.is_some());
        let pairs: Vec<(usize, usize)> = idle.zip(busy).collect();
        for (idle, busy) in &pairs {
            self.rows.swap(*idle, *busy);
        }
        let both: Vec<(usize, usize)> = pairs.iter().flat_map(|(a, b)| [(*a, *b), (*b, *a)]).collect();
        self.cache.move_rows(&both);
    }

    /// One token more in every row that decodes; nothing if there is none.
    fn step(&mut self) -> Option<Tensor> {
        if self.live == 0 {
            return None;
        }
        let mut ids = Vec::with_capacity(self.live);
        for row in &mut self.rows[..self.live] {
            let last = row.work.as_ref().and_then(|work| work.ids.last().copied()).expect("a live row has just drawn");
            row.held.push(last);
            ids.push(i64::from(last));
        }
        let ids = Tensor::from_slice(&ids).unsqueeze(1).to_device(self.model.runtime().device);
        Some(self.cache.step(self.model, &ids))
    }
}

impl Work {
    /// Tokens its row must hold.
    fn room(&self) -> usize {
        self.prompt_ids.len() + self.limit
    }
}

impl Row {
    fn assign(&mut self, request: GenerateRequest, model: &Model, options: &GenerateOptions) {
        let GenerateRequest { session, prompt_ids, seed } = request;
        let limit = options.max_tokens.min(model.config().max_position_embeddings - prompt_ids.len());
        self.session = Some(session);
        self.work = Some(Work { prompt_ids, seed, limit, ids: Vec::new(), logprobs: Vec::new() });
    }

    /// Takes a draw; the completion, if it ends with it.
    fn push(
        &mut self,
        (id, logprob): Draw,
        options: &GenerateOptions,
        events: &mut dyn GenerateEvents,
    ) -> Option<(usize, Generated)> {
        let (session, work) = (self.session?, self.work.as_mut()?);
        work.ids.push(id);
        work.logprobs.push(logprob);
        let finish = if options.end_ids.contains(&id) {
            Finish::End
        } else if events.is_complete(session, &work.ids) {
            Finish::Stop
        } else if work.ids.len() >= work.limit {
            Finish::Length
        } else {
            return None;
        };
        let Work { ids, logprobs, .. } = self.work.take()?;
        self.ended = Some(Instant::now());
        Some((session, Generated { ids, logprobs, finish }))
    }
}

/// Samples one completion a request, in the order given; sessions play no part. `stop(request, ids)` is as
/// [`GenerateEvents::is_complete`]. The outcome does not depend on the order of the requests.
pub fn generate_each(
    model: &Model,
    requests: &[GenerateRequest],
    options: &GenerateOptions,
    stop: &mut dyn FnMut(usize, &[i32]) -> bool,
) -> Result<Vec<Generated>, Error> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|place| {
        let GenerateRequest { prompt_ids, seed, .. } = &requests[*place];
        (prompt_ids.len(), prompt_ids, *seed)
    });
    let each = order.iter().map(|place| GenerateRequest { session: *place, ..requests[*place].clone() }).collect();
    let mut events = Each { stop, found: requests.iter().map(|_| None).collect() };
    generate(model, each, options, &mut events)?;
    Ok(events.found.into_iter().flatten().collect())
}

struct Each<'a> {
    stop: &'a mut dyn FnMut(usize, &[i32]) -> bool,
    found: Vec<Option<Generated>>,
}

impl GenerateEvents for Each<'_> {
    fn is_complete(&mut self, session: usize, ids: &[i32]) -> bool {
        (self.stop)(session, ids)
    }

    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<GenerateRequest> {
        for (session, generated) in finished {
            self.found[session] = Some(generated);
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Kind;

    use super::*;
    use crate::{Config, Runtime};

    #[test]
    fn there_are_no_more_rows_than_requests() {
        let config = Config::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen2")).unwrap();
        let model = Model::initialise(config, 4, &Runtime::cpu(Kind::Float)).unwrap();
        let options = GenerateOptions {
            temperature: 1.0,
            top_p: 1.0,
            max_tokens: 4,
            banned_ids: vec![],
            end_ids: vec![],
            vocabulary_limit: 199,
            max_rows: 4,
        };
        let request = |session| GenerateRequest { session, prompt_ids: vec![1, 2], seed: 0 };
        let mut batch = Batch::new(&model, &options).unwrap();
        for (sessions, rows, queued) in [(0..1, 1, 0), (1..3, 3, 0), (3..9, 4, 5)] {
            batch.admit(sessions.map(request).collect(), &BTreeSet::new()).unwrap();
            assert_eq!((batch.rows.len(), batch.queue.len()), (rows, queued));
        }
        // Rows that became free are given before there are new ones.
        let mut batch = Batch::new(&model, &options).unwrap();
        batch.admit(vec![request(0), request(1)], &BTreeSet::new()).unwrap();
        batch.rows.iter_mut().for_each(|row| row.work = None);
        batch.admit(vec![request(2)], &BTreeSet::new()).unwrap();
        assert_eq!((batch.rows.len(), batch.queue.len()), (2, 0));
    }
}
