//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is what chat templates and models expect.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// One line of JSON with `", "` and `": "` between values and non-ASCII text left as it is.
///
/// ```
/// let value = serde_json::json!({"name": "search", "arguments": {"query": "Élysée"}});
/// assert_eq!(mempo_text::python_json(&value), r#"{"name": "search", "arguments": {"query": "Élysée"}}"#);
/// ```
pub fn python_json(value: &Value) -> String {
    serialize(value, PythonFormatter)
}

/// The same over several lines, `indent` spaces a level.
pub(crate) fn python_json_indented(value: &Value, indent: usize) -> String {
    serialize(value, PrettyFormatter::with_indent(" ".repeat(indent.min(16)).as_bytes()))
}

fn serialize(value: &Value, formatter: impl Formatter) -> String {
    let mut bytes = Vec::new();
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        .expect("a JSON value serialises into memory");
    String::from_utf8(bytes).expect("serde_json writes UTF-8")
}
