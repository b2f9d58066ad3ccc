//! Processes that are killed, asked to stop, or start twice.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{Bench, Trial, moment, uniform, wait_at_most};
use crate::chain::Stage;

/// How long a stage may take to stop when it is asked to.
const GRACE: Duration = Duration::from_secs(10);

/// What was done in a trial.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Kills {
    /// Processes ended by SIGKILL.
    pub killed: u64,
    /// Processes ended by SIGTERM, with exit code 75.
    pub stopped: u64,
    /// Longest time from SIGTERM to the end, in seconds.
    pub stop_seconds: f64,
}

/// Starts a stage again and again, and kills it each time at another moment: SIGKILL mostly, SIGTERM one time in five. At
/// most `kills` times; then it may finish, and has to be what it would have been.
pub fn kill_trial(bench: &Bench, stage: &Stage, seed: u64, kills: u64, longest: Duration) -> anyhow::Result<Kills> {
    let trial = Trial::new(bench, stage, &format!("kills-{seed}"))?;
    let mut done = Kills::default();
    for kill in 0..kills {
        let number = kill.to_string();
        let mut child = bench.command(&trial.line).spawn()?;
        if let Some(status) = wait_at_most(&mut child, moment(seed, &["moment", &number], longest))? {
            ensure!(status.success(), "`{}` ended with {status} before it was killed", trial.line);
            break;
        }
        if uniform(seed, &["signal", &number]) < 0.2 {
            let start = Instant::now();
            let pid = Pid::from_raw(child.id() as i32).context("a process has a number")?;
            kill_process(pid, Signal::TERM)?;
            let status = wait_at_most(&mut child, GRACE)?;
            let status = status.with_context(|| format!("`{}` still runs {GRACE:?} after SIGTERM", trial.line))?;
            // Before its handler is there, the signal itself ends it.
            ensure!(
                matches!(status.code(), Some(0 | 75) | None),
                "`{}` ended with {status} after SIGTERM, expected 75",
                trial.line
            );
            done.stopped += u64::from(status.code() == Some(75));
            done.stop_seconds = done.stop_seconds.max(start.elapsed().as_secs_f64());
            if status.code() == Some(0) {
                break;
            }
        } else {
            child.kill()?;
            child.wait()?;
            done.killed += 1;
        }
    }
    trial.must_recover()?;
    Ok(done)
}

/// Starts a stage `writers` times at once: one does the work, the others are sent away.
pub fn race_trial(bench: &Bench, stage: &Stage, writers: usize) -> anyhow::Result<()> {
    let trial = Trial::new(bench, stage, "race")?;
    let children = (0..writers).map(|_| bench.command(&trial.line).spawn()).collect::<std::io::Result<Vec<_>>>()?;
    let mut codes = Vec::new();
    for mut child in children {
        codes.push(child.wait()?.code());
    }
    let finished = codes.iter().filter(|code| **code == Some(0)).count();
    let sent_away = codes.iter().filter(|code| **code == Some(73)).count();
    // One that comes when the work is done finds it finished.
    ensure!(finished >= 1 && finished + sent_away == writers, "`{}`: exit codes {codes:?}", trial.line);
    trial.must_equal_reference()
}
