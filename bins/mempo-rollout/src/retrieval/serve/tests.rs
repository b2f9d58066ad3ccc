use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use mempo_agent::{Bm25Options, Hit, SearchIndex};
use mempo_data::Document;

use super::*;

/// A server on a thread, until it is stopped or dropped.
struct Running {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<anyhow::Result<()>>>,
}

impl Running {
    /// Stops the server; gives how long it took to end.
    fn stop(mut self) -> Duration {
        let start = Instant::now();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap().unwrap();
        start.elapsed()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn documents() -> Vec<Document> {
    let document = |i: usize| Document {
        doc_id: format!("{i:03}"),
        title: format!("City \"{}\"", i % 7),
        text: format!("The {} city lies by river {}.\nIt has {} bridges.", i % 3, i % 11, "many ".repeat(i % 5)),
    };
    (0..200).map(document).collect()
}

fn start() -> (tempfile::TempDir, Running) {
    let folder = tempfile::tempdir().unwrap();
    SearchIndex::build(documents(), folder.path()).unwrap();
    let index = SearchIndex::open(folder.path(), Bm25Options::default()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let served = Served { index: index.into(), digest: "ab".to_owned(), top_k: 3 };
    let serve = move || serve(listener, served, &|| stopped.load(Ordering::Relaxed));
    (folder, Running { address, stop, thread: Some(std::thread::spawn(serve)) })
}

fn post(url: &str, body: &[u8]) -> (u16, Value) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut response = agent.post(url).send(body).unwrap();
    let text = response.body_mut().with_config().limit(1 << 30).read_to_string().unwrap();
    (response.status().as_u16(), serde_json::from_str(&text).unwrap())
}

#[test]
fn documents_come_in_both_shapes_and_in_the_index_s_own_order() {
    let (folder, server) = start();
    let index = SearchIndex::open(folder.path(), Bm25Options::default()).unwrap();
    let queries: Vec<String> = (0..60).map(|i| format!("city {} river {} bridges?", i % 7, i)).collect();
    for (topk, count) in [(json!(null), 3), (json!(0), 3), (json!(1), 1), (json!(200), 200)] {
        let ask = |return_scores| {
            let body = json!({"queries": queries, "topk": topk, "return_scores": return_scores, "other": 1});
            post(&server.url(PATH), body.to_string().as_bytes())
        };
        let expected: Vec<Vec<Hit>> = queries.iter().map(|query| index.search(query, count).unwrap()).collect();
        for (query, hits) in queries.iter().zip(&expected) {
            assert_eq!(hits.len(), count, "{query}");
        }
        let shape = |with_scores| {
            let lists = expected.iter().map(|hits| hits_value(hits.clone(), with_scores));
            (200, json!({"result": lists.collect::<Value>()}))
        };
        assert_eq!(ask(true), shape(true));
        assert_eq!(ask(false), shape(false));
    }
    let (_, bare) = post(&server.url(PATH), br#"{"queries": ["city 3", "unheard of", ""]}"#);
    assert_eq!(bare["result"].as_array().unwrap().len(), 3);
    let first = &bare["result"][0][0];
    assert_eq!(first["title"], "City \"3\"");
    let contents = first["contents"].as_str().unwrap();
    assert_eq!(contents, format!("\"City \"3\"\"\n{}", first["text"].as_str().unwrap()));
    assert_eq!(super::super::split_contents(contents), ("City \"3\"", first["text"].as_str().unwrap()));
    assert_eq!((&bare["result"][1], &bare["result"][2]), (&json!([]), &json!([])));
}

#[test]
fn what_is_wrong_with_a_request_is_said_in_json_with_its_status() {
    let (_folder, server) = start();
    let many = json!({"queries": vec!["city"; MOST_QUERIES + 1]}).to_string();
    let long = json!({"queries": ["city ".repeat(BODY_BYTES / 5)]}).to_string();
    for (path, body, status, told) in [
        (PATH, "", 400, "not JSON"),
        (PATH, "{\"queries\": [", 400, "not JSON"),
        (PATH, "{}", 422, "missing field `queries`"),
        (PATH, r#"{"queries": "city"}"#, 422, "expected {\"queries\""),
        (PATH, r#"{"queries": ["city", 3]}"#, 422, "invalid type"),
        (PATH, r#"{"queries": ["city"], "topk": -1}"#, 422, "invalid value"),
        (PATH, r#"{"queries": ["city"], "topk": 1001}"#, 422, "topk is 1001"),
        (PATH, &many, 422, "4097 queries"),
        (PATH, &long, 413, "8388608 bytes"),
        ("/health", "{}", 405, "takes GET"),
        ("/elsewhere", "{}", 404, "POST /retrieve"),
    ] {
        let (found, answer) = post(&server.url(path), body.as_bytes());
        let detail = answer["detail"].as_str().unwrap();
        assert!(found == status && detail.contains(told), "{path} {found}: {detail}");
    }
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let response = agent.get(server.url(PATH)).call().unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["allow"].to_str().unwrap()), (405, "GET, POST"));
    let health = agent.get(server.url("/health")).call().unwrap().body_mut().read_to_string().unwrap();
    let expected = json!({"status": "ok", "documents": 200, "index": "ab", "top_k": 3});
    assert_eq!(serde_json::from_str::<Value>(&health).unwrap(), expected);
}

#[test]
fn an_answer_stays_within_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let text = "word ".repeat(1 << 18);
    SearchIndex::build([Document { doc_id: "a".into(), title: "A".into(), text }], folder.path()).unwrap();
    let index = SearchIndex::open(folder.path(), Bm25Options::default()).unwrap().into();
    let served = Served { index, digest: String::new(), top_k: 3 };
    let asked = |count| Asked { queries: vec!["word".to_owned(); count], topk: None, return_scores: None };
    let later = Instant::now() + REQUEST;
    assert!(served.retrieve(&asked(20), later).is_ok_and(|body| body.len() > 20 << 20));
    let refused = served.retrieve(&asked(100), later).err().unwrap();
    assert!(refused.0 == StatusCode::UNPROCESSABLE_ENTITY && refused.1.contains("ask fewer"), "{}", refused.1);
    let refused = served.retrieve(&asked(1), Instant::now()).err().unwrap();
    assert_eq!(refused.0, StatusCode::SERVICE_UNAVAILABLE);
}

#[test]
fn many_clients_are_answered_while_others_dawdle() {
    let (_folder, server) = start();
    let dawdling: Vec<TcpStream> = (0..100)
        .map(|i| {
            let mut stream = TcpStream::connect(server.address).unwrap();
            let head =
                if i % 2 == 0 { "POST /retr" } else { "POST /elsewhere HTTP/1.1\r\ncontent-length: 99\r\n\r\n{" };
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::scope(|scope| {
        for client in 0..8 {
            let url = server.url(PATH);
            scope.spawn(move || {
                for i in 0..25 {
                    let body = json!({"queries": [format!("river {}", (client + i) % 11)], "topk": 1});
                    let (status, answer) = post(&url, body.to_string().as_bytes());
                    let text = answer["result"][0][0]["text"].as_str().unwrap();
                    assert!(status == 200 && text.contains(&format!("river {}", (client + i) % 11)), "{answer}");
                }
            });
        }
    });
    drop(dawdling);
    server.stop();
}

#[test]
fn a_request_under_way_is_answered_before_the_end_and_an_idle_connection_ends() {
    let (_folder, server) = start();
    let idle = TcpStream::connect(server.address).unwrap();
    let mut stream = TcpStream::connect(server.address).unwrap();
    let body = r#"{"queries": ["river 3"]}"#;
    let head = format!("POST {PATH} HTTP/1.1\r\nhost: here\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    std::thread::sleep(4 * TICK);
    let address = server.address;
    let rest = std::thread::spawn(move || {
        std::thread::sleep(6 * TICK);
        stream.write_all(body.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    assert!(server.stop() < REQUEST / 2);
    let answer = rest.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("river 3"), "{answer}");
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
    drop(idle);
}
