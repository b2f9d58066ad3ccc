//! Going on with smaller micro-batches when memory runs out.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;

use crate::Error;

thread_local! {
    /// Whether this thread's lack of memory will be dealt with, so that nobody is to be told of the panic.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// How many tokens of a micro-batch fit into memory, as far as is known.
pub(crate) struct Room {
    tokens: Cell<usize>,
}

impl Default for Room {
    fn default() -> Self {
        Self { tokens: Cell::new(usize::MAX) }
    }
}

impl Room {
    /// The number of tokens, once memory has run out.
    pub(crate) fn known(&self) -> Option<usize> {
        Some(self.tokens.get()).filter(|tokens| *tokens < usize::MAX)
    }

    /// Runs `work` with so many tokens a micro-batch, or half as many as often as memory runs out, and remembers how many
    /// there were. With fewer than `shortest` no micro-batch can get smaller, and the lack of memory is the error.
    pub(crate) fn fit<T>(
        &self,
        tokens: usize,
        shortest: usize,
        mut work: impl FnMut(usize) -> Result<T, Error>,
    ) -> Result<T, Error> {
        loop {
            let tokens = tokens.min(self.tokens.get());
            match without_memory(|| work(tokens))? {
                Ok(value) => return Ok(value),
                Err(message) if tokens < shortest.max(2) => return Err(Error::Memory(message)),
                Err(_) => self.tokens.set(tokens / 2),
            }
        }
    }
}

/// The value of `work`, or libtorch's message where it got no memory; other errors and panics go on.
fn without_memory<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<Result<T, String>, Error> {
    be_silent_when_expected();
    let before = EXPECTED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    EXPECTED.set(before);
    let message = match outcome {
        Ok(Ok(value)) => return Ok(Ok(value)),
        Ok(Err(error @ Error::Torch(_))) if !is_lack_of_memory(&error.to_string()) => return Err(error),
        Ok(Err(Error::Torch(error))) => error.to_string(),
        Ok(Err(error)) => return Err(error),
        Err(panic) => match panic.downcast::<String>() {
            Ok(message) if is_lack_of_memory(&message) => *message,
            Ok(message) => resume_unwind(message),
            Err(panic) => resume_unwind(panic),
        },
    };
    Ok(Err(message.lines().next().unwrap_or_default().chars().take(300).collect()))
}

/// libtorch says so on the GPU, and in several ways on the CPU; the last two are oneDNN's and the C++ library's.
fn is_lack_of_memory(message: &str) -> bool {
    const WORDS: [&str; 5] =
        ["out of memory", "can't allocate memory", "not enough memory", "could not create a primitive", "bad_alloc"];
    WORDS.iter().any(|words| message.contains(words))
}

fn be_silent_when_expected() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let lack = panic.payload().downcast_ref::<String>().is_some_and(|message| is_lack_of_memory(message));
            if !(lack && EXPECTED.get()) {
                tell(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    /// More than any machine has, where a micro-batch is above what fits.
    fn allocate(tokens: usize, fits: usize) {
        let size = if tokens > fits { 1 << 50 } else { 8 };
        let _ = Tensor::zeros([size], (Kind::Float, Device::Cpu));
    }

    #[test]
    fn micro_batches_are_halved_until_they_fit_and_stay_so() {
        let room = Room::default();
        let mut tried = Vec::new();
        let mut fit = |tokens| {
            room.fit(tokens, 10, |tokens| {
                tried.push(tokens);
                allocate(tokens, 100);
                Ok(tokens)
            })
        };
        assert_eq!(fit(1000).unwrap(), 62);
        assert_eq!(fit(1000).unwrap(), 62);
        assert_eq!(fit(30).unwrap(), 30);
        assert_eq!(tried, [1000, 500, 250, 125, 62, 62, 30]);
        assert_eq!((room.known(), Room::default().known()), (Some(62), None));
    }

    #[test]
    fn a_single_sequence_too_large_is_an_error() {
        let mut tried = Vec::new();
        let result: Result<(), Error> = Room::default().fit(64, 20, |tokens| {
            tried.push(tokens);
            allocate(tokens, 0);
            Ok(())
        });
        let error = result.unwrap_err().to_string();
        assert!(error.contains("--recompute") && error.contains("memory"), "{error}");
        assert_eq!(tried, [64, 32, 16]);
    }

    #[test]
    fn other_errors_and_panics_go_on() {
        let error = Room::default().fit(8, 1, |_| -> Result<(), Error> {
            let shapes = Tensor::zeros([2], (Kind::Float, Device::Cpu)).f_view([3])?;
            drop(shapes);
            Ok(())
        });
        assert!(matches!(error, Err(Error::Torch(_))));
        let panic = catch_unwind(|| Room::default().fit(8, 1, |_| -> Result<(), Error> { panic!("of mine") }));
        assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"of mine"));
    }
}
