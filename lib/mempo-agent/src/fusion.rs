//! Several rankings of documents made one.

use std::collections::HashMap;

use crate::Hit;

/// The constant of Cormack, Clarke & Büttcher 2009: the larger, the less the first ranks count for themselves.
const K: f32 = 60.0;

/// Reciprocal rank fusion: the `top_k` documents with the largest sums of 1 / (60 + rank) over the rankings that have them, ranks
/// from 1. Equal sums come in the order in which the rankings, one after the other, first name them.
pub fn reciprocal_rank_fusion(rankings: Vec<Vec<Hit>>, top_k: usize) -> Vec<Hit> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut fused: Vec<Hit> = Vec::new();
    for ranking in rankings {
        for (rank, hit) in ranking.into_iter().enumerate() {
            let score = 1.0 / (K + (rank + 1) as f32);
            let place = *places.entry(hit.document.doc_id.clone()).or_insert(fused.len());
            match fused.get_mut(place) {
                Some(known) => known.score += score,
                None => fused.push(Hit { score, ..hit }),
            }
        }
    }
    // The sort is stable.
    fused.sort_by(|a, b| b.score.total_cmp(&a.score));
    fused.truncate(top_k);
    fused
}

#[cfg(test)]
mod tests {
    use mempo_data::Document;

    use super::*;

    #[test]
    fn sums_of_reciprocal_ranks_decide_and_then_who_was_named_first() {
        let ranking = |ids: &str| -> Vec<Hit> {
            let hit = |id: char| {
                let document = Document { doc_id: id.to_string(), title: String::new(), text: format!("text {id}") };
                Hit { document, score: 7.0 }
            };
            ids.chars().map(hit).collect()
        };
        let fused = reciprocal_rank_fusion(vec![ranking("abcd"), ranking("efca")], 10);
        let found: String = fused.iter().map(|hit| hit.document.doc_id.as_str()).collect();
        // a: 1/61 + 1/64, c: 2/63, e: 1/61, b and f: 1/62, d: 1/64.
        assert_eq!(found, "acebfd");
        for (hit, expected) in fused.iter().zip([0.032_018_44, 0.031_746_03, 0.016_393_44, 0.016_129_03]) {
            assert!((hit.score - expected).abs() < 1e-7, "{hit:?}");
        }
        assert_eq!(fused[1].document.text, "text c");
        assert_eq!(reciprocal_rank_fusion(vec![ranking("abcd"), ranking("efca")], 2).len(), 2);
        assert!(reciprocal_rank_fusion(vec![], 2).is_empty());
    }
}
