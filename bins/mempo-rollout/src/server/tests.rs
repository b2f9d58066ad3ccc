//! Against a server made for the test, which speaks as vLLM and SGLang do, and misbehaves as servers do.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;

use mempo_agent::{Engine, Environment, Generated, Generation};
use mempo_data::StopReason;
use mempo_text::{Carried, NewTokenizer, Profile, train_tokenizer};

use super::engine::ServerEngine;
use super::protocol::tests::{answer, asking};
use super::teacher::TeacherInterface;
use super::*;
use crate::http::testing::{Reply, serve};

/// The ids that the server writes after a prompt.
fn continuation(prompt: &Value) -> Vec<i32> {
    prompt.as_array().unwrap().iter().rev().map(|id| (id.as_i64().unwrap() % 97) as i32 + 3).collect()
}

/// A well-behaved answer to a request.
fn good(kind: Kind, body: &Value) -> Reply {
    let prompt = if kind == Kind::Vllm { &body["prompt"] } else { &body["input_ids"] };
    Reply::Json(200, answer(kind, &continuation(prompt), "length", &Value::Null))
}

/// What follows from completions, where no tool is waited for.
struct Then<F>(F);

impl<F: FnMut(Vec<(usize, Generated)>) -> Vec<Request>> Environment for Then<F> {
    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<Request> {
        (self.0)(finished)
    }

    fn waiting(&self) -> Vec<usize> {
        Vec::new()
    }
}

/// Two steps of each of so many trajectories; what came of them, by prompt.
fn two_steps(engine: &mut ServerEngine<'_>, count: usize) -> (Result<(), String>, HashMap<Vec<i32>, Generated>) {
    let request = |trajectory: usize, step: i32| Request {
        trajectory,
        prompt_ids: vec![trajectory as i32, step],
        messages: Vec::new(),
        seed: 7,
    };
    let mut found = HashMap::new();
    let mut steps = vec![0; count];
    let mut environment = Then(|finished: Vec<(usize, Generated)>| {
        let mut next = Vec::new();
        for (trajectory, generation) in finished {
            let doubled = found.insert(vec![trajectory as i32, steps[trajectory]], generation);
            assert!(doubled.is_none(), "{trajectory} is answered twice");
            steps[trajectory] += 1;
            if steps[trajectory] < 2 {
                next.push(request(trajectory, 1));
            }
        }
        next
    });
    let result = engine.run((0..count).map(|trajectory| request(trajectory, 0)).collect(), &mut environment);
    (result, found)
}

static BUILDER: LazyLock<PromptBuilder> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    train_tokenizer(["red".to_owned()].into_iter(), &NewTokenizer::of_size(270), folder.path()).unwrap();
    PromptBuilder::load(folder.path(), Profile::load("mempo").unwrap(), &[]).unwrap()
});

/// How long a server may take in seconds, and how often it is asked again.
fn patience(server_timeout: u64, server_retries: u32) -> ServerOptions {
    ServerOptions {
        server: None,
        update_server: false,
        trust_server: false,
        server_timeout,
        server_deadline: 600,
        server_retries,
        server_requests_per_minute: None,
    }
}

fn engine<'a>(url: &str, kind: Kind, timeout: Duration, interrupted: &'a dyn Fn() -> bool) -> ServerEngine<'a> {
    let client = Client::new(url, None, limits(&patience(timeout.as_secs(), 6)));
    ServerEngine::new(client, Box::new(asking(kind)), &BUILDER, 64, interrupted).unwrap()
}

const LONG: Duration = Duration::from_mins(1);

#[test]
fn every_request_is_answered_once_however_the_server_misbehaves() {
    for kind in [Kind::Vllm, Kind::Sglang] {
        let calls = AtomicU64::new(0);
        let url = serve(move |_, body| {
            let text = answer(kind, &[5], "length", &Value::Null).to_string();
            let cut = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{}", text.len(), &text[..text.len() / 2]);
            match calls.fetch_add(1, Ordering::Relaxed) % 50 {
                1 => Reply::Json(429, json!("too many")),
                3 => Reply::Json(500, json!({"error": "out of memory"})),
                5 => Reply::Bytes(Vec::new()),
                7 => Reply::Bytes(cut.into_bytes()),
                9 => Reply::Bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{{{{{".to_vec()),
                11 => Reply::Bytes(b"\0\0 no HTTP at all".to_vec()),
                13 => Reply::Silence(Duration::from_secs(2)),
                15 => Reply::Bytes(b"HTTP/1.1 503 Busy\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n".to_vec()),
                _ => good(kind, body),
            }
        });
        let (result, found) = two_steps(&mut engine(&url, kind, Duration::from_secs(1), &|| false), 500);
        assert_eq!(result, Ok(()));
        assert_eq!(found.len(), 1000);
        for (prompt, generation) in found {
            let generation = generation.unwrap();
            assert_eq!(generation.ids, continuation(&json!(prompt)), "{prompt:?}");
            assert_eq!(generation.stop_reason, StopReason::MaxTokens);
        }
    }
}

#[test]
fn what_a_server_will_not_do_ends_the_run_and_says_why() {
    let run = |reply: fn() -> Reply| {
        let url = serve(move |_, _| reply());
        two_steps(&mut engine(&url, Kind::Vllm, LONG, &|| false), 4).0.unwrap_err()
    };
    let told = run(|| Reply::Json(404, json!({"message": "The model `mempo-1` does not exist."})));
    assert!(told.contains("404") && told.contains("does not exist"), "{told}");
    let told =
        run(|| Reply::Bytes(b"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_vec()));
    assert!(told.contains("307"), "{told}");
}

#[test]
fn what_a_server_will_not_do_for_one_request_ends_that_trajectory_alone() {
    let url = serve(|_, body| match body["prompt"][0].as_i64() {
        Some(1) => Reply::Json(400, json!("the prompt is too long")),
        Some(2) => Reply::Json(200, json!({"choices": [{"text": "no ids"}]})),
        Some(3) => Reply::Flood(1 << 30),
        _ => good(Kind::Vllm, body),
    });
    let (result, found) = two_steps(&mut engine(&url, Kind::Vllm, LONG, &|| false), 6);
    assert_eq!(result, Ok(()));
    let failed = found.iter().filter(|(_, generation)| generation.is_err());
    let mut failed: Vec<i32> = failed.map(|(prompt, _)| prompt[0]).collect();
    failed.sort_unstable();
    assert_eq!(failed, [1, 1, 2, 2, 3, 3]);
}

#[test]
fn what_is_left_of_a_run_that_failed_is_not_taken_for_the_next_one_s() {
    let url = serve(|_, body| match (body["prompt"][0].as_i64(), body["prompt"][1].as_i64()) {
        (Some(1000), Some(0)) => Reply::Json(404, json!("gone")),
        // Under way when the first run fails, and answered while the second waits.
        (Some(1000), _) => {
            std::thread::sleep(Duration::from_millis(200));
            good(Kind::Vllm, body)
        }
        _ => good(Kind::Vllm, body),
    });
    let mut engine = engine(&url, Kind::Vllm, LONG, &|| false);
    let first = (0..40).map(|trajectory| Request {
        trajectory,
        prompt_ids: vec![1000, trajectory as i32],
        messages: Vec::new(),
        seed: 1,
    });
    let result = engine.run(first.rev().collect(), &mut Then(|_| Vec::new()));
    assert!(result.unwrap_err().contains("404"));
    let (result, found) = two_steps(&mut engine, 100);
    assert_eq!((result, found.len()), (Ok(()), 200));
    for (prompt, generation) in found {
        assert_eq!(generation.unwrap().ids, continuation(&json!(prompt)), "{prompt:?}");
    }
}

#[test]
fn a_server_that_only_fails_is_given_up_and_a_run_can_be_interrupted() {
    let url = serve(|_, _| Reply::Bytes(Vec::new()));
    let client = Client::new(&url, None, limits(&patience(LONG.as_secs(), 0)));
    let mut failing = ServerEngine::new(client, Box::new(asking(Kind::Vllm)), &BUILDER, 8, &|| false).unwrap();
    let (result, found) = two_steps(&mut failing, 100);
    assert!(result.unwrap_err().contains("16 requests in a row came to nothing"));
    assert!(found.values().all(Result::is_err));

    let url = serve(|_, _| Reply::Silence(LONG));
    let start = Instant::now();
    let interrupted = || start.elapsed() > Duration::from_millis(300);
    let (result, _) = two_steps(&mut engine(&url, Kind::Vllm, LONG, &interrupted), 4);
    assert_eq!(result, Err("interrupted".to_owned()));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_completion_has_a_deadline_however_many_attempts_are_left() {
    let url = serve(|_, _| Reply::Json(500, json!("busy")));
    let options = ServerOptions { server_deadline: 1, ..patience(60, 1000) };
    let client = Client::new(&url, None, limits(&options));
    let mut engine = ServerEngine::new(client, Box::new(asking(Kind::Vllm)), &BUILDER, 2, &|| false).unwrap();
    let start = Instant::now();
    let (result, found) = two_steps(&mut engine, 1);
    assert_eq!(result, Ok(()));
    let told: Vec<String> = found.into_values().map(Result::unwrap_err).collect();
    assert!(told.len() == 2 && told.iter().all(|told| told.contains("busy") && told.contains("attempts)")), "{told:?}");
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn one_silent_request_does_not_hold_the_others() {
    let answered = Arc::new(AtomicU64::new(0));
    let others = Arc::clone(&answered);
    let url = serve(move |_, body| {
        // Says nothing until all others have their answers.
        while body["prompt"] == json!([0, 0]) && others.load(Ordering::Relaxed) < 39 {
            std::thread::sleep(Duration::from_millis(10));
        }
        good(Kind::Vllm, body)
    });
    let mut engine = engine(&url, Kind::Vllm, LONG, &|| false);
    let requests = (0..40).map(|trajectory| Request {
        trajectory,
        prompt_ids: vec![trajectory as i32, 0],
        messages: Vec::new(),
        seed: 1,
    });
    let mut environment = Then(|finished: Vec<(usize, Generated)>| {
        answered.fetch_add(finished.len() as u64, Ordering::Relaxed);
        Vec::new()
    });
    let result = engine.run(requests.collect(), &mut environment);
    assert_eq!((result, answered.load(Ordering::Relaxed)), (Ok(()), 40));
}

/// Waits for a tool until it is told by the clock.
struct Waits(Instant);

impl Environment for Waits {
    fn next(&mut self, _: Vec<(usize, Generated)>) -> Vec<Request> {
        Vec::new()
    }

    fn waiting(&self) -> Vec<usize> {
        if self.0.elapsed() < Duration::from_millis(700) { vec![3, 4] } else { Vec::new() }
    }
}

#[test]
fn it_is_said_when_nothing_finishes_by_a_server_or_a_tool() {
    let url = serve(|_, body| {
        std::thread::sleep(Duration::from_millis(400));
        good(Kind::Vllm, body)
    });
    let mut engine = engine(&url, Kind::Vllm, LONG, &|| false);
    engine.silence = Duration::from_millis(150);
    let request = Request { trajectory: 0, prompt_ids: vec![1], messages: Vec::new(), seed: 1 };
    let lines = crate::watchdog::testing::lines_of(|| {
        engine.run(vec![request], &mut Waits(Instant::now())).unwrap();
    });
    let told = |count| format!("{count} requests to {url} are under way, 2 trajectories wait for a tool");
    for line in [told(1), told(0)] {
        assert!(
            lines.iter().any(|said| said.starts_with("nothing has finished for ") && said.ends_with(&line)),
            "{lines:?}"
        );
    }
}

/// Of what a server's log-probabilities are.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    /// The distribution at the temperature.
    All,
    /// What top-p leaves of it.
    Left,
    /// The model's raw numbers.
    Raw,
}

/// A server as it is met at the start: which model it has, and its log-probabilities.
fn met(kind: Kind, name: &'static str, of: Of) -> String {
    let weights = Mutex::new(name.to_owned());
    serve(move |path, body| match path {
        "/get_model_info" if kind == Kind::Sglang => Reply::Json(200, json!({"model_path": "m"})),
        "/v1/models" => Reply::Json(200, json!({"data": [{"id": name}]})),
        "/update_weights_from_disk" => {
            body["weight_version"].as_str().unwrap().clone_into(&mut weights.lock().unwrap());
            Reply::Json(200, json!({"success": true, "message": "done"}))
        }
        "/v1/completions" | "/generate" => {
            let temperature = body.pointer("/temperature").or_else(|| body.pointer("/sampling_params/temperature"));
            let bias = body.pointer("/logit_bias").or_else(|| body.pointer("/sampling_params/logit_bias")).unwrap();
            assert!(bias.get("409").is_some() && bias.get("100").is_none(), "rows without text alone: {bias}");
            let top_p = body.pointer("/top_p").or_else(|| body.pointer("/sampling_params/top_p")).unwrap();
            let best = if of == Of::Left && top_p.as_f64().unwrap() < 0.5 { 0.0 } else { -0.01 };
            let second = if of == Of::Raw { -6.0 } else { -6.0 / temperature.unwrap().as_f64().unwrap() };
            let mut answer = answer(kind, &[5], "length", &Value::Null);
            if kind == Kind::Vllm {
                answer["choices"][0]["logprobs"]["top_logprobs"] = json!([{"token_id:5": best, "token_id:6": second}]);
            } else {
                answer["meta_info"]["output_top_logprobs"] = json!([[[best, 5, null], [second, 6, null]]]);
                answer["meta_info"]["weight_version"] = json!(*weights.lock().unwrap());
            }
            Reply::Json(200, answer)
        }
        _ => Reply::Json(404, json!("Not Found")),
    })
}

#[test]
fn a_server_must_have_the_checkpoint_and_give_the_log_probabilities_that_it_samples_from() {
    let dir = tempfile::tempdir().unwrap();
    let lines = (0..200).map(|line| format!("<mem>Land {line}</mem><answer>Paris {line}</answer>"));
    train_tokenizer(lines, &NewTokenizer::of_size(400), dir.path()).unwrap();
    let profile = Profile::load("mempo").unwrap();
    let builder = PromptBuilder::load(dir.path(), profile, &[mempo_text::ToolSpec::search()]).unwrap();
    let digest = "0123456789abcdef0123";
    let config = json!({
        "model_type": "qwen2", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "vocab_size": 410, "max_position_embeddings": 64,
    });
    fs_err::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let config = Config::load(dir.path()).unwrap();
    let opened_at = |top_p: f64, url: &str, update_server: bool, trust_server: bool| {
        let options = ServerOptions { update_server, trust_server, ..patience(60, 0) };
        let sampling = SamplingOptions { temperature: 0.7, top_p, max_completion_tokens: 9 };
        open(url, &options, (dir.path(), digest, &config), &builder, &sampling).map(|remote| remote.described)
    };
    let opened = |url: &str, update: bool, trust: bool| opened_at(1.0, url, update, trust);
    let mine = "mempo-0123456789abcdef";
    let proven = |kind: &str| Ok(json!({"protocol": kind, "model": mine, "is_proven": true}));
    assert_eq!(opened(&met(Kind::Vllm, mine, Of::All), false, false), proven("vllm"));
    let (vllm, sglang) = (met(Kind::Vllm, "another", Of::All), met(Kind::Sglang, "another", Of::All));
    let told = opened(&vllm, false, false).unwrap_err();
    assert!(told.contains("serves `another`, expected `mempo-0123456789abcdef`"), "{told}");
    assert!(opened(&vllm, true, false).unwrap_err().contains("vLLM cannot be told"));
    let trusted = json!({"protocol": "vllm", "model": "another", "is_proven": false});
    assert_eq!(opened(&vllm, false, true), Ok(trusted));
    let told = opened(&sglang, false, false).unwrap_err();
    assert!(
        told.contains("its weights are \"another\", not \"mempo-0123456789abcdef\": give --update-server"),
        "{told}"
    );
    assert_eq!(opened(&sglang, true, false), proven("sglang"));
    assert_eq!(opened(&sglang, false, false), proven("sglang"));
    let told = opened(&met(Kind::Vllm, mine, Of::Raw), false, false).unwrap_err();
    assert!(told.contains("do not depend on the temperature"), "{told}");
    for kind in [Kind::Vllm, Kind::Sglang] {
        let (all, left) = (met(kind, mine, Of::All), met(kind, mine, Of::Left));
        assert!(opened_at(0.9, &all, false, false).is_ok());
        assert!(opened(&left, false, false).is_ok());
        let told = opened_at(0.9, &left, false, false).unwrap_err();
        assert!(told.contains("of what --top-p leaves") && told.contains("give --top-p 1"), "{told}");
    }
    assert_eq!(address("http://gpu:8000/v1/"), Ok("http://gpu:8000".to_owned()));
    assert!(opened("http://127.0.0.1:9", false, false).unwrap_err().contains("1 attempts"));
}

#[test]
fn a_teacher_is_asked_in_messages_and_its_texts_become_ids() {
    let url = serve(|path, body| {
        assert_eq!((path, &body["model"]), ("/v1/chat/completions", &json!("wise")));
        let asked = body["messages"].as_array().unwrap();
        assert_eq!(asked[0]["role"], "system");
        assert_eq!(asked[1], json!({"role": "user", "content": "red?"}));
        let message = json!({"role": "assistant", "content": "<think>é</think><answer>red"});
        Reply::Json(200, json!({"choices": [{"message": message, "finish_reason": "stop"}]}))
    });
    let options = TeacherOptions {
        teacher: Some(url),
        teacher_model: Some("wise".to_owned()),
        teacher_interface: TeacherInterface::Chat,
        teacher_fields: None,
    };
    let sampling = SamplingOptions { temperature: 1.0, top_p: 1.0, max_completion_tokens: 9 };
    assert_eq!(options.policy().unwrap(), "teacher/wise");
    let teacher = options.open(&patience(60, 0), &BUILDER, &sampling).unwrap();
    let mut engine = teacher.engine(&BUILDER, 2, &|| false).unwrap();
    assert!(engine.wants_messages());
    let messages = BUILDER.messages("red?", &Carried::default()).unwrap();
    let request = Request { trajectory: 0, prompt_ids: vec![1], messages, seed: u64::MAX };
    let mut found = Vec::new();
    let mut environment = Then(|finished| {
        found.extend(finished);
        Vec::new()
    });
    engine.run(vec![request], &mut environment).unwrap();
    let Generation { ids, logprobs, stop_reason } = found.remove(0).1.unwrap();
    assert_eq!(BUILDER.tokenizer().decode(&ids), "<think>é</think><answer>red</answer>");
    assert!(logprobs.len() == ids.len() && logprobs.iter().all(|logprob| logprob.is_nan()));
    assert_eq!(stop_reason, StopReason::StopString);
}
