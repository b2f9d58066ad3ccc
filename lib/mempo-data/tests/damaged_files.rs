//! Whatever bytes a file holds, reading it ends with rows or with an error.

use mempo_data::{Segment, SegmentKind, Step, StopReason, Task, read_rows, write_rows};
use proptest::prelude::*;

fn step(index: i32) -> Step {
    Step {
        task_id: format!("task-{index:02}"),
        trajectory_index: index,
        step_index: 0,
        prompt_ids: vec![1, 2, 3],
        completion_ids: (0..20).collect(),
        sampling_logprobs: vec![-0.5; 20],
        segments: vec![Segment { kind: SegmentKind::Memory, start: 0, end: 4 }],
        completion: "<mem>ä</mem>".to_owned(),
        observation: (index % 2 == 0).then(|| "seen".to_owned()),
        observation_ids: None,
        stop_reason: StopReason::StopString,
    }
}

/// One change of some bytes: where (as a share of the length), what is done, and with which byte.
fn changes() -> impl Strategy<Value = Vec<(f64, u8, u8)>> {
    proptest::collection::vec((0.0..1.0, 0..5_u8, any::<u8>()), 1..4)
}

fn change(bytes: &mut Vec<u8>, (place, what, byte): (f64, u8, u8)) {
    let place = (place * bytes.len() as f64) as usize;
    match what {
        _ if place >= bytes.len() => {}
        0 => bytes.truncate(place),
        1 => bytes.insert(place, byte),
        2 => drop(bytes.remove(place)),
        3 => bytes[place] = byte,
        _ => bytes[place] ^= 1 << (byte % 8),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_damaged_table_is_read_or_refused(changes in changes()) {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("part.parquet");
        write_rows(&(0..30).map(step).collect::<Vec<_>>(), fs_err::File::create(&path)?).unwrap();
        let mut bytes = fs_err::read(&path)?;
        for one in changes {
            change(&mut bytes, one);
        }
        fs_err::write(&path, &bytes)?;
        let files = [path];
        if let Ok(rows) = read_rows::<Step>(&files) {
            let _ = rows.count();
        }
        prop_assert!(read_rows::<Task>(&files).is_err(), "steps are no tasks");
    }
}
