//! BM25's constants, and scores by other ones than the library has.

use clap::Args;
use serde::Serialize;
use tantivy::collector::TopNComputer;
use tantivy::collector::sort_key::NaturalComparator;
use tantivy::postings::Postings;
use tantivy::query::Bm25StatisticsProvider;
use tantivy::schema::{Field, IndexRecordOption};
use tantivy::{DocAddress, DocSet, Score, Searcher, SegmentReader, TERMINATED, Term};

/// The constants of BM25 (Robertson and Zaragoza 2009, equation 3.15): a word that a document of `length` words holds `f`
/// times adds `idf * f * (k1 + 1) / (f + k1 * (1 - b + b * length / mean length))`.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize)]
pub struct Bm25Options {
    /// BM25: how much a word's further occurrences still count; 0: not at all (Pyserini and Search-R1 have 0.9)
    #[arg(long, value_name = "K1", default_value_t = Self::default().bm25_k1, value_parser = k1)]
    pub bm25_k1: f32,
    /// BM25: how much long documents are held back, from 0 to 1 (Pyserini and Search-R1 have 0.4)
    #[arg(long, value_name = "B", default_value_t = Self::default().bm25_b, value_parser = b)]
    pub bm25_b: f32,
}

/// The search library's own, with which it need not look at every document.
impl Default for Bm25Options {
    fn default() -> Self {
        Self { bm25_k1: 1.2, bm25_b: 0.75 }
    }
}

fn k1(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("must be a number from 0".to_owned()),
    }
}

fn b(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("must be a number from 0 to 1".to_owned()),
    }
}

/// The best documents for the words of a query, best first, equal ones in their order: every document that holds one is
/// scored.
pub(crate) fn best(
    searcher: &Searcher,
    field: Field,
    terms: &[Term],
    options: Bm25Options,
    top_k: usize,
) -> tantivy::Result<Vec<(Score, DocAddress)>> {
    let documents = searcher.total_num_docs()? as Score;
    let mean_length = searcher.total_num_tokens(field)? as Score / documents;
    let mut weighted = Vec::with_capacity(terms.len());
    for term in terms {
        let holding = searcher.doc_freq(term)? as Score;
        let idf = (1.0 + (documents - holding + 0.5) / (holding + 0.5)).ln();
        weighted.push((term, idf * (options.bm25_k1 + 1.0)));
    }
    let mut best = TopNComputer::new_with_comparator(top_k, NaturalComparator);
    for (ordinal, segment) in searcher.segment_readers().iter().enumerate() {
        for (document, score) in scores(segment, field, &weighted, options, mean_length)?.into_iter().enumerate() {
            if score > 0.0 {
                best.push(score, DocAddress::new(ordinal as u32, document as u32));
            }
        }
    }
    Ok(best.into_sorted_vec().into_iter().map(|found| (found.sort_key, found.doc)).collect())
}

/// The score of every document of a segment.
fn scores(
    segment: &SegmentReader,
    field: Field,
    weighted: &[(&Term, Score)],
    Bm25Options { bm25_k1: k1, bm25_b: b }: Bm25Options,
    mean_length: Score,
) -> tantivy::Result<Vec<Score>> {
    let mut scores = vec![0.0; segment.max_doc() as usize];
    let (words, lengths) = (segment.inverted_index(field)?, segment.get_fieldnorms_reader(field)?);
    for (term, weight) in weighted {
        let Some(mut postings) = words.read_postings(term, IndexRecordOption::WithFreqs)? else { continue };
        while postings.doc() != TERMINATED {
            let (document, frequency) = (postings.doc(), postings.term_freq() as Score);
            let length = lengths.fieldnorm(document) as Score;
            scores[document as usize] += weight * frequency / (frequency + k1 * (1.0 - b + b * length / mean_length));
            postings.advance();
        }
    }
    Ok(scores)
}
