//! All passages that documents can be made of, on disk; in memory 16 bytes each.
//!
//! Passages are told apart by title and text: what comes again is one passage, also with other white space, in capitals or with
//! other code points for the same letters, and stands as it came first. Their texts lie one after another in a file without
//! a name beside the output, as large as they are, which goes with the process. While they are added, 16 bytes more each tell
//! what has come before. Tokens are counted when they are first asked for.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use mempo_run::{cannot_write, seed_of};
use mempo_text::{Tokenizer, fold};

/// What stands between passages.
pub(crate) const SEPARATOR: &str = "\n\n";

#[derive(Clone, Copy)]
struct Entry {
    offset: u64,
    bytes: u32,
    /// 0 until they are counted.
    tokens: u32,
}

/// Takes passages in.
pub(crate) struct Shelf {
    /// What the file was called.
    path: PathBuf,
    file: BufWriter<File>,
    entries: Vec<Entry>,
    by_fingerprint: HashMap<u64, u32>,
    end: u64,
}

impl Shelf {
    /// An empty one, in the folder above `out` that is there.
    pub(crate) fn beside(out: &Path) -> anyhow::Result<Self> {
        let out = std::path::absolute(out)?;
        let folder = out.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
        let path = folder.join(format!(".mempo-passages-{}", std::process::id()));
        let open = || -> std::io::Result<File> {
            let file = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
            fs_err::remove_file(&path)?;
            Ok(file.into_parts().0)
        };
        let file = BufWriter::new(open().map_err(|error| cannot_write(&path, || 0, error.into()))?);
        Ok(Self { path, file, entries: Vec::new(), by_fingerprint: HashMap::new(), end: 0 })
    }

    /// Passages so far.
    pub(crate) fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Takes a passage in and gives its number; `None` if it is empty.
    pub(crate) fn add(&mut self, title: &str, text: &str) -> anyhow::Result<Option<u32>> {
        let (title, text) = (title.trim(), text.trim());
        if text.is_empty() {
            return Ok(None);
        }
        let body = if title.is_empty() { text.to_owned() } else { format!("{title}\n{text}") };
        let next = u32::try_from(self.entries.len()).map_err(|_| anyhow!("more than 4294967295 passages"))?;
        let number = *self.by_fingerprint.entry(seed_of(0, &[&fold(&body)])).or_insert(next);
        if number == next {
            let bytes = u32::try_from(body.len()).map_err(|_| anyhow!("`{title}`: a passage of 4 GiB or more"))?;
            let (path, end) = (&self.path, self.end);
            self.file.write_all(body.as_bytes()).map_err(|error| cannot_write(path, || end, error.into()))?;
            self.entries.push(Entry { offset: self.end, bytes, tokens: 0 });
            self.end += u64::from(bytes);
        }
        Ok(Some(number))
    }

    /// Ends the taking in. Passages from `filler_from` on are the filler.
    pub(crate) fn close(self, filler_from: u32, tokenizer: Tokenizer) -> anyhow::Result<Library> {
        let (path, end) = (self.path, self.end);
        let file = self.file.into_inner().map_err(|error| cannot_write(&path, || end, error.into_error().into()))?;
        Ok(Library { file, entries: self.entries, filler_from, tokenizer })
    }
}

/// Gives passages and their lengths.
pub(crate) struct Library {
    file: File,
    entries: Vec<Entry>,
    filler_from: u32,
    tokenizer: Tokenizer,
}

impl Library {
    /// Numbers of the passages that are documents.
    pub(crate) fn documents(&self) -> Range<u32> {
        0..self.filler_from
    }

    /// Numbers of the passages that are filler.
    pub(crate) fn filler(&self) -> Range<u32> {
        self.filler_from..self.entries.len() as u32
    }

    /// A passage: its title, if it has one, on a line of its own, and its text.
    pub(crate) fn text(&self, passage: u32) -> anyhow::Result<String> {
        let Entry { offset, bytes, .. } = self.entries[passage as usize];
        let mut text = vec![0; bytes as usize];
        self.file.read_exact_at(&mut text, offset).context("passages beside --out")?;
        Ok(String::from_utf8(text)?)
    }

    /// Tokens of a passage and the separator after it.
    pub(crate) fn tokens(&mut self, passage: u32) -> anyhow::Result<u64> {
        let known = self.entries[passage as usize].tokens;
        if known != 0 {
            return Ok(known.into());
        }
        let tokens = self.count(&(self.text(passage)? + SEPARATOR));
        self.entries[passage as usize].tokens = u32::try_from(tokens)?;
        Ok(tokens)
    }

    /// Tokens of any text, as a reader of the document encodes it. Texts that end in a line's end and begin with a word have
    /// together as many as alone.
    pub(crate) fn count(&self, text: &str) -> u64 {
        self.tokenizer.encode_untrusted(text).len() as u64
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use mempo_text::{NewTokenizer, train_tokenizer};

    use super::*;

    /// A library of documents and filler, each with a title, and a tokenizer made for them.
    pub(crate) fn library(directory: &Path, documents: &[&str], filler: &[&str]) -> Library {
        let mut shelf = Shelf::beside(&directory.join("out")).unwrap();
        let number = |number: Option<u32>| number.unwrap();
        for text in documents {
            number(shelf.add("Title", text).unwrap());
        }
        let filler_from = shelf.len();
        for text in filler {
            number(shelf.add("Filler", text).unwrap());
        }
        let texts = documents.iter().chain(filler).map(|text| format!("Document 1:\nTitle\n{text}\n\n"));
        train_tokenizer(texts, &NewTokenizer::of_size(300), directory).unwrap();
        shelf.close(filler_from, Tokenizer::load(directory).unwrap()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_come_back_and_equal_ones_are_one() {
        let directory = tempfile::tempdir().unwrap();
        let mut shelf = Shelf::beside(&directory.path().join("a/b/out")).unwrap();
        let mut add = |title: &str, text: &str| shelf.add(title, text).unwrap();
        assert_eq!(
            [add("A", " é one "), add("", "two"), add("A", "é one"), add("B", " ")],
            [Some(0), Some(1), Some(0), None]
        );
        let others = [add("A", "é  one"), add("a", "e\u{301}\u{a0}One"), add("A", "é on e")];
        assert_eq!(others, [Some(0), Some(0), Some(2)]);
        assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 0, "the file has no name");
        let mut library = testing::library(directory.path(), &["é one", "two"], &["three"]);
        assert_eq!((library.documents(), library.filler()), (0..2, 2..3));
        for (passage, text) in ["Title\né one", "Title\ntwo", "Filler\nthree"].into_iter().enumerate() {
            assert_eq!(library.text(passage as u32).unwrap(), text);
            for _ in 0..2 {
                assert_eq!(library.tokens(passage as u32).unwrap(), library.count(&format!("{text}\n\n")));
            }
        }
    }
}
