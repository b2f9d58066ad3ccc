//! `status.json`: how far a run is, for whoever watches it from outside. Replaced whole every few seconds, and when the
//! run ends; a file that is older than that belongs to a process that was killed.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

/// Name of the file inside a stage's directory.
pub(crate) const NAME: &str = "status.json";
/// Time between two writes.
const INTERVAL: Duration = Duration::from_secs(10);

/// Tells how far a run is, as long as it lives.
#[derive(Debug)]
pub(crate) struct Status {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

/// What the run tells and the writing thread reads.
#[derive(Debug)]
pub(crate) struct Shared {
    path: PathBuf,
    temporary: PathBuf,
    started: Instant,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Clone, Default)]
struct State {
    phase: String,
    work: Option<Work>,
    last_commit: Option<String>,
    has_ended: bool,
}

/// Work that can be counted.
#[derive(Debug, Clone, Serialize)]
struct Work {
    unit: String,
    done: u64,
    total: u64,
    message: String,
    #[serde(skip)]
    skipped: u64,
    #[serde(skip)]
    started: Instant,
}

/// The file's content.
#[derive(Serialize)]
struct Report<'a> {
    process: u32,
    host: String,
    /// Seconds since 1970.
    updated: u64,
    running_seconds: u64,
    /// `sampling`; at the end `finished`, or `stopped` where the same command continues.
    phase: &'a str,
    work: Option<&'a Work>,
    seconds_left: Option<u64>,
    /// The last file that is durable.
    last_commit: Option<&'a str>,
    resident_bytes: Option<u64>,
}

impl Status {
    /// About the run in `dir`; nothing is written before it starts.
    pub(crate) fn new(dir: &Path, run_id: &str) -> Self {
        let shared = Arc::new(Shared {
            path: dir.join(NAME),
            temporary: dir.join(format!("{NAME}.tmp-{run_id}")),
            started: Instant::now(),
            state: Mutex::new(State { phase: "starting".to_owned(), ..State::default() }),
            ended: Condvar::new(),
        });
        Self { shared, writer: None }
    }

    /// Tells from now on.
    pub(crate) fn start(&mut self) {
        let shared = self.shared();
        let writer = std::thread::Builder::new().name("status".to_owned()).spawn(move || shared.write_on());
        if let Err(error) = &writer {
            tracing::warn!("{}: not written: {error}", self.shared.path.display());
        }
        self.writer = writer.ok();
    }

    /// What is told from.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// The run has come to its end.
    pub(crate) fn finish(self) {
        self.shared.state().phase = String::from("finished");
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if state.phase != "finished" {
            state.phase = String::from("stopped");
        }
        state.has_ended = true;
        drop(state);
        self.shared.ended.notify_all();
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has nothing more to tell.
            let _ = writer.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Work begins that can be counted.
    pub(crate) fn begin(&self, phase: &str, unit: &str, total: u64) {
        let mut state = self.state();
        phase.clone_into(&mut state.phase);
        let (unit, message) = (unit.to_owned(), String::new());
        state.work = Some(Work { unit, done: 0, total, message, skipped: 0, started: Instant::now() });
    }

    /// More of it is done, some of that by an earlier run.
    pub(crate) fn add(&self, done: u64, skipped: u64) {
        if let Some(work) = &mut self.state().work {
            work.done += done;
            work.skipped += skipped;
        }
    }

    /// What is to be said beside the numbers.
    pub(crate) fn message(&self, message: &str) {
        if let Some(work) = &mut self.state().work {
            message.clone_into(&mut work.message);
        }
    }

    /// A file is durable.
    pub(crate) fn committed(&self, path: &str) {
        self.state().last_commit = Some(path.to_owned());
    }

    fn write_on(&self) {
        loop {
            // Written from a copy: a slow disk must not keep the work waiting.
            let state = self.state().clone();
            if let Err(error) = self.write(&state) {
                // Whoever watches sees that the file is old; the work itself goes on.
                tracing::debug!("{}: {error}", self.path.display());
            }
            if state.has_ended {
                return;
            }
            drop(self.ended.wait_timeout_while(self.state(), INTERVAL, |state| !state.has_ended));
        }
    }

    fn write(&self, state: &State) -> std::io::Result<()> {
        let report = Report {
            process: std::process::id(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            updated: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            running_seconds: self.started.elapsed().as_secs(),
            phase: &state.phase,
            work: state.work.as_ref(),
            seconds_left: state.work.as_ref().and_then(Work::seconds_left),
            last_commit: state.last_commit.as_deref(),
            resident_bytes: mempo_guard::resident_bytes(),
        };
        let text = serde_json::to_string_pretty(&report)? + "\n";
        let written = fs_err::write(&self.temporary, text).and_then(|()| fs_err::rename(&self.temporary, &self.path));
        // A full disk must not be left with half of it.
        written.inspect_err(|_| drop(fs_err::remove_file(&self.temporary)))
    }
}

impl Work {
    fn seconds_left(&self) -> Option<u64> {
        let own = self.done.checked_sub(self.skipped).filter(|own| *own > 0)?;
        let left = self.total.saturating_sub(self.done);
        Some((self.started.elapsed().as_secs_f64() * left as f64 / own as f64) as u64)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn read(dir: &Path) -> Value {
        serde_json::from_str(&fs_err::read_to_string(dir.join(NAME)).unwrap()).unwrap()
    }

    #[test]
    fn the_file_tells_what_the_run_last_said() {
        let folder = tempfile::tempdir().unwrap();
        let mut status = Status::new(folder.path(), "1");
        status.start();
        status.shared().begin("sampling", "tasks", 40);
        status.shared().add(10, 10);
        status.shared().add(10, 0);
        status.shared().message("mean reward 0.5");
        status.shared().committed("steps/part-00001.parquet");
        drop(status);
        let found = read(folder.path());
        assert_eq!(
            (&found["phase"], &found["work"]["done"], &found["work"]["total"]),
            (&"stopped".into(), &20.into(), &40.into())
        );
        assert_eq!(found["work"]["message"], "mean reward 0.5");
        assert_eq!(found["last_commit"], "steps/part-00001.parquet");
        assert!(found["seconds_left"].is_u64() && found["resident_bytes"].as_u64() > Some(1 << 20), "{found}");
        let mut status = Status::new(folder.path(), "1");
        status.start();
        status.finish();
        assert_eq!(read(folder.path())["phase"], "finished");
        assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn time_left_counts_what_this_run_did() {
        let started = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let work = Work { unit: String::new(), done: 60, total: 100, message: String::new(), skipped: 40, started };
        assert_eq!(work.seconds_left(), Some(20));
        assert_eq!(Work { done: 40, ..work }.seconds_left(), None);
    }
}
