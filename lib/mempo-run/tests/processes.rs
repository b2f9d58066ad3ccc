//! What a user sees of a program: exit codes, signals, kills, two writers, what goes to which stream.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// `examples/count.rs`, which `cargo test` builds beside the tests.
fn count() -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let mut command = Command::new(profile.join("examples").join("count"));
    command.env_remove("RUST_LOG");
    command
}

fn numbers(out: &Path, more: &[&str]) -> Command {
    let mut command = count();
    command.args(["numbers", "--out"]).arg(out).args(more);
    command
}

#[track_caller]
fn check(mut command: Command, code: i32) -> Output {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
    output
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "{} does not come", path.display());
        sleep(Duration::from_millis(2));
    }
}

/// The parts of a table with their bytes, and nothing that may differ between equal runs.
fn parts(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs_err::read_dir(out.join("corpus")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs_err::read(path).unwrap())).collect()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

#[test]
fn a_run_killed_again_and_again_gives_the_bytes_of_one_that_was_not() {
    let folder = Folder::new();
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    check(numbers(&whole, &["--units", "12"]), 0);
    for round in 0..25 {
        let mut child = start(numbers(&killed, &["--units", "12", "--milliseconds-per-unit", "5"]));
        sleep(Duration::from_millis(round * 7 % 45));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    check(numbers(&killed, &["--units", "12"]), 0);
    assert_eq!(parts(&killed), parts(&whole));
    let mut verify = count();
    verify.arg("verify").arg(&killed);
    check(verify, 0);
}

#[test]
fn a_signal_stops_at_a_commit_and_the_same_command_continues() {
    let folder = Folder::new();
    let out = folder.join("out");
    for name in ["-INT", "-TERM"] {
        let done = parts_count(&out);
        let mut child = start(numbers(&out, &["--units", "200", "--milliseconds-per-unit", "20"]));
        wait_for(&out.join(format!("corpus/part-{:05}.parquet", done + 1)));
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), Some(75), "{name}");
        assert!(!out.join("manifest.json").exists());
    }
    let output = check(numbers(&out, &["--units", "200"]), 0);
    assert!(stderr(&output).contains("continuing in "), "{}", stderr(&output));
    assert_eq!(parts(&out).len(), 200);
}

fn parts_count(out: &Path) -> usize {
    if out.exists() { parts(out).len() } else { 0 }
}

#[test]
fn a_second_signal_ends_at_once() {
    let folder = Folder::new();
    let out = folder.join("out");
    let mut child = start(numbers(&out, &["--milliseconds-per-unit", "60000"]));
    wait_for(&out.join("run.json"));
    // Until the unit is under way, the first signal alone would end it.
    sleep(Duration::from_secs(1));
    signal(&child, "-INT");
    sleep(Duration::from_millis(300));
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_second_writer_is_sent_away_and_changes_nothing() {
    let folder = Folder::new();
    let out = folder.join("out");
    let mut first = start(numbers(&out, &["--milliseconds-per-unit", "60000"]));
    wait_for(&out.join("run.json"));
    let before = fs_err::read(out.join("run.json")).unwrap();
    let output = check(numbers(&out, &["--units", "9", "--restart"]), 73);
    assert!(stderr(&output).contains(&format!("held by process {} on ", first.id())), "{}", stderr(&output));
    assert_eq!(fs_err::read(out.join("run.json")).unwrap(), before);
    first.kill().unwrap();
    first.wait().unwrap();
    check(numbers(&out, &[]), 0);
}

#[test]
fn of_eight_writers_at_once_all_that_are_not_sent_away_agree() {
    let folder = Folder::new();
    let (out, whole) = (folder.join("out"), folder.join("whole"));
    let start_one = || start(numbers(&out, &["--milliseconds-per-unit", "40"]));
    let children: Vec<Child> = (0..8).map(|_| start_one()).collect();
    let codes: Vec<_> = children.into_iter().map(|mut child| child.wait().unwrap().code()).collect();
    assert_eq!(codes.iter().filter(|code| **code == Some(0)).count(), 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == Some(73)).count(), 7, "{codes:?}");
    check(numbers(&whole, &[]), 0);
    assert_eq!(parts(&out), parts(&whole));
}

#[test]
fn shards_together_hold_what_one_run_holds() {
    let folder = Folder::new();
    let (out, whole) = (folder.join("out"), folder.join("whole"));
    check(numbers(&whole, &[]), 0);
    let children: Vec<Child> =
        ["0/3", "1/3", "2/3"].iter().map(|shard| start(numbers(&out, &["--shard", shard]))).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let mut all = BTreeMap::new();
    for index in 0..3 {
        all.extend(parts(&out.join(format!("shard-{index}-of-3"))));
    }
    assert_eq!(all, parts(&whole));
}

#[test]
fn usage_errors_are_2_and_help_is_0() {
    let mut help = count();
    help.arg("--help");
    assert!(stdout(&check(help, 0)).contains("numbers"));
    let folder = Folder::new();
    let output = check(numbers(&folder.join("out"), &["--shard", "3/3"]), 2);
    assert!(stderr(&output).contains("expected I/N with I from 0 to N-1"), "{}", stderr(&output));
    assert!(!folder.join("out").exists());
}

#[test]
fn standard_output_holds_what_was_asked_for_and_nothing_else() {
    let folder = Folder::new();
    let output = check(numbers(&folder.join("out"), &[]), 0);
    assert_eq!(stdout(&output), "");
    assert!(stderr(&output).contains("counting: 5/5 units"), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\u{1b}'), "no colours where there is no terminal");
    let mut schema = count();
    schema.args(["schema", "corpus"]);
    assert!(stdout(&check(schema, 0)).starts_with("# corpus\n"));
    let mut completions = count();
    completions.args(["completions", "bash"]);
    assert!(stdout(&check(completions, 0)).contains("_count()"));
}

#[test]
fn quiet_is_quiet_and_json_is_json_also_for_errors() {
    let folder = Folder::new();
    let out = folder.join("out");
    assert_eq!(stderr(&check(numbers(&out, &["--quiet"]), 0)), "");
    let output = check(numbers(&out, &["--log-format", "json", "--units", "6"]), 2);
    for line in stderr(&output).lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["level"], "ERROR");
        assert!(line["message"].as_str().unwrap().contains("units: 5 -> 6"), "{line}");
    }
    assert_eq!(stderr(&output).lines().count(), 1);
}

#[test]
fn a_panic_is_failure_1() {
    let folder = Folder::new();
    let output = check(numbers(&folder.join("out"), &["--panic"]), 1);
    assert!(stderr(&output).contains("asked to go wrong"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_74_wherever_the_bytes_go_but_never_the_log() {
    let full = || Stdio::from(fs_err::OpenOptions::new().write(true).open("/dev/full").unwrap().into_file());
    let mut schema = count();
    schema.args(["schema"]).stdout(full());
    let output = check(schema, 74);
    assert!(stderr(&output).contains("error: cannot write standard output"), "{}", stderr(&output));

    let folder = Folder::new();
    let out = folder.join("out");
    let mut numbers = numbers(&out, &[]);
    numbers.stderr(full());
    assert_eq!(numbers.status().unwrap().code(), Some(0));
}

#[test]
fn an_output_that_cannot_be_made_is_74_with_its_path() {
    let folder = Folder::new();
    fs_err::write(folder.join("file"), "").unwrap();
    let out = folder.join("file").join("out");
    let output = check(numbers(&out, &[]), 74);
    assert!(stderr(&output).contains(&format!("cannot write {}", out.display())), "{}", stderr(&output));
}
