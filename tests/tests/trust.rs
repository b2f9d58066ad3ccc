//! A little of `./just torture`: every stage is killed, its disk fails, its files are damaged.

#![expect(clippy::print_stderr, reason = "what is not tried is said, and libtest has no other way")]

use mempo_tests::chain::Stage;
use mempo_tests::run;
use mempo_tests::torture::{
    Bench, FAULTS, can_mount, can_trace, count_calls, damage_trial, disk_trial, fault_trial, kill_trial, race_trial,
    shard_trial,
};

#[test]
fn shards_give_the_bytes_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::new(folder.path()).unwrap();
    let cut = |stage: &&Stage| [1, 2, 7].map(|count| shard_trial(&bench, stage, count).unwrap()).contains(&true);
    let cut: Vec<&str> = bench.stages().iter().filter(cut).map(|stage| stage.name.as_str()).collect();
    assert_eq!(
        cut,
        [
            "sft build",
            "rollout sample",
            "score segments",
            "score logprobs",
            "score advantages",
            "rollout sample, document",
        ]
    );
}

#[test]
fn inputs_are_read_whole_unless_they_are_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::new(folder.path()).unwrap();
    let advantages = &bench.stages()[8];
    // A file that belongs to the scores, but that this stage has no need of.
    let sums = folder.path().join("scores/units/part-00000.json");
    let changed = fs_err::read_to_string(&sums).unwrap().replacen('0', "1", 1);
    fs_err::write(&sums, changed).unwrap();
    let line = advantages.with_out("again");
    let told = String::from_utf8(run(folder.path(), &line, 4).stderr).unwrap();
    assert!(told.contains("units/part-00000.json: SHA-256"), "{told}");
    run(folder.path(), &format!("{line} --trust-inputs"), 0);
    let manifest = fs_err::read_to_string(folder.path().join("again/manifest.json")).unwrap();
    assert_eq!(manifest.matches("\"is_trusted\": true").count(), 2, "rollouts and scores");
    fs_err::write(&sums, "").unwrap();
    run(folder.path(), &format!("{} --trust-inputs", advantages.with_out("once-more")), 4);
}

#[test]
fn harm_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::new(folder.path()).unwrap();
    for (place, stage) in bench.stages().iter().enumerate() {
        let duration = bench.duration(stage).unwrap();
        let (mut ended, mut seed) = (0, 100 * place as u64);
        while ended < 20 {
            let kills = kill_trial(&bench, stage, seed, 7, duration).unwrap();
            (ended, seed) = (ended + kills.killed + kills.stopped, seed + 1);
            assert!(seed % 100 < 99, "{}: only {ended} of 99 starts were killed in time", stage.name);
        }
        race_trial(&bench, stage, 2).unwrap();
        assert!(damage_trial(&bench, stage, place as u64, 20).unwrap() > 0);
        if can_trace().unwrap() {
            // Another kind of failure for each stage, at its last call: the commit.
            let fault = FAULTS[place % FAULTS.len()];
            let calls = count_calls(&bench, stage, fault).unwrap();
            fault_trial(&bench, stage, fault, calls).unwrap();
        } else {
            eprintln!("failing system calls are not tried: there is no strace, or it may not trace");
        }
        if can_mount() {
            disk_trial(&bench, stage, bench.size(stage).unwrap() / 2048).unwrap();
        } else {
            eprintln!("full disks are not tried: this user may not mount");
        }
    }
}
