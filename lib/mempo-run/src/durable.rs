//! Files and folders that are there whole or not at all, also after a power cut: written under a temporary name, made
//! durable, then renamed.

use std::{
    fs::File,
    io::{BufWriter, ErrorKind, Write},
    path::{Path, PathBuf},
};

use crate::Failure;

/// Marks a name as temporary; the run's id follows.
const TEMPORARY: &str = ".tmp-";
/// Marks a folder as the one that is being replaced; the run's id follows.
const REPLACED: &str = ".old-";

/// So few free bytes that a disk is taken as full.
const NEXT_TO_NOTHING: u64 = 1 << 16;

/// Whether a name is one that only lives while something is written.
pub(crate) fn is_temporary(name: &str) -> bool {
    name.contains(TEMPORARY) || name.contains(REPLACED)
}

/// Writes a file; `path` is there with all its bytes, or as it was before.
pub(crate) fn write_file(
    path: &Path,
    run_id: &str,
    write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let temporary = marked(path, TEMPORARY, run_id);
    let attempt = || {
        create_folder(parent(path))?;
        let (file, _) = fs_err::File::create(&temporary)?.into_parts();
        let mut writer = BufWriter::new(file);
        write(&mut writer)?;
        // Dropping the writer would swallow the error, and syncing before the flush would miss bytes.
        writer.flush()?;
        writer.get_ref().sync_all()?;
        fs_err::rename(&temporary, path)?;
        Ok(sync_folder(parent(path))?)
    };
    attempt().map_err(|error| {
        let failure = failed(path, &temporary, error);
        // If the file cannot be removed now, the next run does it.
        let _ = fs_err::remove_file(&temporary);
        failure
    })
}

/// Builds a folder; `path` is there with all its files, or as it was before (the latter once [`clean`] has run).
pub(crate) fn replace_folder(
    path: &Path,
    run_id: &str,
    build: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let temporary = marked(path, TEMPORARY, run_id);
    let replaced = marked(path, REPLACED, run_id);
    let attempt = || {
        create_folder(parent(path))?;
        remove(&temporary)?;
        create_folder(&temporary)?;
        build(&temporary)?;
        sync_tree(&temporary)?;
        remove(&replaced)?;
        if path.exists() {
            fs_err::rename(path, &replaced)?;
        }
        fs_err::rename(&temporary, path)?;
        sync_folder(parent(path))?;
        Ok(remove(&replaced)?)
    };
    attempt().map_err(|error| failed(path, &temporary, error))
}

/// Lets `work` write into a folder that nothing is kept of.
pub(crate) fn with_scratch<T>(
    path: &Path,
    run_id: &str,
    work: impl FnOnce(&Path) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let temporary = marked(path, TEMPORARY, run_id);
    let attempt = || {
        remove(&temporary)?;
        create_folder(&temporary)?;
        let result = work(&temporary)?;
        remove(&temporary)?;
        Ok(result)
    };
    attempt().map_err(|error| {
        let failure = failed(path, &temporary, error);
        // If the folder cannot be removed now, the next run does it.
        let _ = remove(&temporary);
        failure
    })
}

/// Removes what earlier processes of this run left half done, and puts back a folder that was about to be replaced.
pub(crate) fn clean(folder: &Path, run_id: &str) -> std::io::Result<()> {
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.ends_with(&format!("{TEMPORARY}{run_id}")) {
            remove(&path)?;
        } else if let Some(original) = name.strip_suffix(&format!("{REPLACED}{run_id}")) {
            let original = folder.join(original);
            if original.exists() {
                remove(&path)?;
            } else {
                fs_err::rename(&path, original)?;
            }
        } else if entry.file_type()?.is_dir() {
            clean(&path, run_id)?;
        }
    }
    Ok(())
}

/// Removes a file or a folder; it need not be there.
pub(crate) fn remove(path: &Path) -> std::io::Result<()> {
    let is_folder = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let removed = if is_folder { fs_err::remove_dir_all(path) } else { fs_err::remove_file(path) };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes a folder and those above it, durably.
pub(crate) fn create_folder(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    create_folder(parent(path))?;
    match fs_err::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_folder(parent(path)),
    }
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> std::io::Result<()> {
    match fs_err::File::open(path)?.sync_all() {
        // Some network file systems have no such notion for folders.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

fn sync_tree(folder: &Path) -> std::io::Result<()> {
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            fs_err::File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

/// An error from writing `path` as a failure with its exit code, where `temporary` has what was written.
pub(crate) fn failed(path: &Path, temporary: &Path, source: anyhow::Error) -> anyhow::Error {
    cannot_write(path, || size(temporary), source)
}

/// An error from writing `path`, to which so many bytes had been written, as a failure with its exit code; one that already is a
/// [`Failure`] stays what it is.
pub fn cannot_write(path: &Path, written: impl FnOnce() -> u64, source: anyhow::Error) -> anyhow::Error {
    if Failure::is_in(&source) {
        return source;
    }
    let io_error = source.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    let Some(io_error) = io_error else {
        return source.context(format!("cannot write {}", path.display()));
    };
    let existing = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let free = rustix::fs::statvfs(existing).map_or(u64::MAX, |disk| disk.f_bavail * disk.f_frsize);
    // Libraries may tell in words alone that a disk is full.
    let is_full =
        matches!(io_error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) || free < NEXT_TO_NOTHING;
    let room = if is_full {
        let written = written();
        format!(" (needs more than {written} bytes, {free} are free: make room and run the same command again)")
    } else {
        String::new()
    };
    Failure::Io { path: path.to_owned(), room, source }.into()
}

/// Bytes of a file, or of all files in a folder; 0 of what cannot be looked at.
fn size(path: &Path) -> u64 {
    match fs_err::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| size(&entry.path())).sum(),
        Err(_) => fs_err::symlink_metadata(path).map_or(0, |metadata| metadata.len()),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn marked(path: &Path, mark: &str, run_id: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(mark);
    name.push(run_id);
    name.into()
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs_err::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.txt");
        write_file(&path, "1", |sink| Ok(sink.write_all(b"old")?)).unwrap();
        let result = write_file(&path, "1", |sink| {
            sink.write_all(b"new")?;
            Err(anyhow!("no more"))
        });
        let error = format!("{:#}", result.unwrap_err());
        assert_eq!(error, format!("cannot write {}: no more", path.display()));
        assert_eq!(fs_err::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(path.parent().unwrap()), ["b.txt"]);
    }

    #[test]
    fn a_full_disk_is_failure_74_with_path_and_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.txt");
        let result = write_file(&path, "1", |_| Err(std::io::Error::from(ErrorKind::StorageFull).into()));
        let error = result.unwrap_err();
        assert_eq!(crate::exit_code(&error), 74);
        let text = format!("{error:#}");
        assert!(text.contains(path.to_str().unwrap()) && text.contains("are free: make room"), "{text}");
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resume");
        let build = |name: &'static str| {
            move |dir: &Path| {
                Ok(fs_err::create_dir(dir.join("in")).and_then(|()| fs_err::write(dir.join("in").join(name), "x"))?)
            }
        };
        replace_folder(&path, "1", build("first")).unwrap();
        replace_folder(&path, "1", build("second")).unwrap();
        assert_eq!(names(&path.join("in")), ["second"]);
        replace_folder(&path, "1", |_| Err(anyhow!("no"))).unwrap_err();
        assert_eq!(names(&path.join("in")), ["second"]);
    }

    #[test]
    fn cleaning_undoes_a_replacement_cut_between_its_renames_and_leaves_other_runs_alone() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for name in ["resume.old-1", "resume.tmp-1", "steps"] {
            fs_err::create_dir(root.join(name)).unwrap();
        }
        fs_err::write(root.join("resume.old-1/state"), "good").unwrap();
        fs_err::write(root.join("steps/part-0.tmp-1"), "").unwrap();
        fs_err::write(root.join("steps/part-0.tmp-2"), "").unwrap();
        clean(root, "1").unwrap();
        assert_eq!(names(root), ["resume", "steps"]);
        assert_eq!(names(&root.join("resume")), ["state"]);
        assert_eq!(names(&root.join("steps")), ["part-0.tmp-2"]);
    }
}
