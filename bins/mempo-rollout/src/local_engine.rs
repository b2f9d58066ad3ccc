//! A model in this process as the agent's engine: stop strings, end-of-turn and forbidden ids as the tokenizer has them.

use std::collections::{BTreeSet, HashMap};

use mempo_agent::{Engine, Environment, Generation, Request, SamplingOptions};
use mempo_data::StopReason;
use mempo_model::{Finish, GenerateEvents, GenerateOptions, GenerateRequest, Generated, Model, generate};
use mempo_text::{PromptBuilder, Tokenizer};

use crate::watchdog::{SILENCE, Watchdog};

/// What the tokenizer says of the ids that may be sampled.
pub(crate) struct SampledIds {
    /// Those that end a turn.
    pub(crate) end_ids: Vec<i32>,
    /// The other control ids.
    pub(crate) banned_ids: Vec<i32>,
}

impl SampledIds {
    pub(crate) fn of(builder: &PromptBuilder) -> Self {
        let tokenizer = builder.tokenizer();
        let mut end_ids = tokenizer.end_of_turn_ids().to_vec();
        end_ids.extend(builder.end_of_turn_id().filter(|id| !tokenizer.end_of_turn_ids().contains(id)));
        let banned_ids = tokenizer.control_ids().iter().filter(|id| !end_ids.contains(id)).copied().collect();
        Self { end_ids, banned_ids }
    }
}

/// Generates with a model in this process.
pub(crate) struct LocalEngine<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    stop: Vec<Vec<u8>>,
    options: GenerateOptions,
    interrupted: &'a dyn Fn() -> bool,
}

impl<'a> LocalEngine<'a> {
    /// Control ids other than end-of-turn are never sampled, nor are ids that the tokenizer does not know. At most
    /// `max_rows` trajectories are in the cache. Once `interrupted` says so, every run ends at once with an error.
    pub(crate) fn new(
        model: &'a Model,
        builder: &'a PromptBuilder,
        sampling: &SamplingOptions,
        max_rows: usize,
        interrupted: &'a dyn Fn() -> bool,
    ) -> Self {
        let (tokenizer, SampledIds { end_ids, banned_ids }) = (builder.tokenizer(), SampledIds::of(builder));
        let options = GenerateOptions {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            max_tokens: sampling.max_completion_tokens,
            banned_ids,
            end_ids,
            vocabulary_limit: tokenizer.vocabulary_size(),
            max_rows,
        };
        let stop = builder.profile().stop.iter().map(|text| text.clone().into_bytes()).collect();
        Self { model, tokenizer, stop, options, interrupted }
    }
}

impl Engine for LocalEngine<'_> {
    fn run(&mut self, requests: Vec<Request>, environment: &mut dyn Environment) -> Result<(), String> {
        let mut events = Events {
            tokenizer: self.tokenizer,
            stop: StopStrings::new(&self.stop),
            interrupted: self.interrupted,
            environment,
            under_way: requests.len(),
            watchdog: Watchdog::new(SILENCE),
        };
        let requests = requests.into_iter().map(request).collect();
        generate(self.model, requests, &self.options, &mut events).map_err(|error| error.to_string())?;
        if (self.interrupted)() { Err("interrupted".to_owned()) } else { Ok(()) }
    }
}

/// The model asks; tokenizer and agent answer.
struct Events<'a, 'e> {
    tokenizer: &'a Tokenizer,
    stop: StopStrings<'a>,
    interrupted: &'a dyn Fn() -> bool,
    environment: &'e mut dyn Environment,
    /// Completions that have been asked for.
    under_way: usize,
    watchdog: Watchdog,
}

impl GenerateEvents for Events<'_, '_> {
    fn is_complete(&mut self, session: usize, ids: &[i32]) -> bool {
        (self.interrupted)() || self.stop.is_complete(session, ids, |id| self.tokenizer.token_bytes(id))
    }

    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<GenerateRequest> {
        if (self.interrupted)() {
            return Vec::new();
        }
        for (session, _) in &finished {
            self.stop.forget(*session);
        }
        let ended = finished.len();
        let finished = finished.into_iter().map(|(session, generated)| (session, Ok(generation(generated))));
        let next = self.environment.next(finished.collect());
        self.under_way = self.under_way + next.len() - ended;
        if ended == 0 && next.is_empty() {
            let (under_way, waiting) = (self.under_way, || self.environment.waiting().len());
            self.watchdog
                .look(|| format!("{under_way} completions are under way, {} trajectories wait for a tool", waiting()));
        } else {
            self.watchdog.finished();
        }
        next.into_iter().map(request).collect()
    }

    fn waiting(&self) -> BTreeSet<usize> {
        if (self.interrupted)() { BTreeSet::new() } else { self.environment.waiting().into_iter().collect() }
    }

    fn wait(&mut self) {
        self.environment.wait();
    }
}

fn request(Request { trajectory, prompt_ids, seed, .. }: Request) -> GenerateRequest {
    GenerateRequest { session: trajectory, prompt_ids, seed }
}

fn generation(generated: Generated) -> Generation {
    let stop_reason = match generated.finish {
        Finish::Stop => StopReason::StopString,
        Finish::End => StopReason::Eos,
        Finish::Length => StopReason::MaxTokens,
    };
    Generation { ids: generated.ids, logprobs: generated.logprobs, stop_reason }
}

/// Finds stop strings in growing completions by looking at new bytes only.
struct StopStrings<'a> {
    texts: &'a [Vec<u8>],
    /// Of each row: how many ids were looked at, and the last bytes of them, too few for a whole stop string.
    rows: HashMap<usize, (usize, Vec<u8>)>,
}

impl<'a> StopStrings<'a> {
    fn new(texts: &'a [Vec<u8>]) -> Self {
        Self { texts, rows: HashMap::new() }
    }

    /// The row's next completion begins.
    fn forget(&mut self, row: usize) {
        self.rows.remove(&row);
    }

    /// Whether a stop string ends within the ids that are new since the last call for this row.
    fn is_complete<'t>(&mut self, row: usize, ids: &[i32], bytes_of: impl Fn(i32) -> &'t [u8]) -> bool {
        let (seen, tail) = self.rows.entry(row).or_default();
        ids[*seen..].iter().for_each(|id| tail.extend_from_slice(bytes_of(*id)));
        *seen = ids.len();
        let complete = self.texts.iter().any(|text| tail.windows(text.len()).any(|window| window == text.as_slice()));
        let keep = self.texts.iter().map(Vec::len).max().unwrap_or(1) - 1;
        tail.drain(..tail.len().saturating_sub(keep));
        complete
    }
}

#[cfg(test)]
mod speed;
#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for one tool, and for nothing else.
    struct OneWaits;

    impl Environment for OneWaits {
        fn next(&mut self, _: Vec<(usize, mempo_agent::Generated)>) -> Vec<Request> {
            Vec::new()
        }

        fn waiting(&self) -> Vec<usize> {
            vec![0]
        }
    }

    #[test]
    fn it_is_said_when_no_completion_ends() {
        let folder = tempfile::tempdir().unwrap();
        mempo_text::train_tokenizer(
            ["red".to_owned()].into_iter(),
            &mempo_text::NewTokenizer::of_size(270),
            folder.path(),
        )
        .unwrap();
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        let short = std::time::Duration::from_millis(30);
        let lines = crate::watchdog::testing::lines_of(|| {
            let mut events = Events {
                tokenizer: &tokenizer,
                stop: StopStrings::new(&[]),
                interrupted: &|| false,
                environment: &mut OneWaits,
                under_way: 3,
                watchdog: Watchdog::new(short),
            };
            for _ in 0..2 {
                assert!(events.next(Vec::new()).is_empty());
                std::thread::sleep(short);
            }
            let ended = Generated { ids: Vec::new(), logprobs: Vec::new(), finish: Finish::End };
            events.next(vec![(0, ended)]);
            assert_eq!(events.under_way, 2);
            std::thread::sleep(short);
            events.next(Vec::new());
        });
        let told = |count| {
            format!("nothing has finished for 0 s: {count} completions are under way, 1 trajectories wait for a tool")
        };
        assert_eq!(lines, [told(3), told(2)]);
    }

    /// Every cut of a text into tokens finds the stop string at the token that completes it, row by row.
    #[test]
    fn stop_strings_are_found_however_they_are_cut() {
        let text = b"<a></ans</answer>x</answer>".as_slice();
        let texts = [b"</answer>".to_vec(), b"never".to_vec()];
        let end = 17;
        for size in 1..=text.len() {
            let tokens: Vec<&[u8]> = text.chunks(size).collect();
            let ids: Vec<i32> = (0..tokens.len() as i32).collect();
            let mut stop = StopStrings::new(&texts);
            for count in 1..=ids.len() {
                assert!(!stop.is_complete(1, &ids[..count], |_| b"</answer"), "another row, another text");
                let complete = stop.is_complete(0, &ids[..count], |id| tokens[id as usize]);
                let before = (count - 1) * size;
                let second = before < text.len() && count * size >= text.len();
                assert_eq!(complete, (before < end && count * size >= end) || second, "{size} {count}");
            }
        }
    }
}
