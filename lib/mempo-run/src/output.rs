//! Standard output: data that was asked for, and nothing else.

use std::{
    io::{self, ErrorKind, Write},
    sync::Mutex,
};

use crate::{Failure, log};

/// The first error of standard output, other than that nobody reads it any more.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints data that was asked for to standard output.
///
/// A reader that has gone away, as `head` does, is no error; any other one makes the program end with code 74.
pub fn print_data(text: &str) {
    let result = log::suspend(|| {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
    });
    if let Err(error) = result
        && error.kind() != ErrorKind::BrokenPipe
    {
        failed().get_or_insert(error);
    }
}

/// Prints a table with aligned columns to standard output; columns of numbers are aligned to the right.
pub fn print_table(header: &[&str], rows: &[Vec<String>]) {
    print_data(&render_table(header, rows));
}

/// An error if something could not be printed.
pub(crate) fn check() -> anyhow::Result<()> {
    match failed().take() {
        Some(source) => {
            let (path, room) = ("standard output".into(), String::new());
            Err(Failure::Io { path, room, source: source.into() }.into())
        }
        None => Ok(()),
    }
}

fn failed() -> std::sync::MutexGuard<'static, Option<io::Error>> {
    FAILED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn render_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let columns: Vec<Vec<String>> = header
        .iter()
        .enumerate()
        .map(|(column, name)| align(name, rows.iter().map(|row| cell(row, column)).collect()))
        .collect();
    let lines = (0..=rows.len()).map(|line| {
        let cells: Vec<&str> = columns.iter().map(|column| column[line].as_str()).collect();
        format!("{}\n", cells.join("  ").trim_end())
    });
    lines.collect()
}

/// A column's cells, header first, all equally wide.
fn align(name: &str, mut cells: Vec<String>) -> Vec<String> {
    let is_number = |cell: &String| cell.trim_start_matches(['-', '+', '±']).starts_with(|c: char| c.is_ascii_digit());
    let is_right = !cells.is_empty() && cells.iter().all(is_number);
    cells.insert(0, name.to_owned());
    let width = cells.iter().map(|cell| cell.chars().count()).max().unwrap_or_default();
    let pad = |cell: String| {
        if is_right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
    };
    cells.into_iter().map(pad).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["naïve".to_owned(), "9".to_owned()], vec!["b".to_owned(), "-10.5 ± 1".to_owned()]];
        let expected = ["name          F1", "naïve          9", "b      -10.5 ± 1", ""].join("\n");
        assert_eq!(render_table(&["name", "F1"], &rows), expected);
        assert_eq!(render_table(&["name", "F1"], &[]), "name  F1\n");
    }
}
