//! BM25 search over title and text, lower-cased words, any language.
//!
//! A ranking is a function of the documents and their order alone: one segment, equal scores by insertion order.
//! Queries are plain text: there is no query language, so no character means anything in one.

use std::path::{Path, PathBuf};

use mempo_data::Document;
use tantivy::collector::TopDocs;
use tantivy::directory::MmapDirectory;
use tantivy::directory::error::{LockError, OpenDirectoryError, OpenReadError, OpenWriteError};
use tantivy::index::SegmentId;
use tantivy::indexer::NoMergePolicy;
use tantivy::query::{BooleanQuery, Query, TermQuery};
use tantivy::schema::{FAST, Field, IndexRecordOption, STORED, Schema, TextFieldIndexing, TextOptions, Value};
use tantivy::tokenizer::{LowerCaser, SimpleTokenizer, TextAnalyzer};
use tantivy::{
    DocAddress, Index, IndexReader, IndexWriter, ReloadPolicy, Score, Searcher, TantivyDocument, TantivyError, Term,
};

use crate::Error;
use crate::bm25::{Bm25Options, best};
use crate::read_only::ReadOnly;

/// Memory of the index writer in bytes; what does not fit becomes a segment of its own until the final merge.
const WRITER_BYTES: usize = 256 << 20;
const ANALYZER: &str = "words";

/// A document found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hit {
    /// The document.
    pub document: Document,
    /// Its BM25 score, natural units, higher is better.
    pub score: f32,
}

/// A BM25 index in a folder of its own.
pub struct SearchIndex {
    path: PathBuf,
    reader: IndexReader,
    fields: Fields,
    options: Bm25Options,
}

#[derive(Clone, Copy)]
struct Fields {
    doc_id: Field,
    title: Field,
    text: Field,
    /// Title and text together: what is searched.
    contents: Field,
    /// Place in the order of insertion.
    position: Field,
}

fn schema() -> (Schema, Fields) {
    let mut builder = Schema::builder();
    let indexing = TextFieldIndexing::default().set_tokenizer(ANALYZER).set_index_option(IndexRecordOption::WithFreqs);
    let fields = Fields {
        doc_id: builder.add_text_field("doc_id", STORED),
        title: builder.add_text_field("title", STORED),
        text: builder.add_text_field("text", STORED),
        contents: builder.add_text_field("contents", TextOptions::default().set_indexing_options(indexing)),
        position: builder.add_u64_field("position", FAST),
    };
    (builder.build(), fields)
}

fn analyzer() -> TextAnalyzer {
    TextAnalyzer::builder(SimpleTokenizer::default()).filter(LowerCaser).build()
}

/// The library's error, or the system's that it wraps.
fn index_error(path: &Path, source: TantivyError) -> Error {
    let path = path.to_owned();
    let (TantivyError::IoError(wrapped)
    | TantivyError::LockFailure(LockError::IoError(wrapped), _)
    | TantivyError::OpenDirectoryError(OpenDirectoryError::IoError { io_error: wrapped, .. })
    | TantivyError::OpenReadError(OpenReadError::IoError { io_error: wrapped, .. })
    | TantivyError::OpenWriteError(OpenWriteError::IoError { io_error: wrapped, .. })) = &source
    else {
        return Error::Index { path, source };
    };
    let code = wrapped.raw_os_error().map(std::io::Error::from_raw_os_error);
    Error::IndexFile { path, source: code.unwrap_or_else(|| std::io::Error::new(wrapped.kind(), wrapped.to_string())) }
}

impl SearchIndex {
    /// Writes an index of `documents` into the empty folder `dir`; returns how many there were.
    pub fn build(documents: impl IntoIterator<Item = Document>, dir: &Path) -> Result<u64, Error> {
        Self::try_build(documents.into_iter().map(Ok), dir)
    }

    /// The same of documents that may fail to come, such as those of a table that is being read; the first error ends it.
    ///
    /// Memory holds the writer's buffer of 256 MiB, and at the end, when what did not fit is merged, some 20 bytes a document.
    pub fn try_build<E: From<Error>>(
        documents: impl IntoIterator<Item = Result<Document, E>>,
        dir: &Path,
    ) -> Result<u64, E> {
        build(documents, dir, WRITER_BYTES)
    }

    /// Opens the index in `dir`, which is never written to.
    pub fn open(dir: &Path, options: Bm25Options) -> Result<Self, Error> {
        let at_dir = |source| index_error(dir, source);
        let directory = MmapDirectory::open(dir).map_err(|error| at_dir(error.into()))?;
        let index = Index::open(ReadOnly(directory)).map_err(at_dir)?;
        let (schema, fields) = schema();
        if index.schema() != schema {
            let found = "built by another version; build it again with `mempo-rollout index`";
            return Err(at_dir(TantivyError::SchemaError(found.to_owned())));
        }
        let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into().map_err(at_dir)?;
        Ok(Self { path: dir.to_owned(), reader, fields, options })
    }

    /// How many documents are searched.
    #[allow(clippy::len_without_is_empty, reason = "an index is made of documents")]
    pub fn len(&self) -> u64 {
        self.reader.searcher().num_docs()
    }

    /// The `top_k` best documents for the words of `query`, best first; documents without any of them are never found.
    pub fn search(&self, query: &str, top_k: usize) -> Result<Vec<Hit>, Error> {
        let terms = self.terms(query);
        if terms.is_empty() || top_k == 0 {
            return Ok(Vec::new());
        }
        let at_path = |source| index_error(&self.path, source);
        let searcher = self.reader.searcher();
        let found = if self.options == Bm25Options::default() {
            pruned(&searcher, terms, top_k)
        } else {
            best(&searcher, self.fields.contents, &terms, self.options, top_k)
        };
        let hits = found.map_err(at_path)?.into_iter().map(|(score, address)| {
            let document = self.document(&searcher.doc(address).map_err(at_path)?)?;
            Ok(Hit { document, score })
        });
        hits.collect()
    }

    /// The document at a place in the order of insertion, from 0.
    pub fn document_at(&self, position: usize) -> Result<Document, Error> {
        // One segment whose document numbers are positions.
        let address = DocAddress::new(0, u32::try_from(position).unwrap_or(u32::MAX));
        let stored = self.reader.searcher().doc(address).map_err(|source| index_error(&self.path, source))?;
        self.document(&stored)
    }

    /// The distinct words, in their order.
    fn terms(&self, query: &str) -> Vec<Term> {
        let mut analyzer = analyzer();
        let mut stream = analyzer.token_stream(query);
        let mut terms: Vec<Term> = Vec::new();
        while let Some(token) = stream.next() {
            let term = Term::from_field_text(self.fields.contents, &token.text);
            if !terms.contains(&term) {
                terms.push(term);
            }
        }
        terms
    }

    fn document(&self, stored: &TantivyDocument) -> Result<Document, Error> {
        let text = |field: Field, name: &'static str| {
            let value = stored.get_first(field).and_then(|value| value.as_str());
            value.map(str::to_owned).ok_or_else(|| Error::Document { path: self.path.clone(), field: name })
        };
        Ok(Document {
            doc_id: text(self.fields.doc_id, "doc_id")?,
            title: text(self.fields.title, "title")?,
            text: text(self.fields.text, "text")?,
        })
    }
}

/// The best documents by the library's constants, without a look at those that cannot be among them.
fn pruned(searcher: &Searcher, terms: Vec<Term>, top_k: usize) -> tantivy::Result<Vec<(Score, DocAddress)>> {
    let clause = |term| -> Box<dyn Query> { Box::new(TermQuery::new(term, IndexRecordOption::WithFreqs)) };
    let any = BooleanQuery::union(terms.into_iter().map(clause).collect());
    searcher.search(&any, &TopDocs::with_limit(top_k).order_by_score())
}

fn build<E: From<Error>>(
    documents: impl IntoIterator<Item = Result<Document, E>>,
    dir: &Path,
    writer_bytes: usize,
) -> Result<u64, E> {
    // Building reads nothing: what fails is the disk, though threads of the library tell it in words alone.
    let at_dir = |source| match index_error(dir, source) {
        Error::Index { path, source } => Error::IndexFile { path, source: std::io::Error::other(source) },
        error => error,
    };
    let mut writer = Writer::create(dir, writer_bytes).map_err(at_dir)?;
    for document in documents {
        writer.add(document?).map_err(at_dir)?;
    }
    Ok(writer.finish().map_err(at_dir)?)
}

/// An index on its way into a folder.
struct Writer {
    index: Index,
    segments: IndexWriter,
    fields: Fields,
    count: u64,
}

impl Writer {
    fn create(dir: &Path, bytes: usize) -> tantivy::Result<Self> {
        let (schema, fields) = schema();
        let index = Index::create_in_dir(dir, schema)?;
        index.tokenizers().register(ANALYZER, analyzer());
        let segments: IndexWriter = index.writer_with_num_threads(1, bytes)?;
        segments.set_merge_policy(Box::new(NoMergePolicy));
        Ok(Self { index, segments, fields, count: 0 })
    }

    fn add(&mut self, document: Document) -> tantivy::Result<()> {
        let mut row = TantivyDocument::default();
        row.add_text(self.fields.contents, format!("{} {}", document.title, document.text));
        row.add_text(self.fields.doc_id, document.doc_id);
        row.add_text(self.fields.title, document.title);
        row.add_text(self.fields.text, document.text);
        row.add_u64(self.fields.position, self.count);
        self.segments.add_document(row)?;
        self.count += 1;
        Ok(())
    }

    fn finish(mut self) -> tantivy::Result<u64> {
        self.segments.commit()?;
        let segments = segments_in_order(&self.index)?;
        if segments.len() > 1 {
            self.segments.merge(&segments).wait()?;
            self.segments.garbage_collect_files().wait()?;
        }
        self.segments.wait_merging_threads()?;
        Ok(self.count)
    }
}

/// The segments by the position of their first document: merged in this order, document numbers are positions.
fn segments_in_order(index: &Index) -> tantivy::Result<Vec<SegmentId>> {
    let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    let searcher = reader.searcher();
    let mut segments = Vec::new();
    for segment in searcher.segment_readers() {
        segments.push((segment.fast_fields().u64("position")?.first(0), segment.segment_id()));
    }
    segments.sort();
    Ok(segments.into_iter().map(|(_, id)| id).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn document(doc_id: &str, title: &str, text: &str) -> Document {
        Document { doc_id: doc_id.to_owned(), title: title.to_owned(), text: text.to_owned() }
    }

    fn index(documents: &[Document]) -> (tempfile::TempDir, SearchIndex) {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(SearchIndex::build(documents.to_vec(), directory.path()).unwrap(), documents.len() as u64);
        let index = open(directory.path());
        (directory, index)
    }

    fn open(dir: &Path) -> SearchIndex {
        SearchIndex::open(dir, Bm25Options::default()).unwrap()
    }

    fn ids(hits: &[Hit]) -> Vec<&str> {
        hits.iter().map(|hit| hit.document.doc_id.as_str()).collect()
    }

    /// BM25 from its formula, over lower-cased alphanumeric words; lengths below 40 are stored exactly by the index.
    fn bm25(documents: &[Document], query: &[&str]) -> Vec<f64> {
        let words = |document: &Document| -> Vec<String> {
            let text = format!("{} {}", document.title, document.text).to_lowercase();
            text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
        };
        let bags: Vec<Vec<String>> = documents.iter().map(words).collect();
        let n = documents.len() as f64;
        let mean_length = bags.iter().map(Vec::len).sum::<usize>() as f64 / n;
        let score = |bag: &Vec<String>| {
            let of_word = |word: &&str| {
                let holding = bags.iter().filter(|bag| bag.iter().any(|other| other == word)).count() as f64;
                let idf = (1.0 + (n - holding + 0.5) / (holding + 0.5)).ln();
                let frequency = bag.iter().filter(|other| other == word).count() as f64;
                let norm = 1.2 * (0.25 + 0.75 * bag.len() as f64 / mean_length);
                idf * frequency * 2.2 / (frequency + norm)
            };
            query.iter().map(of_word).sum()
        };
        bags.iter().map(score).collect()
    }

    #[test]
    fn scores_are_those_of_the_formula() {
        let documents = [
            document("a", "Ghana", "Accra is the capital of Ghana."),
            document("b", "Togo", "The capital is Lomé; the currency is the franc."),
            document("c", "Benin", "Porto-Novo"),
            document("d", "Accra", "A city, a capital and a port, capital of all ports"),
        ];
        let (_directory, index) = index(&documents);
        let expected = bm25(&documents, &["capital", "accra"]);
        let hits = index.search("Capital ACCRA?", 10).unwrap();
        let found: HashMap<&str, f32> = hits.iter().map(|hit| (hit.document.doc_id.as_str(), hit.score)).collect();
        for (document, expected) in documents.iter().zip(expected) {
            match found.get(document.doc_id.as_str()) {
                Some(&score) => assert!((f64::from(score) - expected).abs() < 1e-4, "{document:?}: {score} {expected}"),
                None => assert!(expected < 1e-9, "{document:?}"),
            }
        }
        assert!(hits.is_sorted_by(|a, b| a.score >= b.score));
        assert_eq!(ids(&index.search("lomé", 1).unwrap()), ["b"]);
        assert_eq!(index.search("novo", 1).unwrap()[0].document, documents[2]);
    }

    #[test]
    fn hostile_queries_are_words_and_nothing_else() {
        let (_directory, index) = index(&[document("a", "t", "some words"), document("b", "t", "AND OR title")]);
        for query in ["", "   ", "\"", "((((", "*:*", "title:", "+-!{}[]^~\\/", "\u{0}", "[a TO z]"] {
            let hits = index.search(query, 5).unwrap();
            let words = query.contains("title");
            assert_eq!(ids(&hits), if words { vec!["b"] } else { vec![] }, "{query:?}");
        }
        assert_eq!(ids(&index.search("some\" AND (words", 5).unwrap()), ["a", "b"]);
        assert!(index.search("some", 0).unwrap().is_empty());
        assert!(index.search(&"words ".repeat(10_000), 5).unwrap().len() == 1);
    }

    #[test]
    fn ties_come_in_the_order_of_insertion_over_many_segments() {
        let directory = tempfile::tempdir().unwrap();
        let unique = |i: usize| (0..40).map(|j| format!("w{i}x{j}")).collect::<Vec<_>>().join(" ");
        let documents =
            (0..4_000).map(|i| document(&format!("{i:05}"), "same title", &format!("red fish {}", unique(i))));
        build::<Error>(documents.map(Ok), directory.path(), 15 << 20).unwrap();
        let index = open(directory.path());
        assert_eq!(index.reader.searcher().segment_readers().len(), 1);
        let hits = index.search("the same red fish", 4).unwrap();
        assert_eq!(ids(&hits), ["00000", "00001", "00002", "00003"]);
        assert_eq!(ids(&index.search("w3999x3 title", 2).unwrap()), ["03999", "00000"]);
        for position in [0, 1, 3999] {
            assert_eq!(index.document_at(position).unwrap().doc_id, format!("{position:05}"));
        }
    }

    #[test]
    fn an_index_is_read_without_touching_its_folder() {
        let names = |path: &Path| {
            let mut names: Vec<_> = fs_err::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let directory = tempfile::tempdir().unwrap();
        SearchIndex::build([document("a", "t", "some words")], directory.path()).unwrap();
        for lock in [".tantivy-meta.lock", ".tantivy-writer.lock"] {
            fs_err::remove_file(directory.path().join(lock)).ok();
        }
        let before = names(directory.path());
        assert_eq!(open(directory.path()).search("words", 1).unwrap().len(), 1);
        assert_eq!(names(directory.path()), before);
        assert!(SearchIndex::open(Path::new("/nowhere"), Bm25Options::default()).is_err());
    }
}
