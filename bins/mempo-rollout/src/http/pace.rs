//! What keeps requests to what a server allows in a minute.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Gives out turns, evenly spread.
pub(super) struct Pace {
    interval: Duration,
    /// When the next request may be made.
    next: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(per_minute: u32) -> Self {
        Self { interval: Duration::from_mins(1) / per_minute.max(1), next: Mutex::default() }
    }

    /// Takes the next turn: how long a request that would be made now has to wait for it.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = next.map_or(now, |next| next.max(now));
        *next = Some(turn + self.interval);
        turn - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_an_interval_apart_and_none_are_saved_up() {
        let (pace, start) = (Pace::new(120), Instant::now());
        let half = Duration::from_millis(500);
        let waits: Vec<Duration> = (0..3).map(|_| pace.wait(start)).collect();
        assert_eq!(waits, [Duration::ZERO, half, 2 * half]);
        assert_eq!(pace.wait(start + 2 * half), half);
        let later = start + Duration::from_mins(1);
        assert_eq!([pace.wait(later), pace.wait(later)], [Duration::ZERO, half]);
    }
}
