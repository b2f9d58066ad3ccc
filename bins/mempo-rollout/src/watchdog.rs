//! Says so when nothing finishes: a server hangs, a tool never answers, a model is slower than was thought.

use std::time::{Duration, Instant};

/// How long nothing may finish before it is said, and said again.
pub(crate) const SILENCE: Duration = Duration::from_mins(1);

/// Watches one run.
pub(crate) struct Watchdog {
    after: Duration,
    finished: Instant,
    told: Instant,
}

impl Watchdog {
    /// From now on.
    pub(crate) fn new(after: Duration) -> Self {
        let now = Instant::now();
        Self { after, finished: now, told: now }
    }

    /// Something is done.
    pub(crate) fn finished(&mut self) {
        *self = Self::new(self.after);
    }

    /// Nothing is: says what is waited for, once in so long a time.
    pub(crate) fn look(&mut self, under_way: impl FnOnce() -> String) {
        if self.told.elapsed() >= self.after {
            self.told = Instant::now();
            let seconds = self.finished.elapsed().as_secs_f64().round();
            tracing::warn!("nothing has finished for {seconds} s: {}", under_way());
        }
    }
}

/// Lines of the log, as a test sees them.
#[cfg(test)]
pub(crate) mod testing {
    use std::fmt::{Debug, Write};
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);

    struct Line(String);

    impl Visit for Line {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            if field.name() == "message" {
                write!(self.0, "{value:?}").unwrap();
            }
        }
    }

    impl Subscriber for Lines {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, event: &Event<'_>) {
            let mut line = Line(String::new());
            event.record(&mut line);
            self.0.lock().unwrap().push(line.0);
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    /// What this thread says meanwhile.
    pub(crate) fn lines_of(work: impl FnOnce()) -> Vec<String> {
        let lines = Lines::default();
        tracing::subscriber::with_default(lines.clone(), work);
        std::mem::take(&mut *lines.0.lock().unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_once_in_so_long_and_not_while_something_finishes() {
        let short = Duration::from_millis(40);
        let lines = testing::lines_of(|| {
            let mut watchdog = Watchdog::new(short);
            watchdog.look(|| "not yet".to_owned());
            std::thread::sleep(short);
            watchdog.look(|| "a tool".to_owned());
            watchdog.look(|| "at once again".to_owned());
            std::thread::sleep(short);
            watchdog.finished();
            watchdog.look(|| "nothing".to_owned());
        });
        assert_eq!(lines, ["nothing has finished for 0 s: a tool"]);
    }
}
