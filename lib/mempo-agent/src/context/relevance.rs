//! How much texts have to do with a query: BM25 (k1 = 1.2, b = 0.75) over the steps of one trajectory, a handful of texts.

use std::collections::{BTreeMap, BTreeSet};

const K1: f64 = 1.2;
const B: f64 = 0.75;

/// Lower-cased runs of letters and digits.
pub(super) fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

/// Texts as counts of their words.
pub(super) struct Texts {
    bags: Vec<BTreeMap<String, usize>>,
}

impl Texts {
    pub(super) fn new<'t>(texts: impl Iterator<Item = &'t str>) -> Self {
        let bag = |text| {
            let mut bag = BTreeMap::new();
            words(text).for_each(|word| *bag.entry(word).or_insert(0) += 1);
            bag
        };
        Self { bags: texts.map(bag).collect() }
    }

    /// How rare a word is among the texts: `ln(1 + (n - h + 0.5) / (h + 0.5))` of `h` in `n` texts that hold it.
    fn rarity(&self, word: &str) -> f64 {
        let holding = self.bags.iter().filter(|bag| bag.contains_key(word)).count() as f64;
        (1.0 + (self.bags.len() as f64 - holding + 0.5) / (holding + 0.5)).ln()
    }

    /// The score of every text, higher is better; 0 where no word is shared.
    fn scores(&self, query: &str) -> Vec<f64> {
        let length = |bag: &BTreeMap<String, usize>| bag.values().sum::<usize>() as f64;
        let mean_length = (self.bags.iter().map(length).sum::<f64>() / self.bags.len().max(1) as f64).max(1.0);
        let query: BTreeSet<String> = words(query).collect();
        let score = |bag: &BTreeMap<String, usize>| {
            let norm = K1 * (1.0 - B + B * length(bag) / mean_length);
            let of = |word: &String| {
                let count = bag.get(word).map_or(0.0, |count| *count as f64);
                self.rarity(word) * count * (K1 + 1.0) / (count + norm)
            };
            query.iter().map(of).sum()
        };
        self.bags.iter().map(score).collect()
    }

    /// The `count` texts that have most to do with the query, in their own order; of equals the later. Texts that share no
    /// word with it are left out.
    pub(super) fn best(&self, query: &str, count: usize) -> Vec<usize> {
        let scores = self.scores(query);
        let mut places: Vec<usize> = (0..scores.len()).filter(|place| scores[*place] > 0.0).collect();
        places.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
        places.truncate(count);
        places.sort_unstable();
        places
    }

    /// The `count` words of a text, of four letters and more, that tell it best from the others: most frequent times rarest,
    /// then by the alphabet.
    pub(super) fn keywords(&self, place: usize, count: usize) -> Vec<String> {
        let words = self.bags[place].iter().filter(|(word, _)| word.chars().count() > 3);
        let mut weighed: Vec<(f64, &String)> = words.map(|(word, n)| (*n as f64 * self.rarity(word), word)).collect();
        weighed.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        weighed.into_iter().take(count).map(|(_, word)| word.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_share_rare_words_with_the_query() {
        let texts = ["the capital of Peru is Lima", "the sea of the sea", "Peru: a llama", "the capital"];
        let texts = Texts::new(texts.into_iter());
        assert_eq!(texts.best("Peru's capital?", 1), [0]);
        assert_eq!(texts.best("Peru", 9), [0, 2]);
        assert_eq!(texts.best("PERU the", 9), [0, 1, 2, 3]);
        assert!(texts.best("nothing", 9).is_empty() && texts.best("", 9).is_empty() && texts.best("sea", 0).is_empty());
        assert_eq!(texts.keywords(0, 2), ["lima", "capital"]);
        // From the formula by hand: 4 texts of 6, 5, 3 and 2 words; `peru` is in two of them.
        let rarity = (1.0_f64 + 2.5 / 2.5).ln();
        let expected = rarity * 2.2 / (1.0 + 1.2 * (0.25 + 0.75 * 3.0 / 4.0));
        assert!((texts.scores("peru")[2] - expected).abs() < 1e-12);
    }

    #[test]
    fn of_equals_the_later_is_better() {
        let texts = Texts::new(["red fish", "red fish", "red fish"].into_iter());
        assert_eq!(texts.best("red", 2), [1, 2]);
        assert!(Texts::new(std::iter::empty()).best("red", 2).is_empty());
    }
}
