use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::testing::{Reply, answer, serve};
use super::*;

fn limits(call: Duration) -> Limits {
    Limits {
        attempt: call / 2,
        call: Some(call),
        retries: 8,
        answer_bytes: 1 << 20,
        per_minute: None,
        leaves_alone: true,
    }
}

/// Six calls at once, 200 ms apart, of at most 300 ms each: who waits for its turn loses none of its time.
#[test]
fn calls_keep_to_a_pace_and_have_their_time_from_their_turn_on() {
    let url = serve(|_, body| Reply::Json(200, body.clone()));
    let limits = Limits { per_minute: Some(300), ..limits(Duration::from_millis(300)) };
    let client = Client::new(&url, None, Limits { attempt: Duration::from_millis(300), retries: 0, ..limits });
    let start = Instant::now();
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..6)
            .map(|number| {
                scope.spawn({
                    let client = &client;
                    move || echo(client, number)
                })
            })
            .collect();
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(call.join().unwrap(), Ok(number));
        }
    });
    assert!(start.elapsed() >= Duration::from_secs(1));
}

const SHORT: Duration = Duration::from_secs(2);

fn echo(client: &Client, number: usize) -> Result<usize, Failure> {
    client.ask("/echo", Some(&json!({ "number": number })), |answer| {
        let number = answer["number"].as_u64().ok_or_else(|| Failure::One(format!("no number in {answer}")))?;
        Ok(number as usize)
    })
}

/// Answers a request, or with each fault in its turn once in `every` requests.
fn faulty(turn: usize, every: usize, body: &Value) -> Reply {
    let text = body.to_string();
    let cut = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{}", text.len(), &text[..text.len() / 2]);
    if !turn.is_multiple_of(every) {
        return Reply::Json(200, body.clone());
    }
    match turn / every % 12 {
        0 => answer("429 Slow", "retry-after: 0\r\n", "{}"),
        1 => Reply::Json(500, json!({"detail": "out of memory"})),
        2 => Reply::Bytes(Vec::new()),
        3 => Reply::Reset,
        4 => Reply::Bytes(cut.into_bytes()),
        5 => answer("200 OK", "", "{{{{{"),
        6 => Reply::Bytes(b"\0\0 no HTTP at all".to_vec()),
        7 => Reply::Silence(Duration::from_mins(1)),
        8 => Reply::Drip(format!("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{text}").into_bytes(), SHORT / 20),
        9 => answer("503 Busy", "retry-after: 0\r\n", ""),
        10 => answer("200 OK", "", "\u{feff}[]garbage"),
        _ => Reply::Json(408, json!("slow")),
    }
}

/// Makes calls from 64 threads to a server that fails once in `every` requests; all have to be answered, once and rightly.
fn none_is_lost(calls: usize, every: usize) {
    let (turns, served) = (AtomicUsize::new(0), Arc::new(Mutex::new(HashMap::<u64, usize>::new())));
    let seen = Arc::clone(&served);
    let url = serve(move |_, body| {
        let reply = faulty(turns.fetch_add(1, Ordering::Relaxed), every, body);
        if matches!(reply, Reply::Json(200, _)) {
            *seen.lock().unwrap().entry(body["number"].as_u64().unwrap()).or_default() += 1;
        }
        reply
    });
    let limits = Limits { attempt: Duration::from_secs(3), ..limits(Duration::from_mins(1)) };
    let client = Client::new(&url, None, limits);
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(HashMap::<usize, usize>::new());
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= calls {
                        return;
                    }
                    assert_eq!(echo(&client, number), Ok(number));
                    assert!(answers.lock().unwrap().insert(number, number).is_none(), "{number} is answered twice");
                }
            });
        }
    });
    assert_eq!(answers.lock().unwrap().len(), calls, "none is lost");
    let served = served.lock().unwrap();
    assert!((0..calls as u64).all(|number| served.get(&number) == Some(&1)), "none is done twice");
}

#[test]
fn a_thousand_calls_to_a_faulty_server_are_each_answered_once() {
    none_is_lost(1_000, 20);
}

#[test]
#[ignore = "takes a minute: `cargo test -- --ignored ten_thousand`"]
fn ten_thousand_calls_to_a_faulty_server_are_each_answered_once() {
    none_is_lost(10_000, 10);
}

/// What comes of one call to a server that always does the same, and how long that takes.
fn alone(limits: Limits, reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> (Failure, Duration) {
    let url = serve(move |path, _| reply(path));
    let start = Instant::now();
    let failure = echo(&Client::new(&url, None, limits), 1).unwrap_err();
    (failure, start.elapsed())
}

#[test]
fn no_call_takes_longer_than_it_may() {
    let drip = || {
        let body = "{\"number\": 1}";
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        Reply::Drip(head.into_bytes(), Duration::from_millis(100))
    };
    let later = |_: &str| answer("503 Busy", "retry-after: 3600\r\n", "");
    for reply in [
        Box::new(|_: &str| Reply::Silence(Duration::from_mins(1))) as Box<dyn Fn(&str) -> Reply + Send + Sync>,
        Box::new(move |_: &str| drip()),
        Box::new(later),
        Box::new(|_: &str| Reply::Bytes(Vec::new())),
    ] {
        let (failure, time) = alone(limits(SHORT), reply);
        assert!(matches!(&failure, Failure::Passing(problem, _) if problem.contains("attempts)")), "{failure:?}");
        assert!(time < SHORT + Duration::from_millis(1500), "{time:?}: {failure:?}");
    }
}

#[test]
fn answers_that_no_attempt_can_mend_are_told_at_once() {
    let elsewhere = serve(|_, _| panic!("a redirect is not followed"));
    let location = format!("location: {elsewhere}/\r\n");
    let (failure, _) = alone(limits(SHORT), move |_| answer("302 Found", &location, "gone"));
    assert!(matches!(&failure, Failure::Final(problem) if problem.starts_with("302")), "{failure:?}");
    let (failure, _) = alone(limits(SHORT), |_| Reply::Json(404, json!("no such path")));
    assert_eq!(failure, Failure::Final("404 Not Found: \"no such path\"".to_owned()));
    let (failure, _) = alone(limits(SHORT), |_| Reply::Json(422, json!("no such query")));
    assert_eq!(failure, Failure::Refused("422 Unprocessable Entity: \"no such query\"".to_owned()));
    let (failure, _) = alone(limits(SHORT), |_| Reply::Flood(1 << 30));
    assert_eq!(failure, Failure::One("an answer of more than 1048576 bytes".to_owned()));
}

#[test]
fn a_host_that_answers_nothing_is_left_alone_and_the_secret_is_told_to_nobody() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let url = serve(move |_, _| {
        counted.fetch_add(1, Ordering::Relaxed);
        Reply::Json(500, json!("you are Bearer abc-123, abc-123"))
    });
    let secret = Secret { header: "authorization", scheme: "Bearer ", token: "abc-123".to_owned() };
    let client = Client::new(&url, Some(secret), Limits { retries: 0, ..limits(SHORT) });
    let told: Vec<Failure> = (0..40).map(|number| echo(&client, number).unwrap_err()).collect();
    assert_eq!(asked.load(Ordering::Relaxed), IN_VAIN as usize);
    assert!(told[0].problem().contains("you are Bearer [key], [key]"), "{:?}", told[0]);
    assert!(told[39].problem().starts_with("not asked: 16 calls in a row came to nothing"), "{:?}", told[39]);
    assert!(!format!("{told:?}").contains("abc-123"));
}

#[test]
fn addresses_are_checked() {
    assert_eq!(address("http://gpu:8000/"), Ok("http://gpu:8000".to_owned()));
    for wrong in ["localhost:8000", "http://", "https:///path", "http://me:secret@localhost:8000", "http://a?key=b"] {
        assert!(address(wrong).unwrap_err().contains("from the environment"), "{wrong}");
    }
}

/// Seconds that 16 threads take for so many calls to a server that thinks for 5 ms.
fn seconds(client: &Client, calls: usize) -> f64 {
    let (next, start) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < calls {
                    assert_eq!(echo(client, 1), Ok(1));
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "measures speed: `cargo test -- --ignored hung_host`"]
fn a_hung_host_leaves_calls_to_another_their_speed() {
    let well = serve(|_, body| {
        std::thread::sleep(Duration::from_millis(5));
        Reply::Json(200, body.clone())
    });
    let well = Client::new(&well, None, limits(Duration::from_secs(10)));
    let hung = serve(|_, _| Reply::Silence(Duration::from_mins(5)));
    let hung = Client::new(&hung, None, limits(SHORT));
    let (mut alone, mut beside) = (0.0, 0.0);
    // In turns, so that whatever else the machine does falls on both.
    for _ in 0..5 {
        alone += seconds(&well, 1000);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..48 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        echo(&hung, 1).unwrap_err();
                        std::thread::sleep(Duration::from_millis(100));
                    }
                });
            }
            beside += seconds(&well, 1000);
            done.store(true, Ordering::Relaxed);
        });
    }
    assert!(alone / beside >= 0.95, "{alone:.3} s alone, {beside:.3} s beside it");
}
