//! The long document of a task: in its row, or where the row says it is.

use std::path::{Component, Path, PathBuf};

use crate::{Document, Error, Result, Task, read_rows};

/// The document that a task is about; `None` for a search task.
///
/// It stands in the task's `document`, or in the corpus table inside `tasks_dir` (the directory that holds the folder `tasks`)
/// that `document_ref` names. Of that file only what comes before the document is decoded beside it, a batch at a time: nothing
/// where a document has a file of its own, as `compose` writes them.
///
/// # Errors
/// A reference that is no `file#doc_id` with a file inside `tasks_dir`, a file that cannot be read, or one without the document.
pub fn read_document(tasks_dir: &Path, task: &Task) -> Result<Option<String>> {
    let Some(reference) = task.document_ref.as_ref().filter(|_| task.document.is_none()) else {
        return Ok(task.document.clone());
    };
    let (file, doc_id) = split_reference(tasks_dir, reference)
        .ok_or_else(|| Error::BadReference { task_id: task.task_id.clone(), reference: reference.clone() })?;
    for row in read_rows::<Document>(std::slice::from_ref(&file))? {
        let row = row?;
        if row.doc_id == doc_id {
            return Ok(Some(row.text));
        }
    }
    Err(Error::NoDocument { file, doc_id: doc_id.to_owned(), task_id: task.task_id.clone() })
}

/// File and id that a reference names; `None` if there are no two such, or the path could lead out of the directory.
fn split_reference<'r>(dir: &Path, reference: &'r str) -> Option<(PathBuf, &'r str)> {
    let (file, doc_id) = reference.split_once('#')?;
    let file = Path::new(file);
    let is_inside = file.components().all(|part| matches!(part, Component::Normal(_)));
    (is_inside && file.file_name().is_some()).then(|| (dir.join(file), doc_id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_rows;

    fn task(document: Option<&str>, reference: Option<&str>) -> Task {
        Task {
            task_id: "t-7".to_owned(),
            source: "s".to_owned(),
            split: "test".to_owned(),
            question: "Where?".to_owned(),
            objectives: Vec::new(),
            document: document.map(str::to_owned),
            document_ref: reference.map(str::to_owned),
            metadata: None,
        }
    }

    /// Tasks beside a corpus of three documents, the last id being one with the sign that ends the file's name.
    fn tasks_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir(dir.path().join("corpus")).unwrap();
        let row = |id: &str| Document { doc_id: id.to_owned(), title: String::new(), text: format!("text of {id}") };
        let file = fs_err::File::create(dir.path().join("corpus/part-00000.parquet")).unwrap();
        write_rows(&[row("a"), row("b"), row("b#1")], file).unwrap();
        dir
    }

    #[test]
    fn a_document_is_found_in_the_row_or_beside_it() {
        let dir = tasks_dir();
        let read = |document, reference| read_document(dir.path(), &task(document, reference)).unwrap();
        assert_eq!(read(None, None), None);
        assert_eq!(read(Some("here"), None).as_deref(), Some("here"));
        assert_eq!(read(Some("here"), Some("corpus/none.parquet#a")).as_deref(), Some("here"));
        for id in ["a", "b", "b#1"] {
            let found = read(None, Some(&format!("corpus/part-00000.parquet#{id}")));
            assert_eq!(found, Some(format!("text of {id}")));
        }
    }

    #[test]
    fn a_reference_that_leads_nowhere_or_outside_is_refused_by_name() {
        let dir = tasks_dir();
        let inner = dir.path().join("inner");
        fs_err::create_dir(&inner).unwrap();
        let absolute = format!("{}/corpus/part-00000.parquet#a", dir.path().display());
        for (reference, told) in [
            ("corpus/part-00000.parquet", "t-7"),
            ("../corpus/part-00000.parquet#a", "`../corpus/part-00000.parquet#a`"),
            (absolute.as_str(), "inside the tasks' directory"),
            ("#a", "`#a`"),
        ] {
            let error = read_document(&inner, &task(None, Some(reference))).unwrap_err();
            assert!(matches!(error, Error::BadReference { .. }) && error.to_string().contains(told), "{error}");
        }
        let error = read_document(dir.path(), &task(None, Some("corpus/part-00001.parquet#a"))).unwrap_err();
        assert!(matches!(error, Error::Open { .. }) && error.to_string().contains("part-00001"), "{error}");
        let error = read_document(dir.path(), &task(None, Some("corpus/part-00000.parquet#c"))).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("part-00000") && text.contains("`c`") && text.contains("`t-7`"), "{text}");
    }
}
