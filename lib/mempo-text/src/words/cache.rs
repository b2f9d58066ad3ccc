//! Ids of words that were encoded lately.

use std::sync::{Mutex, PoisonError};

/// Longest word that is kept, in bytes, and the most ids: with both lengths, 48 bytes a word.
const WORD_BYTES: usize = 22;
const WORD_IDS: usize = 6;
/// Words of a cache (1.5 MiB).
const WORDS: usize = 1 << 15;

#[derive(Clone, Copy)]
struct Word {
    bytes: [u8; WORD_BYTES],
    /// 0: nothing is kept here.
    length: u8,
    count: u8,
    ids: [i32; WORD_IDS],
}

/// Each word has one place, by its hash, and is kept until another comes there: neither memory nor time depends on what the
/// words are.
pub(super) struct WordCache {
    words: Vec<Word>,
}

impl WordCache {
    fn new() -> Self {
        let nothing = Word { bytes: [0; WORD_BYTES], length: 0, count: 0, ids: [0; WORD_IDS] };
        Self { words: vec![nothing; WORDS] }
    }

    /// Appends the ids of a word that has no fewer than one byte; those of an unknown one are what `encode` appends.
    pub(super) fn ids<E>(
        &mut self,
        word: &[u8],
        ids: &mut Vec<i32>,
        encode: impl FnOnce(&mut Vec<i32>) -> Result<(), E>,
    ) -> Result<(), E> {
        if word.len() > WORD_BYTES {
            return encode(ids);
        }
        let mut bytes = [0; WORD_BYTES];
        bytes[..word.len()].copy_from_slice(word);
        let place = &mut self.words[hash(&bytes) as usize % WORDS];
        if usize::from(place.length) == word.len() && place.bytes == bytes {
            ids.extend_from_slice(&place.ids[..usize::from(place.count)]);
            return Ok(());
        }
        let start = ids.len();
        encode(ids)?;
        let found = &ids[start..];
        if found.len() <= WORD_IDS {
            (place.bytes, place.length, place.count) = (bytes, word.len() as u8, found.len() as u8);
            place.ids[..found.len()].copy_from_slice(found);
        }
        Ok(())
    }
}

/// Multiplied and folded, eight bytes at a time.
fn hash(bytes: &[u8; WORD_BYTES]) -> u64 {
    let mut hash = 0_u64;
    for eight in bytes.chunks(8) {
        let mut padded = [0; 8];
        padded[..eight.len()].copy_from_slice(eight);
        hash = (hash ^ u64::from_le_bytes(padded)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    hash
}

/// As many caches as there were ever threads that encoded side by side.
#[derive(Default)]
pub(super) struct Pool {
    free: Mutex<Vec<WordCache>>,
}

impl Pool {
    /// Does something with a cache that nobody else uses meanwhile.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut WordCache) -> T) -> T {
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = free().pop();
        let mut cache = taken.unwrap_or_else(WordCache::new);
        let result = work(&mut cache);
        free().push(cache);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids that tell the word, as many as it has bytes.
    fn told(word: &[u8]) -> impl Iterator<Item = i32> {
        word.iter().map(|byte| i32::from(*byte))
    }

    /// Asks for the ids of a word; says whether they had to be made.
    fn ask(cache: &mut WordCache, word: &[u8], ids: &mut Vec<i32>) -> bool {
        let mut made = false;
        let encode = |ids: &mut Vec<i32>| -> Result<(), ()> {
            made = true;
            ids.extend(told(word));
            Ok(())
        };
        cache.ids(word, ids, encode).unwrap();
        made
    }

    /// Four times as many words as places, of lengths on both sides of the limits, each asked for twice in a row.
    #[test]
    fn words_have_their_own_ids_whatever_was_kept_before() {
        let mut cache = WordCache::new();
        let mut kept = 0;
        for number in 0..4 * WORDS as u64 {
            let digits = number.to_be_bytes().repeat(4);
            let word = &digits[7 - number as usize % 6..][..=number as usize % 23];
            for _ in 0..2 {
                let mut ids = vec![-1];
                kept += usize::from(!ask(&mut cache, word, &mut ids));
                assert!(ids.iter().copied().eq(std::iter::once(-1).chain(told(word))), "{word:?} {ids:?}");
            }
        }
        assert!(kept > WORDS / 2, "{kept}");
    }

    #[test]
    fn what_cannot_be_encoded_is_not_kept() {
        let mut cache = WordCache::new();
        let mut ids = Vec::new();
        assert_eq!(cache.ids(b"a", &mut ids, |_| Err("no")), Err("no"));
        assert!(ask(&mut cache, b"a", &mut ids));
        // A word that ends in zeros is another than the one without.
        assert!(ask(&mut cache, b"a\0", &mut ids));
        assert_eq!(ids, [97, 97, 0]);
    }

    #[test]
    fn caches_are_handed_on() {
        let pool = Pool::default();
        let mut ids = Vec::new();
        assert!(pool.with(|cache| ask(cache, b"a", &mut ids)));
        assert!(!pool.with(|cache| ask(cache, b"a", &mut ids)));
        assert_eq!(ids, [97, 97]);
        pool.with(|_| pool.with(|_| ()));
        assert_eq!(pool.free.lock().unwrap().len(), 2);
    }
}
