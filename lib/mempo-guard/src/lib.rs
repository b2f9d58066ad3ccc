//! Work on what strangers wrote, bounded in time, memory and depth.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Time between two looks at the work.
const LOOK: Duration = Duration::from_millis(10);

/// What work may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Time; `None`: as long as it likes.
    pub time: Option<Duration>,
    /// Bytes by which the process may grow meanwhile, by whatever is going on in it.
    pub memory: u64,
    /// Bytes of stack; only what is used of them is ever taken.
    pub stack: usize,
}

/// Why work was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GivenUp {
    /// It takes too long.
    #[error("it takes longer than {} s", .0.as_secs())]
    Time(Duration),
    /// It takes too much memory: so many bytes.
    #[error("it takes more than {} MiB", .0 >> 20)]
    Memory(u64),
    /// It panicked.
    #[error("what reads it panicked")]
    Panic,
    /// There is no thread to do it in.
    #[error("the system gives no thread to work in")]
    Thread,
}

/// The result of `work`, or why it was given up. What is given up goes on in its thread: the caller is expected to end the
/// process with the error.
pub fn bounded<T: Send + 'static>(bounds: &Bounds, work: impl FnOnce() -> T + Send + 'static) -> Result<T, GivenUp> {
    let (sender, receiver) = channel();
    let (started, before) = (Instant::now(), resident_bytes().unwrap_or_default());
    let thread = Builder::new().name("guarded".to_owned()).stack_size(bounds.stack).spawn(move || {
        // Nobody waits for what was given up.
        let _ = sender.send(work());
    });
    thread.map_err(|_| GivenUp::Thread)?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err(GivenUp::Panic),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(time) = bounds.time.filter(|time| started.elapsed() > *time) {
            return Err(GivenUp::Time(time));
        }
        if resident_bytes().is_some_and(|now| now.saturating_sub(before) > bounds.memory) {
            return Err(GivenUp::Memory(bounds.memory));
        }
    }
}

/// Memory of this process that is in RAM, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// The most memory of this process that was in RAM at a time so far, where the system tells.
pub fn peak_resident_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// A size of /proc/self/status.
fn status(name: &str) -> Option<u64> {
    let text = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { time: None, memory: 64 << 20, stack: 512 << 20 };

    fn depth(left: u32) -> u32 {
        if left == 0 { 0 } else { 1 + depth(std::hint::black_box(left - 1)) }
    }

    #[test]
    fn the_peak_is_no_less_than_what_is_held() {
        let held = resident_bytes().unwrap();
        assert!(held > 1 << 20 && peak_resident_bytes().unwrap() >= held);
    }

    #[test]
    fn what_stays_within_its_bounds_is_done() {
        assert_eq!(bounded(&BOUNDS, || 7), Ok(7));
        assert_eq!(bounded(&BOUNDS, || depth(1_000_000)), Ok(1_000_000));
    }

    #[test]
    fn what_does_not_is_given_up_with_the_reason() {
        let second = Duration::from_secs(1);
        assert_eq!(bounded(&BOUNDS, || panic!("on purpose")), Err::<(), _>(GivenUp::Panic));
        let bounds = Bounds { time: Some(second), ..BOUNDS };
        assert_eq!(bounded(&bounds, move || std::thread::sleep(10 * second)), Err(GivenUp::Time(second)));
        // Grows by a megabyte at a time, and then waits to be given up.
        let grow = || {
            let mut held: Vec<Vec<u8>> = Vec::new();
            while held.len() < 200 {
                held.push(vec![1; 1 << 20]);
            }
            std::thread::sleep(Duration::from_secs(10));
            held.len()
        };
        assert_eq!(bounded(&BOUNDS, grow), Err(GivenUp::Memory(64 << 20)));
    }
}
