//! `serve-search` as a process: what it says, and how it ends.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mempo-rollout"))
}

fn index(directory: &Path) {
    let row = json!({"id": "a", "contents": "\"Accra\"\nAccra is the capital of Ghana."});
    fs_err::write(directory.join("corpus.jsonl"), row.to_string()).unwrap();
    let mut index = program();
    index.current_dir(directory).args(["index", "--corpus", "corpus.jsonl", "--out", "index", "--quiet"]);
    assert!(index.status().unwrap().success());
}

/// A server on a free port, and its address.
fn start(directory: &Path) -> (Child, String) {
    let mut command = program();
    command.current_dir(directory).args(["serve-search", "--index", "index", "--port", "0"]);
    let mut server = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(server.stderr.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().unwrap().contains("http://")).unwrap().unwrap();
    let address = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    std::thread::spawn(move || lines.count());
    (server, address)
}

#[test]
fn a_signal_ends_it_with_the_code_of_an_interruption() {
    let directory = tempfile::tempdir().unwrap();
    index(directory.path());
    for signal in ["-TERM", "-INT"] {
        let (mut server, address) = start(directory.path());
        let mut answer = ureq::post(format!("http://{address}/retrieve")).send(r#"{"queries": ["capital"]}"#).unwrap();
        let answer = answer.body_mut().read_to_string().unwrap();
        assert!(answer.contains(r#""contents":"\"Accra\"\nAccra is the capital of Ghana.""#), "{answer}");
        let mut second = program();
        let port = address.split(':').nth(1).unwrap();
        second.current_dir(directory.path()).args(["serve-search", "--index", "index", "--port", port]);
        let refused = second.output().unwrap();
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && told.contains("cannot listen on 127.0.0.1"), "{told}");
        assert!(Command::new("kill").args([signal, &server.id().to_string()]).status().unwrap().success());
        assert_eq!(server.wait().unwrap().code(), Some(75));
    }
}
