//! How far the work is: a bar on a terminal, else a log line every so often, with rate and time left.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::log;
use crate::status::Shared;

/// Time between log lines.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Counts work done; made by [`crate::Stage::progress`]. Ends when it is dropped.
pub struct Progress {
    what: String,
    unit: String,
    total: u64,
    done: AtomicU64,
    /// Work that was done before, so that it does not count for the rate.
    skipped: AtomicU64,
    started: Instant,
    bar: Option<ProgressBar>,
    log: Mutex<Log>,
    status: Arc<Shared>,
}

struct Log {
    next: Instant,
    message: String,
}

impl Progress {
    pub(crate) fn new(what: &str, total: u64, unit: &str, status: Arc<Shared>) -> Self {
        let started = Instant::now();
        status.begin(what, unit, total);
        Self {
            what: what.to_owned(),
            unit: unit.to_owned(),
            total,
            done: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            started,
            bar: log::wants_bars().then(|| bar(what, total, unit)),
            log: Mutex::new(Log { next: started + LOG_INTERVAL, message: String::new() }),
            status,
        }
    }

    /// Counts `count` more units as done.
    pub fn inc(&self, count: u64) {
        self.done.fetch_add(count, Ordering::Relaxed);
        self.status.add(count, 0);
        match &self.bar {
            Some(bar) => bar.inc(count),
            None => self.log_if_due(),
        }
    }

    /// Counts units that an earlier run has done: they say nothing about this one's rate.
    pub fn skip(&self, count: u64) {
        self.skipped.fetch_add(count, Ordering::Relaxed);
        self.status.add(count, count);
        self.done.fetch_add(count, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.inc(count);
            bar.reset_eta();
        }
    }

    /// Says what is going on, beside the numbers.
    pub fn message(&self, message: String) {
        self.status.message(&message);
        match &self.bar {
            Some(bar) => bar.set_message(message),
            None => self.log().message = message,
        }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log_if_due(&self) {
        let mut log = self.log();
        let now = Instant::now();
        if now >= log.next {
            log.next = now + LOG_INTERVAL;
            tracing::info!("{}", self.line(self.started.elapsed(), &log.message));
        }
    }

    /// `sampling: 3/10 tasks, 0.5 tasks/s, 14s left, message`.
    fn line(&self, elapsed: Duration, message: &str) -> String {
        let (done, skipped) = (self.done.load(Ordering::Relaxed), self.skipped.load(Ordering::Relaxed));
        let (what, unit, total) = (&self.what, &self.unit, self.total);
        let rate = (done - skipped) as f64 / elapsed.as_secs_f64().max(1e-9);
        let mut parts = vec![format!("{what}: {done}/{total} {unit}")];
        if done > skipped {
            parts.push(format!("{} {unit}/s", significant(rate)));
        }
        if done > skipped && done < total {
            let left = Duration::from_secs_f64((total - done) as f64 / rate);
            parts.push(format!("{} left", indicatif::HumanDuration(left)));
        }
        if !message.is_empty() {
            parts.push(message.to_owned());
        }
        parts.join(", ")
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let message = match &self.bar {
            Some(bar) => {
                bar.finish_and_clear();
                bar.message()
            }
            None => self.log().message.clone(),
        };
        tracing::info!("{}", self.line(self.started.elapsed(), &message));
    }
}

fn bar(what: &str, total: u64, unit: &str) -> ProgressBar {
    let template = format!("{what} [{{wide_bar}}] {{pos}}/{{len}} {unit}, {{per_sec}}, {{eta}} left {{msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style.progress_chars("=> "));
    let bar = log::BARS.add(bar);
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

/// A rate with three digits at least, but no fraction that means nothing.
fn significant(rate: f64) -> String {
    match rate {
        rate if rate >= 100.0 => format!("{rate:.0}"),
        rate if rate >= 1.0 => format!("{rate:.1}"),
        rate => format!("{rate:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Status;

    #[test]
    fn lines_hold_rate_and_time_left_of_this_run_alone() {
        let folder = tempfile::tempdir().unwrap();
        let status = Status::new(folder.path(), "1");
        let progress = Progress::new("sampling", 100, "tasks", status.shared());
        let after = Duration::from_secs(10);
        assert_eq!(progress.line(after, ""), "sampling: 0/100 tasks");
        progress.skip(40);
        assert_eq!(progress.line(after, ""), "sampling: 40/100 tasks");
        progress.inc(20);
        assert_eq!(progress.line(after, "loss 1.5"), "sampling: 60/100 tasks, 2.0 tasks/s, 20 seconds left, loss 1.5");
        progress.inc(40);
        assert_eq!(progress.line(after, ""), "sampling: 100/100 tasks, 6.0 tasks/s");
    }
}
