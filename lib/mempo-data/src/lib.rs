//! The tables that the stages hand to each other: what their columns are, and how rows get into and out of Parquet.
//!
//! Takes typed rows and gives files, and the other way round. Knows nothing of stages, directories or models.
//!
//! ```
//! use mempo_data::{Document, read_rows, write_rows};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("part-00000.parquet");
//! let rows = [Document { doc_id: "a".into(), title: "A".into(), text: "About a.".into() }];
//! write_rows(&rows, fs_err::File::create(&path)?)?;
//! let read: Vec<Document> = read_rows(&[path])?.collect::<Result<_, _>>()?;
//! assert_eq!(read, rows);
//! # Ok(())
//! # }
//! ```

mod caught;
mod conform;
mod document;
mod error;
mod json_array;
mod json_rows;
mod merge;
mod read;
mod row;
mod rows;
mod schema;
mod sort;
mod tables;
mod write;

pub use caught::{parquet_batches, parquet_builder};
pub use document::read_document;
pub use error::Error;
pub use json_rows::{
    JSON_ROWS_EXTENSIONS, JsonRow, JsonRows, has_extension, json_rows, parquet_bytes, parquet_row_count, text_lines,
    write_json_rows,
};
pub use merge::{Cursor, groups};
pub use read::{RowReader, read_rows};
pub use row::{Key, Row};
pub use rows::*;
pub use schema::{Column, SCHEMA_VERSION, arrow_schema, schema_markdown};
pub use sort::{Sorted, Sorter};
pub use tables::{TABLES, columns};
pub use write::{TableWriter, write_rows};

/// What the functions of this crate return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// File metadata key of the schema version.
const VERSION_KEY: &str = "mempo.schema_version";
/// File metadata key of the table's name.
const TABLE_KEY: &str = "mempo.table";
