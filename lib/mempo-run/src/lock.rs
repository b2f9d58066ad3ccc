//! One writer at a time: a lock on a file, which the kernel lets go of however the process ends.

use std::{
    fs::TryLockError,
    io::{ErrorKind, Read, Seek, Write},
    path::Path,
    thread::sleep,
    time::Duration,
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
    /// Fails if another process holds the lock of a directory, which need not exist.
    pub(crate) fn probe(out: &Path) -> anyhow::Result<()> {
        let Ok(mut file) = File::open(out.join(NAME)) else { return Ok(()) };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Err(held(out, &mut file)),
            _ => Ok(()),
        }
    }

    /// Locks a directory for this process, or fails at once and names the owner.
    pub(crate) fn acquire(out: &Path) -> anyhow::Result<Self> {
        let path = out.join(NAME);
        let failed = |error: std::io::Error| durable::failed(&path, &path, error.into());
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match try_lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(held(out, &mut file));
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

/// Tries for a tenth of a second: another process may just be looking whether the directory is free.
fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(10)),
            other => return other,
        }
    }
    file.try_lock()
}

/// The failure that names who holds a directory.
fn held(out: &Path, file: &mut File) -> anyhow::Error {
    let mut owner = String::new();
    // Between the owner's lock and its note the file is empty.
    let _ = file.read_to_string(&mut owner);
    let owner = if owner.is_empty() { "another process".to_owned() } else { owner };
    Failure::Locked { out: out.to_owned(), owner }.into()
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
        assert_eq!(Lock::probe(folder.path()).unwrap_err().to_string(), error.to_string());
        drop(first);
        Lock::probe(folder.path()).unwrap();
        Lock::probe(&folder.path().join("not there")).unwrap();
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
