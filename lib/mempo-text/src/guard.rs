//! Work on what strangers wrote, bounded in time, memory and depth.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Time it may take.
const TIME: Duration = Duration::from_secs(10);
/// By how much the process may grow meanwhile.
const MEMORY: u64 = 1 << 30;
/// Room for recursion; only what is used of it is ever taken.
const STACK: usize = 512 << 20;
/// Time between two looks at it.
const LOOK: Duration = Duration::from_millis(10);

/// The result of `work`, or why it was given up. What is given up goes on in its thread: the caller is expected to end the
/// process with the error.
pub(crate) fn bounded<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (sender, receiver) = channel();
    let (started, before) = (Instant::now(), resident_bytes());
    let thread = Builder::new().name("template".to_owned()).stack_size(STACK).spawn(move || {
        // Nobody waits for what was given up.
        let _ = sender.send(work());
    });
    thread.map_err(|error| format!("no thread to work on it: {error}"))?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err("it made the template engine panic".to_owned()),
            Err(RecvTimeoutError::Timeout) if started.elapsed() > TIME => {
                return Err(format!("it takes longer than {} s", TIME.as_secs()));
            }
            Err(RecvTimeoutError::Timeout) if resident_bytes().saturating_sub(before) > MEMORY => {
                return Err(format!("it takes more than {} MiB", MEMORY >> 20));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// Memory of this process that is in RAM; 0 where the system does not tell.
fn resident_bytes() -> u64 {
    let text = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depth(left: u32) -> u32 {
        if left == 0 { 0 } else { 1 + depth(std::hint::black_box(left - 1)) }
    }

    #[test]
    fn what_panics_or_recurses_deeply_is_told_or_borne() {
        assert_eq!(bounded(|| 7), Ok(7));
        assert_eq!(bounded(|| depth(1_000_000)), Ok(1_000_000));
        assert!(bounded(|| panic!("on purpose")).unwrap_err().contains("panic"));
    }
}
