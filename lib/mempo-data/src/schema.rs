//! A column's type and meaning, the Arrow schema of a table, and the page about it in `schemas/`.

use std::{collections::HashMap, fmt::Write, sync::Arc};

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};

use crate::{VERSION_KEY, columns, tables};

/// Version of all tables together: raised when a column changes its name, type or meaning.
pub const SCHEMA_VERSION: u32 = 1;

/// One column of a table.
#[derive(Debug, Clone)]
pub struct Column {
    /// Name in the file.
    pub name: &'static str,
    /// Name, Arrow type and whether nulls are allowed.
    pub field: FieldRef,
    /// Unit of the values; empty where there is none.
    pub unit: &'static str,
    /// What a value says.
    pub meaning: &'static str,
}

impl Column {
    /// A column that is never null.
    pub(crate) fn new(name: &'static str, data_type: DataType, unit: &'static str, meaning: &'static str) -> Self {
        Self { name, field: Arc::new(Field::new(name, data_type, false)), unit, meaning }
    }

    /// The same column, but nulls are allowed.
    pub(crate) fn nullable(mut self) -> Self {
        self.field = Arc::new(self.field.as_ref().clone().with_nullable(true));
        self
    }
}

/// A list with items that are never null, named as the Parquet format asks.
pub(crate) fn list(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("element", item, false)))
}

/// A struct with fields that are never null.
pub(crate) fn structure(fields: &[(&str, DataType)]) -> DataType {
    let fields = fields.iter().map(|(name, data_type)| Field::new(*name, data_type.clone(), false));
    DataType::Struct(fields.collect())
}

/// The Arrow schema of a table, as it stands in its files.
///
/// # Panics
/// If there is no such table; `table` is a [`crate::Row::TABLE`] or one of [`crate::TABLES`].
pub fn arrow_schema(table: &str) -> SchemaRef {
    let columns = columns(table).unwrap_or_else(|| panic!("no table `{table}`; there are {:?}", tables::TABLES));
    let fields: Vec<FieldRef> = columns.iter().map(|column| Arc::clone(&column.field)).collect();
    let metadata = HashMap::from([(VERSION_KEY.to_owned(), SCHEMA_VERSION.to_string())]);
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// The content of `schemas/<table>.md`.
///
/// # Panics
/// If there is no such table.
pub fn schema_markdown(table: &str) -> String {
    let columns = columns(table).unwrap_or_else(|| panic!("no table `{table}`; there are {:?}", tables::TABLES));
    let mut page = format!("# {table}\n\n{}\n\n", tables::about(table));
    page.push_str("| column | type | unit | null? | meaning |\n|---|---|---|---|---|\n");
    for column in columns {
        let null = if column.field.is_nullable() { "yes" } else { "" };
        let data_type = type_name(column.field.data_type());
        writeln!(page, "| `{}` | `{data_type}` | {} | {null} | {} |", column.name, column.unit, column.meaning)
            .expect("writing to a String cannot fail");
    }
    write!(page, "\nSchema version {SCHEMA_VERSION}. Generated from `lib/mempo-data/src/tables.rs`.\n")
        .expect("writing to a String cannot fail");
    page
}

/// A type as people write it: `List<Struct<kind: Utf8, start: Int32>>`.
pub(crate) fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::List(item) => format!("List<{}>", type_name(item.data_type())),
        DataType::Struct(fields) => {
            let fields = fields.iter().map(|field| format!("{}: {}", field.name(), type_name(field.data_type())));
            format!("Struct<{}>", fields.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schemas_folder() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../schemas")
    }

    #[test]
    fn pages_in_schemas_equal_the_code() {
        let update = std::env::var_os("MEMPO_UPDATE_SCHEMAS").is_some();
        for table in tables::TABLES {
            let path = schemas_folder().join(format!("{table}.md"));
            if update {
                fs_err::write(&path, schema_markdown(table)).unwrap();
            }
            let page = fs_err::read_to_string(&path).unwrap_or_default();
            assert_eq!(page, schema_markdown(table), "run the tests once with MEMPO_UPDATE_SCHEMAS=1");
        }
    }

    #[test]
    fn schemas_holds_nothing_but_the_tables() {
        for entry in fs_err::read_dir(schemas_folder()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let table = name.strip_suffix(".md").unwrap_or(&name);
            assert!(tables::TABLES.contains(&table), "schemas/{name} describes no table");
        }
    }

    #[test]
    fn written_schemas_hold_plain_types_only() {
        fn check(field: &Field) {
            match field.data_type() {
                DataType::List(item) => {
                    assert_eq!(item.name(), "element");
                    assert!(!item.is_nullable());
                    check(item);
                }
                DataType::Struct(fields) => fields.iter().for_each(|field| check(field)),
                DataType::Utf8 | DataType::Boolean => {}
                number if number.is_numeric() => {}
                other => panic!("{}: {other}", field.name()),
            }
        }
        for table in tables::TABLES {
            arrow_schema(table).fields().iter().for_each(|field| check(field));
        }
    }

    #[test]
    fn every_column_has_a_meaning() {
        for table in tables::TABLES {
            assert!(tables::about(table).ends_with('.'), "{table}");
            for column in columns(table).unwrap() {
                assert!(column.meaning.len() > 3, "{table}.{}", column.name);
                assert!(!column.meaning.contains('|'), "{table}.{}: a bar breaks the page", column.name);
                assert_eq!(column.name, column.field.name());
            }
        }
    }
}
