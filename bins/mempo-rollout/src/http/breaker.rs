//! What keeps a host that answers nothing from being waited for by every call.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Counts calls to a host that came to nothing in a row. After `most` of them calls fail at once for a while; then one is
/// let through, and what comes of it decides about the others.
pub(super) struct Breaker {
    most: u32,
    pause: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    in_vain: u32,
    last: String,
    /// Until when calls fail at once.
    open_until: Option<Instant>,
}

impl Breaker {
    pub(super) fn new(most: u32, pause: Duration) -> Self {
        Self { most, pause, state: Mutex::default() }
    }

    /// Lets a call through, or says why not.
    pub(super) fn enter(&self, now: Instant) -> Result<(), String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.open_until {
            Some(until) if now < until => {
                let (in_vain, last, rest) = (state.in_vain, &state.last, (until - now).as_secs_f64().ceil());
                Err(format!(
                    "not asked: {in_vain} calls in a row came to nothing, the last by {last}; again in {rest} s"
                ))
            }
            Some(_) => {
                // The others wait for what comes of this one.
                state.open_until = Some(now + self.pause);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Takes in what came of a call that was let through.
    pub(super) fn record(&self, now: Instant, result: Result<(), &str>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Err(problem) = result else {
            *state = State::default();
            return;
        };
        state.in_vain = state.in_vain.saturating_add(1);
        problem.clone_into(&mut state.last);
        if state.in_vain >= self.most {
            state.open_until = Some(now + self.pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_some_failures_in_a_row_one_call_a_pause_is_let_through() {
        let (breaker, start) = (Breaker::new(3, Duration::from_secs(30)), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for _ in 0..2 {
            breaker.enter(start).unwrap();
            breaker.record(start, Err("a reset"));
        }
        breaker.record(start, Ok(()));
        for _ in 0..3 {
            breaker.enter(start).unwrap();
            breaker.record(start, Err("a reset"));
        }
        let told = breaker.enter(at(10)).unwrap_err();
        assert_eq!(told, "not asked: 3 calls in a row came to nothing, the last by a reset; again in 20 s");
        assert!(breaker.enter(at(31)).is_ok() && breaker.enter(at(31)).is_err(), "one alone");
        breaker.record(at(32), Err("a timeout"));
        assert!(breaker.enter(at(61)).unwrap_err().contains("4 calls in a row came to nothing, the last by a timeout"));
        assert!(breaker.enter(at(63)).is_ok());
        breaker.record(at(64), Ok(()));
        assert!(breaker.enter(at(64)).is_ok() && breaker.enter(at(64)).is_ok());
    }
}
