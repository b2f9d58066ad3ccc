//! Unicode's composed form (NFC), by the library, but only of what may have another.

use std::borrow::Cow;

use tokenizers::{NormalizedString, Normalizer, normalizers::NFC};

/// Characters that are composed, and that nothing before them can be composed with or reordered after: letters of the larger
/// scripts, ideographs, punctuation, symbols. (Of combining class 0, and `NFC_Quick_Check=Yes`.) Those below U+0300 are not
/// listed.
const INERT: [(char, char); 27] = [
    ('\u{0370}', '\u{0373}'), // Greek
    ('\u{0388}', '\u{03ff}'),
    ('\u{0400}', '\u{0482}'), // Cyrillic
    ('\u{048a}', '\u{052f}'),
    ('\u{0531}', '\u{058a}'), // Armenian
    ('\u{05d0}', '\u{05ea}'), // Hebrew
    ('\u{0620}', '\u{064a}'), // Arabic
    ('\u{0660}', '\u{066f}'),
    ('\u{0671}', '\u{06d5}'),
    ('\u{0904}', '\u{093b}'), // Devanagari
    ('\u{0e01}', '\u{0e37}'), // Thai
    ('\u{0e40}', '\u{0e47}'),
    ('\u{10a0}', '\u{10ff}'), // Georgian
    ('\u{1e00}', '\u{1eff}'), // Vietnamese
    ('\u{2002}', '\u{20cf}'), // punctuation, currencies
    ('\u{2100}', '\u{2125}'),
    ('\u{212c}', '\u{2328}'), // letter-like symbols, numbers, arrows, mathematics
    ('\u{232b}', '\u{2adb}'),
    ('\u{2e80}', '\u{3029}'), // radicals, CJK punctuation
    ('\u{3030}', '\u{3098}'), // kana
    ('\u{309b}', '\u{318e}'),
    ('\u{3190}', '\u{a48c}'), // ideographs, Yi
    ('\u{ac00}', '\u{d7a3}'), // Hangul
    ('\u{e000}', '\u{f8ff}'), // private use
    ('\u{fe30}', '\u{feff}'),
    ('\u{ff01}', '\u{ffef}'),   // full-width forms
    ('\u{1f000}', '\u{1faff}'), // pictographs
];

fn is_inert(character: char) -> bool {
    if character < '\u{300}' {
        return true;
    }
    let at = INERT.partition_point(|(first, _)| *first <= character);
    at > 0 && character <= INERT[at - 1].1
}

/// The text in composed form. What is not inert is handed to the library with the character before it.
pub(super) fn compose(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let (mut composed, mut done, mut before) = (String::new(), 0, 0);
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        if is_inert(character) {
            before = at;
            continue;
        }
        let next = characters.find(|(_, next)| is_inert(*next)).map_or(text.len(), |(next, _)| next);
        composed.push_str(&text[done..before]);
        let mut piece = NormalizedString::from(&text[before..next]);
        if NFC.normalize(&mut piece).is_ok() {
            composed.push_str(piece.get());
        }
        (done, before) = (next, next);
    }
    if done == 0 {
        return Cow::Borrowed(text);
    }
    composed.push_str(&text[done..]);
    Cow::Owned(composed)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use tokenizers::normalizers::NFD;

    use super::*;

    fn by(normalizer: &impl Normalizer, text: &str) -> String {
        let mut text = NormalizedString::from(text);
        normalizer.normalize(&mut text).unwrap();
        text.get().to_owned()
    }

    /// By what makes a character inert, of every one.
    #[test]
    fn nothing_before_an_inert_character_changes_it() {
        let all = || ('\0'..=char::MAX).filter(|character| is_inert(*character));
        // What decompositions go on with can be composed with what stands before.
        let mut later = HashSet::new();
        for character in '\0'..=char::MAX {
            // Hangul syllables are decomposed by rule: into these.
            if !('\u{ac00}'..='\u{d7a3}').contains(&character) {
                later.extend(by(&NFD, character.encode_utf8(&mut [0; 4])).chars().skip(1));
            }
        }
        later.extend(('\u{1161}'..='\u{1175}').chain('\u{11a8}'..='\u{11c2}'));
        assert!(later.len() > 100, "{}", later.len());
        for character in all() {
            let alone = character.to_string();
            assert_eq!(by(&NFC, &alone), alone);
            assert!(!later.contains(&character), "{character:?} can be composed");
            // Of marks these are of the last class and of the first: one of the two pairs is put in order.
            for pair in [format!("\u{345}{character}"), format!("{character}\u{334}")] {
                assert_eq!(by(&NFC, &pair), pair, "{character:?} is a mark");
            }
        }
        assert!(INERT.is_sorted_by(|one, next| one.0 <= one.1 && one.1 < next.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn the_same_as_of_the_whole(text in proptest::collection::vec(prop_oneof![
            proptest::char::range('\0', '\u{3ff}'),
            proptest::char::range('\u{300}', '\u{36f}'),
            proptest::char::range('\u{1100}', '\u{11ff}'),
            proptest::sample::select("e\u{301}o가각\u{11a8}\u{3099}かは\u{212b}\u{1e9b}\u{323}\u{307}\u{2329}𑄱\u{11127}ক\u{9be}".chars().collect::<Vec<_>>()),
            any::<char>(),
        ], 0..24).prop_map(String::from_iter)) {
            prop_assert_eq!(compose(&text), by(&NFC, &text));
        }
    }
}
