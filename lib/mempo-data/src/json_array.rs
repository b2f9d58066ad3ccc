//! The elements of a JSON array as text, one at a time: many data sets come as one array in one file.

use std::io::{self, BufRead};

/// Cuts an array into its elements by strings and brackets alone; what stands in one is for others to read. After an error there
/// are no more.
pub(crate) struct Elements<R> {
    reader: Option<R>,
    longest: usize,
    is_begun: bool,
}

/// Where in an element a byte stands.
#[derive(Default)]
struct Nesting {
    depth: u32,
    in_string: bool,
    is_escaped: bool,
}

impl Nesting {
    /// Whether the element is over before this byte.
    fn ends_before(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.is_escaped || byte != b'"';
            self.is_escaped = !self.is_escaped && byte == b'\\';
            return false;
        }
        match byte {
            b',' | b']' if self.depth == 0 => return true,
            b'"' => self.in_string = true,
            b'[' | b'{' => self.depth += 1,
            b']' | b'}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        false
    }
}

impl<R: BufRead> Elements<R> {
    /// Of a file that begins with `[`, perhaps after a byte order mark; an element has at most so many bytes.
    pub(crate) fn new(reader: R, longest: usize) -> Self {
        Self { reader: Some(reader), longest, is_begun: false }
    }

    /// Whether a file that begins so holds an array.
    pub(crate) fn are_in(beginning: &[u8]) -> bool {
        let beginning = beginning.strip_prefix(b"\xef\xbb\xbf").unwrap_or(beginning);
        beginning.trim_ascii_start().starts_with(b"[")
    }

    fn element(&mut self) -> io::Result<Option<Vec<u8>>> {
        let (longest, is_first) = (self.longest, !std::mem::replace(&mut self.is_begun, true));
        let Some(reader) = self.reader.as_mut() else { return Ok(None) };
        if is_first {
            let mut mark = Vec::new();
            reader.read_until(b'[', &mut mark)?;
        }
        let mut element = Vec::new();
        let closing = cut(reader, longest, &mut element)?;
        let is_blank = element.trim_ascii().is_empty();
        match closing {
            None => Err(invalid("the file ends within its array: copy or make it again")),
            Some(b',') if is_blank => Err(invalid("a comma, expected an object before it")),
            Some(b',') => Ok(Some(element)),
            Some(_) if is_blank && !is_first => Err(invalid("`]` after a comma, expected an object")),
            Some(_) => {
                nothing_more(reader)?;
                self.reader = None;
                Ok((!is_blank).then_some(element))
            }
        }
    }
}

/// Takes an element up to what ends it, which is given; nothing where the file ends first.
fn cut(reader: &mut impl BufRead, longest: usize, element: &mut Vec<u8>) -> io::Result<Option<u8>> {
    let mut nesting = Nesting::default();
    loop {
        let read = reader.fill_buf()?;
        if read.is_empty() {
            return Ok(None);
        }
        let end = read.iter().position(|byte| nesting.ends_before(*byte));
        let taken = end.unwrap_or(read.len());
        if element.len() + taken > longest {
            return Err(invalid(&format!("an element longer than {} MiB of a JSON array", longest >> 20)));
        }
        element.extend_from_slice(&read[..taken]);
        let closing = end.map(|end| read[end]);
        reader.consume(taken + usize::from(closing.is_some()));
        if closing.is_some() {
            return Ok(closing);
        }
    }
}

fn nothing_more(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let read = reader.fill_buf()?;
        if read.is_empty() {
            return Ok(());
        }
        if !read.trim_ascii().is_empty() {
            return Err(invalid("text after the end of the array; expected one JSON array, or one object a line"));
        }
        let taken = read.len();
        reader.consume(taken);
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

impl<R: BufRead> Iterator for Elements<R> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.element();
        if found.is_err() {
            self.reader = None;
        }
        found.transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Elements, and what ended them if it was not the array's end; read three bytes at a time.
    fn all(text: &str) -> (Vec<String>, Option<String>) {
        let reader = BufReader::with_capacity(3, text.as_bytes());
        let (mut found, mut error) = (Vec::new(), None);
        for element in Elements::new(reader, 100) {
            match element {
                Ok(element) => found.push(String::from_utf8(element).unwrap().trim().to_owned()),
                Err(problem) => error = Some(problem.to_string()),
            }
        }
        (found, error)
    }

    #[test]
    fn elements_are_cut_at_the_commas_between_them() {
        for (text, expected) in [
            ("\u{feff} [ {\"a\": \"],[\\\"\"} ,\n[1, 2], 3]\n\n", vec!["{\"a\": \"],[\\\"\"}", "[1, 2]", "3"]),
            ("[{\"a\": {\"b\": [1, \"\\\\\"]}}]", vec!["{\"a\": {\"b\": [1, \"\\\\\"]}}"]),
            ("[]", vec![]),
            (" [ \n ] ", vec![]),
        ] {
            assert_eq!(all(text), (expected.iter().map(ToString::to_string).collect(), None), "{text}");
        }
    }

    #[test]
    fn what_is_no_array_is_said_after_what_is_whole() {
        for (text, whole, told) in [
            ("[1, 2", 1, "ends within its array"),
            ("[{\"a\": \"]", 0, "ends within its array"),
            ("[1,]", 1, "`]` after a comma"),
            ("[,1]", 0, "a comma, expected an object before it"),
            ("[1]\n[2]", 0, "text after the end of the array"),
        ] {
            let (found, error) = all(text);
            assert_eq!(found.len(), whole, "{text}");
            assert!(error.as_ref().is_some_and(|error| error.contains(told)), "{text}: {error:?}");
        }
        let (found, error) = all(&format!("[1, \"{}\"]", "x".repeat(100)));
        assert!(found.len() == 1 && error.unwrap().contains("longer than"));
    }

    proptest! {
        #[test]
        fn any_array_is_cut_as_it_was_joined(texts in proptest::collection::vec(".{0,12}", 0..6), is_pretty: bool) {
            let values: Vec<Value> = texts.iter().map(|text| json!({text: [text, {"deep": text}]})).collect();
            let array = Value::Array(values.clone());
            let text = if is_pretty { format!("{array:#}") } else { array.to_string() };
            let found: Vec<Value> = Elements::new(BufReader::with_capacity(5, text.as_bytes()), 1 << 20)
                .map(|element| serde_json::from_slice(&element.unwrap()).unwrap())
                .collect();
            prop_assert_eq!(found, values);
        }
    }
}
