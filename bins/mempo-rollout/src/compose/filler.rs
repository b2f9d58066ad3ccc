//! Plain prose cut into passages where paragraphs end.

use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, ensure};
use mempo_data::{JSON_ROWS_EXTENSIONS, has_extension};

use crate::rows;

/// A passage ends with the first paragraph that makes it this long, in bytes; about three passages of an encyclopaedia.
const PASSAGE_BYTES: usize = 1_500;
/// Where blank lines are rare, a line's end will do once a passage is this long.
const LONGEST_BYTES: usize = 4 * PASSAGE_BYTES;

/// Gives title and text of each passage of a file: of JSON Lines or Parquet rows with `text` and perhaps `title`, or of a
/// text file, which has the title that its name is.
pub(crate) fn read(path: &Path, mut each: impl FnMut(&str, &str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut count = 0_u64;
    let mut counted = |title: &str, text: &str| {
        count += 1;
        each(title, text)
    };
    if JSON_ROWS_EXTENSIONS.iter().any(|extension| has_extension(path, extension)) {
        for row in rows::read(path, &["title", "text"])? {
            let row = row?;
            let (title, text) = (row.optional_text(&["title"])?.unwrap_or_default(), row.text(&["text"])?);
            cut(text.lines().map(|line| Ok(line.to_owned())), |passage| counted(&title, passage))?;
        }
    } else {
        let title = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let lines = BufReader::new(fs_err::File::open(path)?).lines().zip(1..);
        let lines = lines.map(|(line, number)| line.with_context(|| format!("{}:{number}", path.display())));
        cut(lines, |passage| counted(&title, passage))?;
    }
    ensure!(count > 0, "{} holds no text", path.display());
    Ok(())
}

fn cut(
    lines: impl Iterator<Item = anyhow::Result<String>>,
    mut each: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut passage = String::new();
    for line in lines {
        let line = line?;
        let is_blank = line.trim().is_empty();
        if passage.len() >= LONGEST_BYTES || (is_blank && passage.len() >= PASSAGE_BYTES) {
            each(passage.trim())?;
            passage.clear();
        }
        // Any number of blank lines is one.
        if !is_blank || !(passage.is_empty() || passage.ends_with("\n\n")) {
            passage.push_str(&line);
            passage.push('\n');
        }
    }
    if passage.trim().is_empty() { Ok(()) } else { each(passage.trim()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passages(path: &Path) -> Vec<(String, String)> {
        let mut found = Vec::new();
        read(path, |title, text| {
            found.push((title.to_owned(), text.to_owned()));
            Ok(())
        })
        .unwrap();
        found
    }

    #[test]
    fn prose_is_cut_between_paragraphs_and_nothing_of_it_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let paragraph = |i: usize| format!("Paragraph {i} begins.\n{}ends.", "It goes on. ".repeat(i % 60));
        let text = (0..100).map(paragraph).collect::<Vec<_>>().join("\n\n\n");
        let path = directory.path().join("novel.txt");
        fs_err::write(&path, &text).unwrap();
        let found = passages(&path);
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(found.iter().flat_map(|(_, text)| words(text)).collect::<Vec<_>>(), words(&text));
        assert!(found.len() > 10 && found.iter().all(|(title, _)| title == "novel"));
        for (_, passage) in &found[..found.len() - 1] {
            assert!(passage.starts_with("Paragraph") && passage.ends_with("ends."), "{passage}");
            assert!((PASSAGE_BYTES..LONGEST_BYTES).contains(&(passage.len() + 2)), "{}", passage.len());
        }
    }

    #[test]
    fn rows_keep_their_titles_and_lines_without_blank_ones_are_cut_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("articles.jsonl");
        let row = serde_json::json!({"title": "A", "text": "A line of it.\n".repeat(1000)});
        fs_err::write(&path, format!("{row}\n{}", serde_json::json!({"title": "B", "text": "Short."}))).unwrap();
        let found = passages(&path);
        assert_eq!(found.last().unwrap(), &("B".to_owned(), "Short.".to_owned()));
        assert!(found.len() > 2 && found.iter().all(|(_, text)| text.len() < LONGEST_BYTES + 20));
        fs_err::write(&path, "").unwrap();
        assert!(read(&path, |_, _| Ok(())).unwrap_err().to_string().contains("holds no text"));
    }
}
