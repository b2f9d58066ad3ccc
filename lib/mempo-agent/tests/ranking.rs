//! The index's best documents are those of BM25 computed over every document, from its formula.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use mempo_agent::{Bm25Options, SearchIndex};
use mempo_data::{Document, Task, read_rows};

/// Scores further apart than this are not mixed up; the index adds in single precision.
const TOLERANCE: f64 = 1e-4;

/// Every word of every document, counted.
struct Reference {
    /// Documents that hold a word, and how often.
    postings: HashMap<String, Vec<(usize, f64)>>,
    /// Lengths as the index keeps them.
    lengths: Vec<f64>,
    mean_length: f64,
    options: Bm25Options,
}

fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// A length in one byte: exact to 24, then with the four highest bits of the rest.
fn stored_length(length: usize) -> usize {
    let rest = length.saturating_sub(24);
    let shift = (usize::BITS - rest.leading_zeros()).saturating_sub(4);
    length.min(24) + ((rest >> shift) << shift)
}

impl Reference {
    fn new(documents: &[Document]) -> Self {
        let mut postings: HashMap<String, Vec<(usize, f64)>> = HashMap::new();
        let (mut lengths, mut total) = (Vec::new(), 0);
        for (place, document) in documents.iter().enumerate() {
            let words = words(&format!("{} {}", document.title, document.text));
            lengths.push(stored_length(words.len()) as f64);
            total += words.len();
            for word in words {
                let holding = postings.entry(word).or_default();
                match holding.last_mut() {
                    Some((last, count)) if *last == place => *count += 1.0,
                    _ => holding.push((place, 1.0)),
                }
            }
        }
        Self { postings, lengths, mean_length: total as f64 / documents.len() as f64, options: Bm25Options::default() }
    }

    /// The score of every document: the sum over the query's distinct words.
    fn scores(&self, query: &str) -> Vec<f64> {
        let (k1, b) = (f64::from(self.options.bm25_k1), f64::from(self.options.bm25_b));
        let mut scores = vec![0.0; self.lengths.len()];
        let mut words = words(query);
        words.sort();
        words.dedup();
        for holding in words.iter().filter_map(|word| self.postings.get(word)) {
            let (all, with) = (self.lengths.len() as f64, holding.len() as f64);
            let idf = (1.0 + (all - with + 0.5) / (with + 0.5)).ln();
            for &(place, count) in holding {
                let norm = k1 * (1.0 - b + b * self.lengths[place] / self.mean_length);
                scores[place] += idf * (k1 + 1.0) * count / (count + norm);
            }
        }
        scores
    }
}

/// Holds the index to the reference: the same scores from the best on, each of the document that has it.
fn check(index: &SearchIndex, reference: &Reference, places: &HashMap<&str, usize>, query: &str, top_k: usize) {
    let hits = index.search(query, top_k).unwrap();
    let scores = reference.scores(query);
    let mut best: Vec<(usize, f64)> = scores.iter().copied().enumerate().filter(|(_, score)| *score > 0.0).collect();
    best.sort_by(|(one, a), (other, b)| b.total_cmp(a).then(one.cmp(other)));
    best.truncate(top_k);
    assert_eq!(hits.len(), best.len(), "{query}");
    for (hit, (place, expected)) in hits.iter().zip(&best) {
        let found = places[hit.document.doc_id.as_str()];
        assert!((f64::from(hit.score) - expected).abs() < TOLERANCE * expected, "{query}: {} {expected}", hit.score);
        assert!((scores[found] - expected).abs() < TOLERANCE * expected, "{query}: {found} for {place}");
    }
    // Of equal ones the first.
    for pair in hits.windows(2).filter(|pair| pair[0].score.to_bits() == pair[1].score.to_bits()) {
        assert!(places[pair[0].document.doc_id.as_str()] < places[pair[1].document.doc_id.as_str()], "{query}");
    }
}

/// The library's constants, those of Search-R1, and the ends of what they may be.
fn all_options() -> impl Iterator<Item = Bm25Options> {
    let constants = [(1.2, 0.75), (0.9, 0.4), (0.0, 0.0), (2.0, 1.0)];
    constants.into_iter().map(|(bm25_k1, bm25_b)| Bm25Options { bm25_k1, bm25_b })
}

fn places(documents: &[Document]) -> HashMap<&str, usize> {
    documents.iter().enumerate().map(|(place, document)| (document.doc_id.as_str(), place)).collect()
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    /// Few words often, most words seldom.
    fn word(&mut self) -> String {
        let bound = 1 + self.below(3000);
        let number = self.below(bound);
        format!("{}{number}", ["w", "Été", "x"][number % 3])
    }

    fn text(&mut self, length: usize) -> String {
        let separators = [" ", ", ", ". ", "-", "\n"];
        (0..length).map(|_| self.word() + separators[self.below(separators.len())]).collect()
    }
}

#[test]
fn the_best_are_those_of_the_formula_over_all_documents() {
    let mut random = Random(7);
    let documents: Vec<Document> = (0..4000)
        .map(|i| {
            let length = if i % 9 == 0 { 3 } else { random.below(250) };
            let (title, text) = (random.text(2), if i % 50 == 1 { String::new() } else { random.text(length) });
            Document { doc_id: format!("{i:05}"), title, text }
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    SearchIndex::build(documents.clone(), folder.path()).unwrap();
    let (mut reference, places) = (Reference::new(&documents), places(&documents));
    for options in all_options() {
        reference.options = options;
        let index = SearchIndex::open(folder.path(), options).unwrap();
        for i in 0..150 {
            let length = 1 + random.below(12);
            let query = random.text(length) + if i % 5 == 0 { "unheard of?" } else { "" };
            check(&index, &reference, &places, &query, [1, 3, 20][i % 3]);
        }
    }
}

/// The parts of a table in a stage's directory.
fn parts(table: &Path) -> Vec<PathBuf> {
    let entries = fs_err::read_dir(table).into_iter().flatten();
    let mut parts: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    parts.sort();
    parts
}

/// On documents and tasks of one's own: the folders in `MEMPO_TEST_SEARCH`, an index and tasks, with colons between them.
#[test]
#[allow(clippy::print_stderr, reason = "a skipped check must be seen")]
fn the_best_are_those_of_the_formula_on_real_questions() {
    let Ok(folders) = std::env::var("MEMPO_TEST_SEARCH") else {
        eprintln!(
            "SKIPPED on real questions: `./just ranking` makes the demo's index and tasks and runs this test again"
        );
        return;
    };
    let mut folders = folders.split(':').map(Path::new);
    let dir = folders.next().unwrap();
    let documents: Vec<Document> = read_rows(&parts(&dir.join("corpus"))).unwrap().map(Result::unwrap).collect();
    let index = SearchIndex::open(&dir.join("index"), Bm25Options::default()).unwrap();
    let (reference, places) = (Reference::new(&documents), places(&documents));
    let mut queries = 0;
    for folder in folders {
        for task in read_rows::<Task>(&parts(&folder.join("tasks"))).unwrap() {
            let task = task.unwrap();
            let questions = task.objectives.iter().map(|objective| &objective.question);
            for query in questions.chain([&task.question]) {
                check(&index, &reference, &places, query, 10);
                queries += 1;
            }
        }
    }
    assert!(queries > 0 && !documents.is_empty());
}
