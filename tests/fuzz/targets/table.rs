//! A part of a table with some bytes changed.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use mempo_data::{Logprobs, Task, read_rows, write_rows};
use mempo_fuzz::Change;

static PART: LazyLock<(PathBuf, Vec<u8>)> = LazyLock::new(|| {
    let path = tempfile::tempdir().expect("a temporary folder").keep().join("part.parquet");
    let row = |index: i32| Logprobs {
        task_id: format!("task-{index:02}"),
        trajectory_index: index,
        step_index: 0,
        policy_logprobs: vec![-0.5; 20],
        reference_logprobs: (index % 2 == 0).then(|| vec![-0.25; 20]),
    };
    let rows: Vec<Logprobs> = (0..30).map(row).collect();
    let mut bytes = Vec::new();
    write_rows(&rows, &mut bytes).expect("rows can be written");
    (path, bytes)
});

libfuzzer_sys::fuzz_target!(
    // Panics of the Parquet library are caught and told; only those that nobody catches end the process.
    init: drop(std::panic::take_hook()),
    |changes: Vec<Change>| {
        let (path, mut bytes) = (PART.0.clone(), PART.1.clone());
        for change in changes {
            change.apply(&mut bytes);
        }
        fs_err::write(&path, &bytes).expect("there is room");
        let files = [path];
        if let Ok(rows) = read_rows::<Logprobs>(&files) {
            let _ = rows.take_while(Result::is_ok).count();
        }
        assert!(read_rows::<Task>(&files).is_err(), "log-probabilities are no tasks");
    }
);
