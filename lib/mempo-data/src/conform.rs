//! A file's columns against a table's: which differences are harmless, and the conversion of those that are.
//!
//! Harmless are other widths of integers, floats, offsets and views, dictionaries, columns that are null throughout,
//! another name of a list's items, and another order of columns. A value that does not fit is refused, never changed,
//! except that a double is rounded where the column is single precision.

use std::{ops::Range, path::Path, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, ListArray, StructArray, new_null_array},
    compute::{CastOptions, cast_with_options},
    datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef},
    error::ArrowError,
    record_batch::RecordBatch,
};

use crate::{Error, Result, schema::type_name};

/// Checks the names and types of a file's columns against the table's.
pub(crate) fn check_schema(file: &Path, found: &Schema, expected: &Schema) -> Result<()> {
    for field in expected.fields() {
        check_field(file, field.name(), found.fields(), field)?;
    }
    Ok(())
}

fn check_field(file: &Path, path: &str, found: &Fields, expected: &Field) -> Result<()> {
    match found.find(expected.name()) {
        Some((_, field)) => check_type(file, path, field.data_type(), expected.data_type()),
        None if expected.is_nullable() => Ok(()),
        None => Err(Error::MissingColumn {
            file: file.to_owned(),
            column: path.to_owned(),
            expected: type_name(expected.data_type()),
            found: found.iter().map(|field| format!("`{}`", field.name())).collect::<Vec<_>>().join(", "),
        }),
    }
}

fn check_type(file: &Path, path: &str, found: &DataType, expected: &DataType) -> Result<()> {
    let harmless = match (found, expected) {
        (DataType::Null, _) => true,
        (DataType::Dictionary(_, value), _) => return check_type(file, path, value, expected),
        (_, DataType::List(item)) => match list_item(found) {
            Some(found) => {
                return check_type(file, &format!("{path}.element"), found.data_type(), item.data_type());
            }
            None => false,
        },
        (DataType::Struct(found), DataType::Struct(fields)) => {
            for field in fields {
                check_field(file, &format!("{path}.{}", field.name()), found, field)?;
            }
            true
        }
        (_, DataType::Utf8) => matches!(found, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
        (_, DataType::Float32 | DataType::Float64) => found.is_floating(),
        (_, expected) if expected.is_integer() => found.is_integer(),
        _ => found == expected,
    };
    if harmless {
        return Ok(());
    }
    Err(Error::WrongType {
        file: file.to_owned(),
        column: path.to_owned(),
        found: type_name(found),
        expected: type_name(expected),
    })
}

/// The items of any kind of list.
fn list_item(list: &DataType) -> Option<&FieldRef> {
    match list {
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => Some(item),
        _ => None,
    }
}

/// A batch with exactly the columns and types of `schema`. `rows` is where the batch stands in the file.
pub(crate) fn conform_batch(
    file: &Path,
    batch: &RecordBatch,
    schema: &SchemaRef,
    rows: &Range<usize>,
) -> Result<RecordBatch> {
    let place = Place { file, rows };
    let columns = schema.fields().iter().map(|field| match batch.column_by_name(field.name()) {
        Some(array) => place.conform(field.name(), array, field),
        None => Ok(new_null_array(field.data_type(), batch.num_rows())),
    });
    let columns = columns.collect::<Result<Vec<_>>>()?;
    RecordBatch::try_new(Arc::clone(schema), columns)
        .map_err(|source| place.bad_value("(all)", schema_type(schema), source))
}

fn schema_type(schema: &Schema) -> DataType {
    DataType::Struct(schema.fields().clone())
}

/// Where the arrays being converted come from.
struct Place<'a> {
    file: &'a Path,
    rows: &'a Range<usize>,
}

impl Place<'_> {
    fn bad_value(&self, path: &str, expected: impl std::borrow::Borrow<DataType>, source: ArrowError) -> Error {
        Error::BadValue {
            file: self.file.to_owned(),
            column: path.to_owned(),
            rows: self.rows.clone(),
            expected: type_name(expected.borrow()),
            source,
        }
    }

    /// `array` as the type of `field`, without nulls if the field has none.
    fn conform(&self, path: &str, array: &ArrayRef, field: &Field) -> Result<ArrayRef> {
        let converted = match field.data_type() {
            DataType::List(item) if !array.data_type().is_null() => self.conform_list(path, array, item)?,
            DataType::Struct(fields) if !array.data_type().is_null() => self.conform_struct(path, array, fields)?,
            data_type => self.cast(path, array, data_type)?,
        };
        if !field.is_nullable() && converted.null_count() > 0 {
            let row = (0..converted.len()).find(|&row| converted.is_null(row)).unwrap_or_default();
            let (file, column) = (self.file.to_owned(), path.to_owned());
            return Err(Error::UnexpectedNull { file, column, row: self.rows.start + row });
        }
        Ok(converted)
    }

    fn cast(&self, path: &str, array: &ArrayRef, data_type: &DataType) -> Result<ArrayRef> {
        if array.data_type() == data_type {
            return Ok(Arc::clone(array));
        }
        let options = CastOptions { safe: false, ..CastOptions::default() };
        cast_with_options(array, data_type, &options).map_err(|source| self.bad_value(path, data_type, source))
    }

    fn conform_list(&self, path: &str, array: &ArrayRef, item: &FieldRef) -> Result<ArrayRef> {
        let found = list_item(array.data_type()).map_or_else(|| Arc::clone(item), Arc::clone);
        let array = self.cast(path, array, &DataType::List(found))?;
        let list = array.as_list::<i32>();
        let values = self.conform(&format!("{path}.element"), list.values(), item)?;
        let list = ListArray::try_new(Arc::clone(item), list.offsets().clone(), values, list.nulls().cloned());
        Ok(Arc::new(list.map_err(|source| self.bad_value(path, DataType::List(Arc::clone(item)), source))?))
    }

    fn conform_struct(&self, path: &str, array: &ArrayRef, fields: &Fields) -> Result<ArrayRef> {
        let structure = array.as_struct();
        let columns = fields.iter().map(|field| match structure.column_by_name(field.name()) {
            Some(column) => self.conform(&format!("{path}.{}", field.name()), column, field),
            None => Ok(new_null_array(field.data_type(), array.len())),
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let structure = StructArray::try_new(fields.clone(), columns, structure.nulls().cloned());
        Ok(Arc::new(structure.map_err(|source| self.bad_value(path, DataType::Struct(fields.clone()), source))?))
    }
}
