//! A stage's directory: resume, refusal, restart, and what the next stage accepts.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use mempo_run::{Input, ResultExt, Shard, Stage, StageArgs, StandardCommand, exit_code};
use serde_json::{Value, json};

fn args(out: &Path) -> StageArgs {
    StageArgs { out: out.to_owned(), seed: 7, restart: false, shard: None }
}

fn shard(out: &Path, index: usize, count: usize) -> StageArgs {
    StageArgs { shard: Some(Shard { index, count }), ..args(out) }
}

fn open(args: &StageArgs, arguments: &Value) -> anyhow::Result<Option<Stage>> {
    Stage::open("mempo-test", "numbers", args, arguments, &[])
}

fn settings() -> Value {
    json!({ "temperature": 1.0, "limits": { "max_steps": 16 } })
}

fn write(stage: &Stage, unit: usize) {
    let text = format!("unit {unit}, seed {}", stage.seed(&[&unit.to_string()]));
    stage.write_part("steps", unit, |sink| Ok(sink.write_all(text.as_bytes())?)).unwrap();
}

/// Runs the stage to its end; the units that were written this time.
fn finish(args: &StageArgs) -> Vec<usize> {
    let Some(stage) = open(args, &settings()).unwrap() else {
        return vec![];
    };
    let missing: Vec<usize> = stage.shard_range(7).filter(|unit| !stage.has_part("steps", *unit)).collect();
    for unit in &missing {
        write(&stage, *unit);
    }
    let count = stage.shard_range(7).len() as u64;
    stage.finish(&[("steps", count)], json!({ "count": count })).unwrap();
    missing
}

#[track_caller]
fn check_refused<T>(result: anyhow::Result<T>, code: u8, parts: &[&str]) {
    let error = result.err().expect("expected a refusal");
    let text = format!("{error:#}");
    assert_eq!(exit_code(&error), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

fn verify(dir: &Path) -> anyhow::Result<()> {
    StandardCommand::Verify { dir: dir.to_owned() }.run(clap::Command::new("test"))
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a/out");
    (folder, out)
}

#[test]
fn a_stopped_run_continues_and_a_finished_one_does_nothing() {
    let (_folder, out) = folder();
    let stage = open(&args(&out), &settings()).unwrap().unwrap();
    for unit in [0, 2] {
        write(&stage, unit);
    }
    fs_err::write(out.join("steps/part-00003.parquet.tmp-other"), "not ours").unwrap();
    drop(stage);
    check_refused(Input::stage("rollouts", &out), 4, &["not finished", "`mempo-test numbers`"]);
    assert_eq!(finish(&args(&out)), [1, 3, 4, 5, 6]);
    let manifest = fs_err::read(out.join("manifest.json")).unwrap();
    assert_eq!(finish(&args(&out)), [0; 0]);
    assert_eq!(fs_err::read(out.join("manifest.json")).unwrap(), manifest);
    let input = Input::stage("rollouts", &out).unwrap();
    let names: Vec<_> = input.table("steps").unwrap();
    let expected: Vec<_> = (0..7).map(|unit| out.join(format!("steps/part-0000{unit}.parquet"))).collect();
    assert_eq!(names, expected);
    let manifest = input.manifest().unwrap();
    assert_eq!((manifest.seed, &manifest.arguments, manifest.rows["steps"]), (7, &settings(), 7));
    verify(&out).unwrap();
}

#[test]
fn other_arguments_are_refused_key_by_key_until_restart() {
    let (_folder, out) = folder();
    drop(open(&args(&out), &settings()).unwrap());
    let changed = json!({ "temperature": 0.7, "limits": { "max_steps": 16, "top_k": 3 } });
    let differences = ["temperature: 1.0 -> 0.7", "limits.top_k: (none) -> 3", "seed: 7 -> 8", "--restart"];
    let other = StageArgs { seed: 8, ..args(&out) };
    check_refused(open(&other, &changed), 2, &differences);
    finish(&args(&out));
    check_refused(open(&other, &changed), 2, &differences);

    let restart = StageArgs { restart: true, ..other.clone() };
    let stage = open(&restart, &changed).unwrap().unwrap();
    assert!(!stage.has_part("steps", 0));
    drop(stage);
    check_refused(Input::stage("rollouts", &out), 4, &["not finished"]);
    check_refused(open(&args(&out), &settings()), 2, &["temperature: 0.7 -> 1.0"]);
    assert!(open(&other, &changed).unwrap().is_some());
}

#[test]
fn other_inputs_are_refused_but_moved_ones_are_not() {
    let (folder, out) = folder();
    let open_with = |name: &str, content: &str| {
        let path = folder.path().join(name).join("tasks.jsonl");
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, content).unwrap();
        let input = Input::files("questions", &[path]).unwrap();
        Stage::open("mempo-test", "numbers", &args(&out), &settings(), &[&input])
    };
    drop(open_with("here", "1").unwrap());
    assert!(open_with("there", "1").unwrap().is_some());
    check_refused(open_with("here", "2"), 2, &["content of --questions: ", " -> "]);
}

#[test]
fn what_is_not_this_stages_is_never_touched() {
    let (_folder, out) = folder();
    fs_err::create_dir_all(&out).unwrap();
    fs_err::write(out.join("thesis.txt"), "mine").unwrap();
    for restart in [false, true] {
        let args = StageArgs { restart, ..args(&out) };
        check_refused(open(&args, &settings()), 2, &["holds `thesis.txt`", "choose another --out"]);
    }
    fs_err::remove_file(out.join("thesis.txt")).unwrap();
    finish(&args(&out));
    let restart = StageArgs { restart: true, ..args(&out) };
    let other = Stage::open("mempo-test", "letters", &restart, &settings(), &[]);
    check_refused(other, 2, &["holds the output of `mempo-test numbers`"]);
    verify(&out).unwrap();
}

#[test]
fn nothing_is_written_into_an_input() {
    let (_folder, out) = folder();
    finish(&args(&out));
    let input = Input::stage("rollouts", &out).unwrap();
    for place in [out.clone(), out.join("scores/deep")] {
        let result = Stage::open("mempo-test", "scores", &args(&place), &settings(), &[&input]);
        check_refused(result, 2, &["lies in an input"]);
    }
    assert!(!out.join("scores").exists());
}

#[test]
fn files_written_in_any_way_are_committed_and_books_are_not() {
    let (_folder, out) = folder();
    let stage = open(&args(&out), &settings()).unwrap().unwrap();
    write(&stage, 0);
    stage.replace_dir("trainer", |dir| Ok(fs_err::write(dir.join("state.json"), "{}")?)).unwrap();
    stage.write_file("metrics.jsonl", |sink| Ok(sink.write_all(b"{}\n")?)).unwrap();
    stage.timing(&json!({ "seconds": 1 }));
    stage.write_files(|dir| Ok(fs_err::write(dir.join("model.safetensors"), "weights")?)).unwrap();
    stage.save_resume(|dir| Ok(fs_err::write(dir.join("state"), "")?)).unwrap();
    assert_eq!(stage.resume_dir(), Some(out.join("resume")));
    stage.finish(&[], Value::Null).unwrap();
    let input = Input::stage("model", &out).unwrap();
    let paths: Vec<_> = input.manifest().unwrap().files.iter().map(|file| file.path.as_str()).collect();
    let expected = ["metrics.jsonl", "model.safetensors", "steps/part-00000.parquet", "trainer/state.json"];
    assert_eq!(paths, expected);
    assert!(!out.join("resume").exists(), "nothing is left to continue");
    verify(&out).unwrap();
    // As if the process had been killed between the commit and this.
    fs_err::create_dir(out.join("resume")).unwrap();
    assert!(open(&args(&out), &settings()).unwrap().is_none());
    assert!(!out.join("resume").exists());
}

#[test]
fn verify_and_the_next_stage_notice_every_kind_of_damage() {
    let (_folder, out) = folder();
    finish(&args(&out));
    let part = out.join("steps/part-00004.parquet");
    let whole = fs_err::read(&part).unwrap();
    let mut flipped = whole.clone();
    flipped[3] ^= 1;
    let damages: [(&[u8], &str); 3] = [
        (&flipped, "SHA-256 "),
        (&whole[1..], " bytes, expected "),
        (&[whole.as_slice(), b"x"].concat(), " bytes, expected "),
    ];
    for (bytes, text) in damages {
        fs_err::write(&part, bytes).unwrap();
        check_refused(verify(&out), 4, &["part-00004.parquet: ", text]);
        check_refused(Input::stage("rollouts", &out), 4, &["part-00004.parquet: ", text]);
    }
    fs_err::remove_file(&part).unwrap();
    check_refused(verify(&out), 4, &["part-00004.parquet"]);
    check_refused(open(&args(&out), &settings()), 4, &["part-00004.parquet", "--restart"]);
    fs_err::write(&part, &whole).unwrap();
    verify(&out).unwrap();

    fs_err::write(out.join("steps/part-00099.parquet"), "").unwrap();
    check_refused(verify(&out), 4, &["part-00099.parquet: not in the manifest"]);
}

#[test]
fn a_copied_directory_still_verifies() {
    let (folder, out) = folder();
    finish(&args(&out));
    let moved = folder.path().join("moved");
    fs_err::rename(&out, &moved).unwrap();
    verify(&moved).unwrap();
    assert!(open(&args(&moved), &settings()).unwrap().is_none());
}

#[test]
fn a_table_that_is_not_there_is_named() {
    let (_folder, out) = folder();
    finish(&args(&out));
    let input = Input::stage("rollouts", &out).unwrap();
    check_refused(input.table("step"), 4, &["no table `step`"]);
    check_refused(Input::stage("rollouts", &out.join("nowhere")), 4, &["nowhere: no such directory"]);
}

#[test]
fn shards_are_read_as_one_if_they_are_all_there_and_agree() {
    let (folder, out) = folder();
    let whole = folder.path().join("whole");
    finish(&args(&whole));
    finish(&shard(&out, 2, 3));
    finish(&shard(&out, 0, 3));
    check_refused(Input::stage("rollouts", &out), 4, &["missing shard-1-of-3;"]);
    drop(open(&shard(&out, 1, 3), &settings()).unwrap());
    check_refused(Input::stage("rollouts", &out), 4, &["missing shard-1-of-3 (not finished)"]);
    finish(&shard(&out, 1, 3));

    let input = Input::stage("rollouts", &out).unwrap();
    let bytes = |paths: Vec<PathBuf>| paths.iter().map(|path| fs_err::read(path).unwrap()).collect::<Vec<_>>();
    let one = Input::stage("rollouts", &whole).unwrap();
    assert_eq!(bytes(input.table("steps").unwrap()), bytes(one.table("steps").unwrap()));
    assert_eq!(input.digest(), one.digest());
    assert_eq!(input.manifest().unwrap().rows["steps"], 7);
    verify(&out).unwrap();

    check_refused(open(&args(&out), &settings()), 2, &["holds `shard-0-of-3`"]);
    check_refused(open(&shard(&whole, 0, 3), &settings()), 2, &["holds a run without --shard"]);
    fs_err::create_dir(out.join("shard-0-of-2")).unwrap();
    check_refused(Input::stage("rollouts", &out), 4, &["shard-0-of-2 and shard-0-of-3"]);
}

#[test]
fn shards_of_different_commands_are_refused() {
    let (_folder, out) = folder();
    finish(&shard(&out, 0, 2));
    let stage = open(&shard(&out, 1, 2), &json!({ "temperature": 0.5 })).unwrap().unwrap();
    stage.finish(&[], Value::Null).unwrap();
    check_refused(
        Input::stage("rollouts", &out),
        4,
        &["shard-1-of-2 differs from shard-0-of-2", "temperature: 1.0 -> 0.5"],
    );
}

#[test]
fn shards_cut_any_number_of_units_without_gap_or_overlap() {
    let (folder, _) = folder();
    for count in 1..6 {
        for units in [0, 1, 5, 16, 1001] {
            let mut next = 0;
            for index in 0..count {
                let out = folder.path().join(format!("{count}-{units}"));
                let stage = open(&shard(&out, index, count), &settings()).unwrap().unwrap();
                let range = stage.shard_range(units);
                assert_eq!(range.start, next);
                assert!(range.len() <= units / count + 1);
                next = range.end;
            }
            assert_eq!(next, units);
        }
    }
}

fn model(dir: &Path) {
    fs_err::create_dir_all(dir).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"] {
        fs_err::write(dir.join(name), name).unwrap();
    }
}

#[test]
fn a_models_digest_is_of_what_changes_its_answers() {
    let (_folder, dir) = folder();
    model(&dir);
    let digest = |dir: &Path| Input::model("model", dir).unwrap().digest().to_owned();
    let before = digest(&dir);
    fs_err::write(dir.join("README.md"), "about").unwrap();
    fs_err::create_dir(dir.join("trainer")).unwrap();
    fs_err::write(dir.join("trainer/state.json"), "{}").unwrap();
    fs_err::create_dir(dir.join("tokenizer")).unwrap();
    assert_eq!(digest(&dir), before);
    for name in ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
    {
        let old = fs_err::read(dir.join(name)).ok();
        fs_err::write(dir.join(name), "other").unwrap();
        assert_ne!(digest(&dir), before, "{name}");
        old.map_or_else(|| fs_err::remove_file(dir.join(name)), |old| fs_err::write(dir.join(name), old)).unwrap();
        assert_eq!(digest(&dir), before);
    }
    // A device in the place of a file: some would be read without an end.
    std::os::unix::fs::symlink("/dev/null", dir.join("tokenizer_config.json")).unwrap();
    check_refused(Input::model("model", &dir), 4, &["tokenizer_config.json: not a plain file"]);
    fs_err::remove_file(dir.join("tokenizer_config.json")).unwrap();
    fs_err::remove_file(dir.join("model.safetensors")).unwrap();
    check_refused(Input::model("model", &dir), 4, &["no *.safetensors"]);
    fs_err::remove_file(dir.join("config.json")).unwrap();
    check_refused(Input::model("model", &dir), 4, &["no config.json"]);
}

#[test]
fn a_model_that_a_stage_wrote_must_be_finished_and_whole() {
    let (_folder, out) = folder();
    let stage = open(&args(&out), &settings()).unwrap().unwrap();
    model(&out);
    check_refused(Input::model("model", &out), 4, &["not finished"]);
    stage.finish(&[], Value::Null).unwrap();
    let digest = Input::model("model", &out).unwrap().digest().to_owned();
    assert_eq!(digest.len(), 64);
    fs_err::write(out.join("tokenizer.json"), "tokenizer.jsoN").unwrap();
    check_refused(Input::model("model", &out), 4, &["tokenizer.json not as in manifest.json"]);
}

#[test]
fn a_failure_inside_a_write_keeps_its_kind() {
    let (_folder, out) = folder();
    let stage = open(&args(&out), &settings()).unwrap().unwrap();
    let result = stage.write_part("steps", 0, |_| Err(anyhow::anyhow!("a line is broken")).bad_input());
    check_refused(result, 4, &["a line is broken"]);
    assert!(!stage.has_part("steps", 0));
}

#[test]
fn what_is_put_aside_goes_with_the_work_or_with_the_next_start() {
    let (_folder, out) = folder();
    let stage = open(&args(&out), &settings()).unwrap().unwrap();
    let put_aside = |folder: &Path| {
        fs_err::write(folder.join("run"), "x")?;
        assert_eq!(folder.parent(), Some(&*out));
        Ok(folder.to_owned())
    };
    let scratch = stage.with_scratch(put_aside).unwrap();
    assert!(!scratch.exists());
    let failed = stage.with_scratch::<()>(|folder| {
        put_aside(folder)?;
        Err(anyhow::anyhow!("row 3")).bad_input()
    });
    check_refused(failed, 4, &["row 3"]);
    assert!(!scratch.exists());
    // As a process leaves it that is killed.
    fs_err::create_dir(&scratch).unwrap();
    put_aside(&scratch).unwrap();
    drop(stage);
    finish(&args(&out));
    assert!(!scratch.exists());
    verify(&out).unwrap();
}

#[test]
fn a_stage_that_is_withdrawn_has_not_begun() {
    let (_folder, out) = folder();
    let stage = open(&args(&out), &settings()).unwrap().unwrap();
    write(&stage, 0);
    let error = stage.withdraw(anyhow::anyhow!("two rows are one"));
    assert_eq!(error.to_string(), "two rows are one");
    let left: Vec<_> = fs_err::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
    open(&args(&out), &json!({})).unwrap().unwrap();
}
