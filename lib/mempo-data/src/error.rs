//! What can go wrong with a table, said so that the user can act on it.

use std::path::PathBuf;

use crate::Key;

/// A table that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("cannot read rows from {}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A line of a text file cannot be read.
    #[error("{}:{line}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not Parquet, is damaged, or takes too much memory to read.
    #[error("{}: cannot be read as a Parquet file; copy or make it again", file.display())]
    Parquet {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: parquet::errors::ParquetError,
    },
    /// The file says that it holds another table.
    #[error("{}: holds table `{found}`, expected table `{expected}`", file.display())]
    WrongTable {
        /// The file.
        file: PathBuf,
        /// What the file's metadata says.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// The file was written by a program that knows a newer schema.
    #[error("{}: schema version {found}, this program reads up to {}; use a newer program",
        file.display(), crate::SCHEMA_VERSION)]
    NewerSchema {
        /// The file.
        file: PathBuf,
        /// The version in the file's metadata.
        found: String,
    },
    /// A column that may not be null is not there.
    #[error("{}: no column `{column}`, expected one of type {expected}; the file has {found}", file.display())]
    MissingColumn {
        /// The file.
        file: PathBuf,
        /// The column (or `column.field` within a struct).
        column: String,
        /// The type it should have.
        expected: String,
        /// The columns that are there.
        found: String,
    },
    /// A column has a type that cannot be converted without loss of meaning.
    #[error("{}: column `{column}` has type {found}, expected {expected}; convert it first", file.display())]
    WrongType {
        /// The file.
        file: PathBuf,
        /// The column (or `column.element`, `column.field` inside it).
        column: String,
        /// The type in the file.
        found: String,
        /// The type it should have.
        expected: String,
    },
    /// A value is null where none may be.
    #[error("{}: column `{column}` is null in row {row}, expected a value in every row", file.display())]
    UnexpectedNull {
        /// The file.
        file: PathBuf,
        /// The column.
        column: String,
        /// Row of the file, from 0 (of the column's batch for values inside lists).
        row: usize,
    },
    /// A value does not fit its column's type.
    #[error("{}: column `{column}`, rows {} to {}: a value does not fit type {expected}",
        file.display(), rows.start, rows.end)]
    BadValue {
        /// The file.
        file: PathBuf,
        /// The column.
        column: String,
        /// The rows of the batch it is in.
        rows: std::ops::Range<usize>,
        /// The type it should have.
        expected: String,
        /// The cause.
        source: arrow::error::ArrowError,
    },
    /// A value has the right type but no meaning, such as an unknown status.
    #[error("{}: rows {} to {} of table `{table}` hold a value with no meaning", file.display(), rows.start, rows.end)]
    BadRow {
        /// The file.
        file: PathBuf,
        /// The table.
        table: &'static str,
        /// The rows of the batch it is in.
        rows: std::ops::Range<usize>,
        /// The cause, with the column.
        source: Box<serde_arrow::Error>,
    },
    /// Rows are not sorted by key.
    #[error("table `{table}`: {found} comes after {previous}, expected rows sorted by key; sort the file")]
    Unsorted {
        /// The table.
        table: &'static str,
        /// The row before.
        previous: Key,
        /// The row that should have come earlier.
        found: Key,
    },
    /// Two rows have one key.
    #[error("table `{table}`: two rows are {key}, expected one; remove the duplicate")]
    Duplicate {
        /// The table.
        table: &'static str,
        /// The key.
        key: Key,
    },
    /// A [`crate::Cursor`] was asked to go back.
    #[error(
        "table `{table}`: asked for {found} after {previous}, but a cursor only goes forward; sort the other table"
    )]
    Backwards {
        /// The table.
        table: &'static str,
        /// The key asked for before.
        previous: Key,
        /// The key asked for now.
        found: Key,
    },
    /// Rows cannot be turned into Arrow arrays.
    #[error("table `{table}`: {key} cannot be written")]
    Convert {
        /// The table.
        table: &'static str,
        /// The row.
        key: Key,
        /// The cause.
        source: Box<serde_arrow::Error>,
    },
    /// The sink refused the bytes.
    #[error("cannot write table `{table}`")]
    Write {
        /// The table.
        table: &'static str,
        /// The cause; an I/O error is the source's source.
        source: parquet::errors::ParquetError,
    },
    /// A task says where its document is in a way that is not understood, or not followed.
    #[error(
        "task `{task_id}`: document_ref is `{reference}`, expected `file#doc_id` with a file inside the tasks' directory; \
         make the tasks again"
    )]
    BadReference {
        /// The task.
        task_id: String,
        /// What the row says.
        reference: String,
    },
    /// The document of a task is not where the task says.
    #[error("{}: no document `{doc_id}`, which task `{task_id}` is about; copy or make the tasks again", file.display())]
    NoDocument {
        /// The corpus file.
        file: PathBuf,
        /// The document.
        doc_id: String,
        /// The task.
        task_id: String,
    },
}
