//! Tools elsewhere: who hangs, fails or panics holds up nobody else.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::*;

/// Trajectories that have heard from the host.
#[derive(Default)]
struct Heard {
    trajectories: Mutex<Vec<u64>>,
    changed: Condvar,
}

/// A tool elsewhere, told by its argument who asks. The call of trajectory 0 hangs until 67 others have heard from it, that
/// of 1 panics, that of 2 fails, and 3 is told that it asked wrongly.
struct Host(Arc<Heard>);

impl Tool for Host {
    fn spec(&self) -> ToolSpec {
        ToolSpec { name: "host".to_owned(), description: String::new(), parameters: json!({}) }
    }

    fn call(&self, arguments: &Value) -> Result<String, ToolFailure> {
        let failed = |problem: &str| Err(ToolFailure::Failed(problem.to_owned()));
        match arguments["trajectory"].as_u64() {
            Some(0) => {
                let heard = self.0.trajectories.lock().unwrap();
                let hangs = |heard: &mut Vec<u64>| heard.len() < 67;
                let waited = self.0.changed.wait_timeout_while(heard, Duration::from_mins(1), hangs).unwrap().1;
                if waited.timed_out() { failed("in vain") } else { Ok("late".to_owned()) }
            }
            Some(1) => panic!("a tool that panics"),
            Some(2) => failed("gone"),
            Some(3) => Err(ToolFailure::BadArguments("Error: not so.".to_owned())),
            _ => Ok("at once".to_owned()),
        }
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// With more trajectories than calls may be under way.
#[test]
fn a_host_that_hangs_holds_up_none_but_who_asked_it() {
    let builder = builder("mempo");
    let heard = Arc::new(Heard::default());
    let toolbox = Toolbox::new(vec![Box::new(Host(Arc::clone(&heard)))], 0).unwrap();
    let script = |_, _, seed: u64| {
        let (trajectory, step) = (seed % 1000 / 10, seed % 10);
        let text = if step == 0 {
            let call = json!({"name": "host", "arguments": {"trajectory": trajectory}});
            format!("<mem></mem><tool_call>{call}</tool_call>")
        } else {
            heard.trajectories.lock().unwrap().push(trajectory);
            heard.changed.notify_all();
            RIGHT.to_owned()
        };
        Ok((text, StopReason::StopString))
    };
    let mut engine = Scripted { builder: &builder, calls: Vec::new(), bytewise: false, script };
    let task = task("a");
    let starts =
        (0..70).map(|trajectory_index| Start { task: &task, trajectory_index, steps: &[], document: &[] }).collect();
    let setting = Setting::new(&builder);
    let unit = setting.with_tools(&toolbox, |agent| agent.run(&mut engine, starts).unwrap());
    assert_eq!(heard.trajectories.lock().unwrap().last(), Some(&0), "the others have ended before it hears");
    assert!(unit.steps.is_sorted_by_key(Row::key) && unit.steps.len() == 138);
    for (place, row) in unit.trajectories.iter().enumerate() {
        let told = match place {
            1 => Some("step 0: tool `host`: calling it panicked"),
            2 => Some("step 0: tool `host`: gone"),
            _ => None,
        };
        let status = if told.is_some() { Status::ToolError } else { Status::Ok };
        assert_eq!((row.trajectory_index as usize, row.status, row.error.as_deref()), (place, status, told));
        assert_eq!((row.tool_calls, row.format_valid), (1, place != 3), "{place}");
    }
    let seen = |place: i32| {
        let step = unit.steps.iter().find(|step| step.trajectory_index == place).unwrap();
        step.observation.clone()
    };
    let expected = ["late", "Error: not so.", "at once"].map(|text| Some(format!("<information>{text}</information>")));
    assert_eq!([seen(0), seen(3), seen(69)], expected);
    assert_eq!([seen(1), seen(2)], [None, None]);
}
