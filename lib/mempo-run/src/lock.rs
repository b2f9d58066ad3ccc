//! One writer at a time: a lock on a file, which the kernel lets go of however the process ends.

use std::{
    fs::TryLockError,
    io::{ErrorKind, Read, Seek, Write},
    path::Path,
};

use fs_err::File;

use crate::{Failure, durable};

/// Name of the lock file inside a stage's directory.
pub(crate) const NAME: &str = ".lock";

/// Held as long as it lives.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Locks a directory for this process, or fails at once and names the owner.
    pub(crate) fn acquire(out: &Path) -> anyhow::Result<Self> {
        let path = out.join(NAME);
        let failed = |error: std::io::Error| durable::failed(&path, &path, error.into());
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Between the owner's lock and its note the file is empty.
                let _ = file.read_to_string(&mut owner);
                let owner = if owner.is_empty() { "another process".to_owned() } else { owner };
                return Err(Failure::Locked { out: out.to_owned(), owner }.into());
            }
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                tracing::warn!("{}: no locks here; see to it that only one process writes", out.display());
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let note = format!("process {} on {host}", std::process::id());
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(note.as_bytes())
        };
        write(&mut file).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_writer_learns_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::acquire(folder.path()).unwrap();
        let error = Lock::acquire(folder.path()).unwrap_err();
        assert_eq!(crate::exit_code(&error), 73);
        let owner = format!("held by process {} on ", std::process::id());
        assert!(error.to_string().contains(&owner), "{error}");
        drop(first);
        Lock::acquire(folder.path()).unwrap();
    }

    #[test]
    fn of_many_at_once_exactly_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..20 {
            let barrier = std::sync::Barrier::new(8);
            let winners: Vec<Option<Lock>> = std::thread::scope(|scope| {
                let attempt = || {
                    barrier.wait();
                    Lock::acquire(folder.path()).ok()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(attempt)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(winners.iter().flatten().count(), 1);
        }
    }
}
