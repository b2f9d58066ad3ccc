//! Generation against the plain forward pass, and its independence of what runs beside a row.

use std::collections::{BTreeMap, BTreeSet};

use mempo_model::{
    Finish, GenerateEvents, GenerateOptions, GenerateRequest, Generated, Model, ScoreOptions, ScoredSequence, generate,
    generate_each,
};
use tch::{Kind, Tensor};

use crate::{fresh, ids, logits};

fn options(temperature: f64, max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        temperature,
        top_p: 1.0,
        max_tokens,
        banned_ids: vec![3, 150],
        end_ids: vec![7],
        vocabulary_limit: 190,
        max_rows: 16,
    }
}

fn requests(count: u64) -> Vec<GenerateRequest> {
    // Every third shares a prompt with the one before it; lengths from 1 to 40.
    let prompt = |i: u64| ids(i - u64::from(i % 3 == 2), 1 + (i - u64::from(i % 3 == 2)) * 17 % 40);
    (0..count).map(|i| GenerateRequest { session: 0, prompt_ids: prompt(i), seed: 1000 + i }).collect()
}

fn run(model: &Model, requests: &[GenerateRequest], options: &GenerateOptions) -> Vec<Generated> {
    generate_each(model, requests, options, &mut |_, _| false).unwrap()
}

/// Without a cache: at every step the whole sequence anew.
fn greedy_by_full_forward(model: &Model, prompt: &[i32], options: &GenerateOptions) -> Vec<i32> {
    let mut sequence = prompt.to_vec();
    while sequence.len() < prompt.len() + options.max_tokens {
        let last = Vec::<f32>::try_from(logits(model, &sequence).get(sequence.len() as i64 - 1)).unwrap();
        let allowed = (0..options.vocabulary_limit as i32).filter(|id| !options.banned_ids.contains(id));
        let id = allowed.max_by(|a, b| last[*a as usize].total_cmp(&last[*b as usize])).unwrap();
        sequence.push(id);
        if options.end_ids.contains(&id) {
            break;
        }
    }
    sequence[prompt.len()..].to_vec()
}

#[test]
fn cached_decoding_is_the_full_forward_pass() {
    for family in ["qwen2", "qwen3", "llama"] {
        let model = fresh(family, 3, Kind::Float);
        let (requests, options) = (requests(12), options(0.0, 24));
        for (request, generated) in requests.iter().zip(run(&model, &requests, &options)) {
            assert_eq!(generated.ids, greedy_by_full_forward(&model, &request.prompt_ids, &options), "{family}");
        }
    }
}

#[test]
fn logprobs_of_sampling_are_those_of_scoring() {
    for (family, temperature, top_p) in
        [("qwen2", 1.0, 1.0), ("llama", 0.6, 1.0), ("llama", 1.3, 0.8), ("qwen2", 0.0, 1.0)]
    {
        let model = fresh(family, 4, Kind::Float);
        let requests = requests(12);
        let generated = run(&model, &requests, &GenerateOptions { top_p, ..options(temperature, 24) });
        let sequences: Vec<ScoredSequence> = requests
            .iter()
            .zip(&generated)
            .map(|(request, generated)| ScoredSequence {
                ids: [&request.prompt_ids[..], &generated.ids].concat(),
                targets: request.prompt_ids.len()..request.prompt_ids.len() + generated.ids.len(),
            })
            .collect();
        let scored =
            model.completion_logprobs(&sequences, &ScoreOptions { temperature, tokens_per_batch: 200 }).unwrap();
        for (generated, scored) in generated.iter().zip(&scored) {
            assert_eq!(generated.logprobs.len(), scored.len());
            for (a, b) in generated.logprobs.iter().zip(scored) {
                assert!((a - b).abs() < 1e-5, "{family} {temperature}: {a} {b}");
            }
        }
    }
}

#[test]
fn a_completion_depends_neither_on_order_nor_on_company() {
    let model = fresh("llama", 5, Kind::Float);
    let (requests, options) = (requests(20), options(1.0, 32));
    let together = run(&model, &requests, &options);
    let backwards: Vec<GenerateRequest> = requests.iter().rev().cloned().collect();
    let mut reversed = run(&model, &backwards, &options);
    reversed.reverse();
    assert_eq!(together, reversed);
    for (request, generated) in requests.iter().zip(&together) {
        assert_eq!(run(&model, std::slice::from_ref(request), &options)[0].ids, generated.ids);
    }
}

#[test]
fn completions_end_where_they_should() {
    let model = fresh("qwen2", 6, Kind::Float);
    let requests = requests(60);
    let mut asked = vec![0; requests.len()];
    let generated = generate_each(&model, &requests, &options(1.0, 40), &mut |row, ids| {
        asked[row] += 1;
        assert_eq!(ids.len(), asked[row], "asked once an id, in order");
        ids.ends_with(&[11]) || ids.ends_with(&[12])
    })
    .unwrap();
    let mut counts = [0; 3];
    for generated in &generated {
        let last = *generated.ids.last().unwrap();
        let expected = match (last, generated.ids.len()) {
            (7, _) => Finish::End,
            (11 | 12, _) => Finish::Stop,
            (_, length) => {
                assert_eq!(length, 40);
                Finish::Length
            }
        };
        assert_eq!(generated.finish, expected);
        assert!(generated.ids[..generated.ids.len() - 1].iter().all(|id| ![7, 11, 12].contains(id)));
        assert!(generated.ids.iter().all(|id| *id < 190 && *id != 3 && *id != 150), "forbidden ids");
        counts[expected as usize] += 1;
    }
    assert!(counts.iter().all(|count| *count > 2), "{counts:?}");
}

#[test]
fn the_window_ends_a_completion() {
    let model = fresh("qwen2", 6, Kind::Float);
    let request = |length| [GenerateRequest { session: 0, prompt_ids: ids(1, length), seed: 1 }];
    let options = GenerateOptions { end_ids: Vec::new(), ..options(1.0, 40) };
    let generated = run(&model, &request(250), &options);
    assert_eq!((generated[0].ids.len(), generated[0].finish), (6, Finish::Length));
    for length in [0, 256, 257] {
        let error = generate_each(&model, &request(length), &options, &mut |_, _| false).unwrap_err().to_string();
        assert!(error.contains("sequence 0"), "{error}");
    }
}

#[test]
fn sampled_frequencies_are_those_of_the_softmax() {
    let model = fresh("llama", 8, Kind::Float);
    let prompt = ids(21, 10);
    let requests: Vec<GenerateRequest> =
        (0..20_000).map(|seed| GenerateRequest { session: 0, prompt_ids: prompt.clone(), seed }).collect();
    for temperature in [1.0, 0.5] {
        let options = GenerateOptions { end_ids: Vec::new(), max_rows: 20_000, ..options(temperature, 1) };
        let mut counts = vec![0.0f64; 199];
        for generated in run(&model, &requests, &options) {
            counts[generated.ids[0] as usize] += 1.0;
        }
        let scaled = logits(&model, &prompt).get(9).to_kind(Kind::Double) / temperature;
        let forbidden: Vec<bool> = (0..199).map(|id| id >= 190 || id == 3 || id == 150).collect();
        let scaled = scaled.masked_fill(&Tensor::from_slice(&forbidden), f64::NEG_INFINITY);
        let probabilities = Vec::<f64>::try_from(scaled.softmax(-1, Kind::Double)).unwrap();
        // Ids expected fewer than five times are taken together, as the test asks for.
        let (mut bins, mut rare) = (Vec::new(), (0.0, 0.0));
        for (count, probability) in counts.iter().zip(&probabilities) {
            let expected = probability * 20_000.0;
            if expected >= 5.0 {
                bins.push((*count, expected));
            } else {
                rare = (rare.0 + count, rare.1 + expected);
            }
        }
        bins.push(rare);
        let chi_square: f64 =
            bins.iter().map(|(count, expected)| (count - expected).powi(2) / expected.max(1e-9)).sum();
        let freedom = bins.len() as f64 - 1.0;
        // Wilson-Hilferty: 99.9 % of chi-squares lie below.
        let limit = freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.09 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
        assert!(bins.len() > 20 && chi_square < limit, "{temperature}: {chi_square} over {freedom}, limit {limit}");
    }
}

#[test]
fn bf16_with_lone_query_heads_decodes_as_the_full_pass_does() {
    let mut config = fresh("llama", 1, Kind::Float).config().clone();
    config.num_key_value_heads = None;
    let runtime = mempo_model::Runtime::cpu(Kind::BFloat16);
    let model = Model::initialise(config, 1, &runtime).unwrap();
    let requests = requests(8);
    let generated = run(&model, &requests, &options(1.0, 16));
    let sequences: Vec<ScoredSequence> = requests
        .iter()
        .zip(&generated)
        .map(|(request, generated)| ScoredSequence {
            ids: [&request.prompt_ids[..], &generated.ids].concat(),
            targets: request.prompt_ids.len()..request.prompt_ids.len() + generated.ids.len(),
        })
        .collect();
    let scored =
        model.completion_logprobs(&sequences, &ScoreOptions { temperature: 1.0, tokens_per_batch: 1000 }).unwrap();
    let pairs: Vec<(f32, f32)> = generated.iter().flat_map(|g| g.logprobs.clone()).zip(scored.concat()).collect();
    let mean = pairs.iter().map(|(a, b)| (a - b).abs()).sum::<f32>() / pairs.len() as f32;
    assert!(mean < 0.05, "{mean}");
}

/// Three prompts a session: the second goes on from the first and its completion, the third goes back to the first.
struct Conversations<'a> {
    stops: &'a dyn Fn(&[i32]) -> bool,
    steps: Vec<Vec<(Vec<i32>, Generated)>>,
    open: Vec<Vec<i32>>,
}

impl Conversations<'_> {
    fn request(&mut self, session: usize) -> GenerateRequest {
        let first = |steps: &[(Vec<i32>, Generated)]| steps[0].0.clone();
        let steps = &self.steps[session];
        let prompt_ids = match steps.len() {
            0 => ids(session as u64 % 4, 20 + 7 * (session as u64 % 4)),
            1 => [first(steps), steps[0].1.ids.clone(), ids(50 + session as u64, 9)].concat(),
            _ => [first(steps), ids(90 + session as u64, 5 + session as u64)].concat(),
        };
        self.open[session].clone_from(&prompt_ids);
        GenerateRequest { session, prompt_ids, seed: 10 * session as u64 + steps.len() as u64 }
    }
}

impl GenerateEvents for Conversations<'_> {
    fn is_complete(&mut self, _: usize, ids: &[i32]) -> bool {
        (self.stops)(ids)
    }

    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<GenerateRequest> {
        let mut next = Vec::new();
        for (session, generated) in finished {
            let prompt = std::mem::take(&mut self.open[session]);
            self.steps[session].push((prompt, generated));
            if self.steps[session].len() < 3 {
                next.push(self.request(session));
            }
        }
        next
    }
}

pub(crate) fn converse(model: &Model, temperature: f64, max_rows: usize) -> Vec<Vec<(Vec<i32>, Generated)>> {
    const SESSIONS: usize = 11;
    let stops = |ids: &[i32]| ids.ends_with(&[11]) || ids.last().is_some_and(|id| id % 16 == 5);
    let mut events =
        Conversations { stops: &stops, steps: vec![Vec::new(); SESSIONS], open: vec![Vec::new(); SESSIONS] };
    let first = (0..SESSIONS).map(|session| events.request(session)).collect();
    generate(model, first, &GenerateOptions { max_rows, ..options(temperature, 12) }, &mut events).unwrap();
    events.steps
}

/// Conversations in which session s waits for (3 s) mod 5 calls before it goes on; the first one until the others have ended.
struct Waits<'a> {
    inner: Conversations<'a>,
    calls: usize,
    ready_at: BTreeMap<usize, (usize, GenerateRequest)>,
    last: Option<usize>,
}

impl GenerateEvents for Waits<'_> {
    fn is_complete(&mut self, session: usize, ids: &[i32]) -> bool {
        self.inner.is_complete(session, ids)
    }

    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<GenerateRequest> {
        self.calls += 1;
        self.last = finished.last().map(|(session, _)| *session).or(self.last);
        for request in self.inner.next(finished) {
            self.ready_at.insert(request.session, (self.calls + 3 * request.session % 5, request));
        }
        let others_ended = self.inner.steps[1..].iter().all(|steps| steps.len() == 3);
        let is_ready = |session: usize, at: usize| at <= self.calls && (session > 0 || others_ended);
        let ready = self.ready_at.iter().filter(|(session, (at, _))| is_ready(**session, *at));
        let ready: Vec<usize> = ready.map(|(session, _)| *session).collect();
        ready.iter().filter_map(|session| self.ready_at.remove(session)).map(|(_, request)| request).collect()
    }

    fn waiting(&self) -> BTreeSet<usize> {
        self.ready_at.keys().copied().collect()
    }

    fn wait(&mut self) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// As [`converse`], with sessions that wait; with one row it is taken from the first session, which waits longest.
#[test]
fn sessions_that_wait_hold_up_no_others_and_lose_nothing() {
    let stops = |ids: &[i32]| ids.ends_with(&[11]) || ids.last().is_some_and(|id| id % 16 == 5);
    let model = fresh("qwen2", 9, Kind::Float);
    let expected = converse(&model, 1.0, 64).concat();
    for max_rows in [64, 4, 1] {
        let inner = Conversations { stops: &stops, steps: vec![Vec::new(); 11], open: vec![Vec::new(); 11] };
        let mut events = Waits { inner, calls: 0, ready_at: BTreeMap::new(), last: None };
        let first = (0..11).map(|session| events.inner.request(session)).collect();
        generate(&model, first, &GenerateOptions { max_rows, ..options(1.0, 12) }, &mut events).unwrap();
        assert_eq!((events.last, events.ready_at.len()), (Some(0), 0), "{max_rows} rows");
        let taken = events.inner.steps.concat();
        assert_eq!(taken.len(), 33);
        for ((prompt, generated), (expected_prompt, expected)) in taken.iter().zip(&expected) {
            assert_eq!((prompt, &generated.ids), (expected_prompt, &expected.ids), "{max_rows} rows");
            for (a, b) in generated.logprobs.iter().zip(&expected.logprobs) {
                assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{max_rows} rows: {a}, {b}");
            }
        }
    }
}

#[test]
fn sessions_go_on_from_what_their_prompts_share() {
    for (family, max_rows) in [("qwen2", 64), ("qwen3", 4), ("llama", 1), ("llama3", 7)] {
        let model = fresh(family, 9, Kind::Float);
        let steps: Vec<(Vec<i32>, Generated)> = converse(&model, 1.0, max_rows).concat();
        assert_eq!(steps.len(), 33, "{family}");
        let sequence = |(prompt, generated): &(Vec<i32>, Generated)| ScoredSequence {
            ids: [&prompt[..], &generated.ids].concat(),
            targets: prompt.len()..prompt.len() + generated.ids.len(),
        };
        let sequences: Vec<ScoredSequence> = steps.iter().map(sequence).collect();
        let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 1 };
        let scored = model.completion_logprobs(&sequences, &options).unwrap().concat();
        let sampled: Vec<f32> = steps.iter().flat_map(|(_, generated)| generated.logprobs.clone()).collect();
        for (sampled, scored) in sampled.iter().zip(&scored) {
            assert!((sampled - scored).abs() < 1e-5 * scored.abs().max(1.0), "{family}: {sampled}, scored {scored}");
        }
        let lengths: BTreeSet<usize> = steps.iter().map(|(_, generated)| generated.ids.len()).collect();
        assert!(lengths.len() > 3, "completions are to end at different times: {lengths:?}");
    }
}

#[test]
fn the_number_of_rows_changes_no_id() {
    let model = fresh("qwen2", 9, Kind::Float);
    let ids = |max_rows| -> Vec<Vec<i32>> {
        converse(&model, 0.8, max_rows).concat().into_iter().map(|(_, generated)| generated.ids).collect()
    };
    let expected = ids(100);
    for max_rows in [1, 2, 5, 11] {
        assert_eq!(ids(max_rows), expected, "{max_rows} rows");
    }
}
