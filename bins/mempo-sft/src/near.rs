//! Near duplicates: texts that share most of their word sequences, found without comparing all with all.
//!
//! Two texts are as similar as the sets of their sequences of [`SHINGLE_WORDS`] words: shared ones over all of them
//! (Jaccard). A [`Sketch`] keeps, for each of 120 random orders of all sequences, the text's first one: two texts agree in
//! an order with just that probability (Broder 1997). Texts that agree in all of six orders, for one of 20 such bands, are
//! compared, by how many orders they agree in: at a similarity of 0.8 those are 99.8 of 100 pairs. The standard error of what
//! is estimated so is at most 0.046. Nothing depends on anything but the texts and their order.

use std::collections::HashMap;

/// Words of a sequence.
const SHINGLE_WORDS: usize = 5;
const BANDS: usize = 20;
const BAND_ORDERS: usize = 6;
const ORDERS: usize = BANDS * BAND_ORDERS;
/// Texts of a band that are compared, the newest: many rows of one template, not quite near, must not be compared with
/// all before them.
const MOST_COMPARED: usize = 256;
/// No text.
const NONE: u32 = u32::MAX;

/// What is kept of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sketch {
    bands: [u64; BANDS],
    /// The low bits of each order's first sequence: by chance equal once in 65,536.
    firsts: [u16; ORDERS],
}

impl Sketch {
    /// Of a text; none where it holds no words.
    pub(crate) fn of(text: &str) -> Option<Self> {
        let words = word_hashes(text);
        if words.is_empty() {
            return None;
        }
        let mut firsts = [u32::MAX; ORDERS];
        for shingle in words.windows(SHINGLE_WORDS.min(words.len())) {
            let shingle = shingle.iter().fold(0, |hash, word| mix(hash ^ word));
            for (order, first) in (0..).zip(&mut firsts) {
                *first = (*first).min(place(order, shingle));
            }
        }
        let mut bands = [0; BANDS];
        for (index, (band, firsts)) in (0..).zip(bands.iter_mut().zip(firsts.chunks(BAND_ORDERS))) {
            *band = firsts.iter().fold(index, |hash, first| mix(hash ^ u64::from(*first)));
        }
        Some(Self { bands, firsts: firsts.map(|first| first as u16) })
    }

    /// The estimated share of common sequences.
    fn similarity(&self, firsts: &[u16; ORDERS]) -> f64 {
        let same = self.firsts.iter().zip(firsts).filter(|(mine, other)| mine == other).count();
        same as f64 / ORDERS as f64
    }
}

/// The texts so far, up to 1.1 KB each.
#[derive(Default)]
pub(crate) struct NearIndex {
    texts: Vec<Indexed>,
    /// The newest text of each band.
    newest: HashMap<u64, u32>,
}

struct Indexed {
    row: u64,
    firsts: [u16; ORDERS],
    /// For each band the text before this one that has it, too.
    before: [u32; BANDS],
}

impl NearIndex {
    /// Texts so far.
    pub(crate) fn len(&self) -> usize {
        self.texts.len()
    }

    /// The row of the most similar text, the earliest of equals, if it is at least so similar.
    pub(crate) fn find(&self, sketch: &Sketch, least: f64) -> Option<(u64, f64)> {
        let mut best: Option<(f64, u32)> = None;
        for (index, band) in sketch.bands.iter().enumerate() {
            let mut at = self.newest.get(band).copied().unwrap_or(NONE);
            for _ in 0..MOST_COMPARED {
                if at == NONE {
                    break;
                }
                let text = &self.texts[at as usize];
                let similarity = sketch.similarity(&text.firsts);
                let better = |(most, of): (f64, u32)| similarity.total_cmp(&most).then(of.cmp(&at)).is_gt();
                if similarity >= least && best.is_none_or(better) {
                    best = Some((similarity, at));
                }
                at = text.before[index];
            }
        }
        best.map(|(similarity, at)| (self.texts[at as usize].row, similarity))
    }

    /// Adds the text of a row.
    pub(crate) fn insert(&mut self, row: u64, sketch: &Sketch) {
        let at = self.texts.len() as u32;
        let before = sketch.bands.map(|band| self.newest.insert(band, at).unwrap_or(NONE));
        self.texts.push(Indexed { row, firsts: sketch.firsts, before });
    }
}

/// Hashes of a text's words, in lower case: runs of letters and digits, and each ideograph or kana by itself.
fn word_hashes(text: &str) -> Vec<u64> {
    const START: u64 = 0xcbf2_9ce4_8422_2325;
    let (mut words, mut word) = (Vec::new(), START);
    let mut close = |word: &mut u64| {
        if *word != START {
            words.push(mix(*word));
            *word = START;
        }
    };
    for letter in text.chars() {
        if !letter.is_alphanumeric() || is_ideograph(letter) {
            close(&mut word);
        }
        if letter.is_alphanumeric() {
            for letter in letter.to_lowercase() {
                word = (word ^ u64::from(letter)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        if is_ideograph(letter) {
            close(&mut word);
        }
    }
    close(&mut word);
    words
}

/// Written without spaces between words.
fn is_ideograph(letter: char) -> bool {
    matches!(letter, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

/// Where a sequence stands in one of the orders: multiply and shift, by constants drawn from the order's number.
fn place(order: u64, shingle: u64) -> u32 {
    let (factor, offset) = FACTORS[order as usize];
    (shingle.wrapping_mul(factor).wrapping_add(offset) >> 32) as u32
}

static FACTORS: [(u64, u64); ORDERS] = factors();

const fn factors() -> [(u64, u64); ORDERS] {
    let mut factors = [(0, 0); ORDERS];
    let mut order = 0;
    while order < ORDERS {
        factors[order] = (mix(2 * order as u64 + 1) | 1, mix(2 * order as u64 + 2));
        order += 1;
    }
    factors
}

/// The finaliser of SplitMix64 (Steele et al. 2014).
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The similarity by its definition.
    fn jaccard(left: &str, right: &str) -> f64 {
        let shingles = |text: &str| -> BTreeSet<Vec<String>> {
            let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
            words.windows(SHINGLE_WORDS.min(words.len())).map(<[String]>::to_vec).collect()
        };
        let (left, right) = (shingles(left), shingles(right));
        left.intersection(&right).count() as f64 / left.union(&right).count() as f64
    }

    /// A text of `words` words, every `period`-th of them another than in the text of the same `seed`.
    fn text(seed: u64, words: u64, period: u64) -> String {
        let word = |at: u64| {
            let changed = if period > 0 && at % period == period - 1 { 1 << 40 } else { 0 };
            format!("w{}", mix((seed << 20) + at + changed) % 50_000)
        };
        (0..words).map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn estimates_are_near_the_definition() {
        let mut worst: f64 = 0.0;
        for seed in 0..40 {
            let whole = text(seed, 300, 0);
            for period in [0, 7, 11, 20, 40, 80, 160] {
                let other = text(seed, 300, period);
                let estimate = Sketch::of(&whole).unwrap().similarity(&Sketch::of(&other).unwrap().firsts);
                worst = worst.max((estimate - jaccard(&whole, &other)).abs());
            }
            assert!(
                Sketch::of(&whole).unwrap().similarity(&Sketch::of(&text(seed + 100, 300, 0)).unwrap().firsts) < 0.05
            );
        }
        assert!(worst < 0.16, "{worst}, three and a half standard errors");
    }

    /// Beside brute force over all pairs of 300 texts, in families of ten.
    #[test]
    fn what_is_found_is_what_all_pairs_show() {
        let texts: Vec<String> = (0..300)
            .map(|row| text(row / 10, 200, [0, 9, 15, 24, 33, 45, 60, 80, 120, 0][row as usize % 10]))
            .collect();
        let mut index = NearIndex::default();
        let (mut found_near, mut missed) = (0, 0);
        for (row, text) in texts.iter().enumerate() {
            let sketch = Sketch::of(text).unwrap();
            let found = index.find(&sketch, 0.8);
            let most = texts[..row].iter().map(|other| jaccard(text, other)).fold(0.0, f64::max);
            if let Some((other, similarity)) = found {
                found_near += 1;
                let truth = jaccard(text, &texts[other as usize]);
                assert!(truth > 0.65 && (similarity - truth).abs() < 0.16, "{row} and {other}: {truth}");
            }
            missed += usize::from(found.is_none() && most > 0.9);
            index.insert(row as u64, &sketch);
        }
        assert!(found_near > 100, "{found_near}");
        assert_eq!(missed, 0);
        assert_eq!(index.len(), 300);
    }

    #[test]
    fn equal_words_are_equal_texts_and_the_earliest_is_named() {
        let sketch = |text: &str| Sketch::of(text).unwrap();
        assert_eq!(sketch("The <b>Capital</b>, is: Szohôd!"), sketch("the b capital b is SZOHÔD"));
        assert_ne!(sketch("one two three four five six"), sketch("one two three four six five"));
        assert_ne!(sketch("東京は日本の首都"), sketch("東京は日本の京都"));
        assert_eq!(Sketch::of(" <>…! "), None);
        let mut index = NearIndex::default();
        assert_eq!(index.find(&sketch("a b"), 0.5), None);
        index.insert(7, &sketch("a b"));
        index.insert(9, &sketch("a b"));
        assert_eq!(index.find(&sketch("A. B."), 1.0), Some((7, 1.0)));
        assert_eq!(index.find(&sketch("a c"), 0.5), None);
    }
}
