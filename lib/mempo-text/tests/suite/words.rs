//! Ids made word by word against the library's own, in each of the three views of a text.

use std::sync::LazyLock;

use mempo_text::neutralise;
use proptest::prelude::*;
use tokenizers::AddedVocabulary;

use crate::fixture::{FORMS, Fixture, families, hostile_text};

/// A tokenizer with the library's of each view: those that recognise no control tokens, and nothing.
struct Views {
    fixture: &'static Fixture,
    plain: tokenizers::Tokenizer,
    untrusted: tokenizers::Tokenizer,
}

static VIEWS: LazyLock<Vec<Views>> = LazyLock::new(|| {
    let views = |fixture: &'static Fixture| {
        let (mut plain, mut untrusted) = (fixture.library.clone(), fixture.library.clone());
        let added = fixture.library.get_added_tokens_decoder();
        let control = added.into_iter().filter(|(id, _)| fixture.tokenizer.is_control(*id as i32));
        plain.add_special_tokens(control.map(|(_, token)| token.special(true))).unwrap();
        plain.set_encode_special_tokens(true);
        untrusted.with_added_vocabulary(AddedVocabulary::new());
        Views { fixture, plain, untrusted }
    };
    families().chain(&*FORMS).map(views).collect()
});

fn ids(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<i32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().iter().map(|id| *id as i32).collect()
}

fn check(text: &str) -> Result<(), TestCaseError> {
    for Views { fixture, plain, untrusted } in &*VIEWS {
        let (name, tokenizer) = (&fixture.name, &fixture.tokenizer);
        prop_assert_eq!(tokenizer.encode_trusted(text), ids(&fixture.library, text), "{}", name);
        prop_assert_eq!(tokenizer.encode_plain(text), ids(plain, text), "{}", name);
        prop_assert_eq!(tokenizer.encode_untrusted(text), ids(untrusted, &neutralise(text)), "{}", name);
    }
    Ok(())
}

/// What splitting expressions tell apart, in any order.
fn text() -> impl Strategy<Value = String> {
    let letters = "abzSTREVMLD\u{17f}\u{212a}éßǅ東京ไทยकाעبК한글𝒜ªʰ";
    let apart = "09٣²Ⅷ𝟘½ \t\u{a0}\u{3000}\u{2028}\u{85}\u{b}\r\n'’-_.,!?<>|/`\u{0}\u{7f}\u{ad}\u{200b}\u{feff}🙂👩\u{200d}🚀\u{e000}\u{fffe}\u{10ffff}";
    let marks = "\u{301}\u{327}\u{334}\u{345}\u{3099}\u{5b0}\u{94d}\u{9be}\u{11a8}\u{1161}\u{fe0f}\u{20dd}\u{f71}";
    let contractions = ["'s", "'T", "'re", "'VE", "'m", "'Ll", "'d", "'\u{17f}", "'l", "'v", "''s", " 's"];
    let of = |letters: &str| proptest::sample::select(letters.chars().map(String::from).collect::<Vec<_>>());
    let runs = ["\n", " \n", "\r\n", "\t ", "  ", "0", "a", "!", "\u{301}", "東"];
    prop_oneof![
        6 => of(letters),
        6 => of(apart),
        2 => of(marks),
        2 => proptest::sample::select(contractions.to_vec()).prop_map(str::to_owned),
        2 => (proptest::sample::select(runs.to_vec()), 1..9_usize).prop_map(|(run, times)| run.repeat(times)),
        1 => any::<char>().prop_map(String::from),
        1 => "[a-z]{1,24}",
        1 => hostile_text(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn ids_are_the_library_s(pieces in proptest::collection::vec(text(), 0..24)) {
        check(&pieces.concat())?;
    }
}

/// Characters alone, doubled, as a word's beginning and end, between spaces, digits and line breaks, and where a contraction
/// may be: all of the smaller scripts, of the rest every 97th.
#[test]
fn every_kind_of_character_is_told_apart() {
    let characters: Vec<char> =
        ('\0'..=char::MAX).filter(|c| *c < '\u{3100}' || (*c as u32).is_multiple_of(97)).collect();
    let around = |c: &char| format!("{c}{c} a{c}b {c}1{c}\n{c}\n '{c} x'{c}y  {c}");
    for some in characters.chunks(500) {
        let text: String = some.iter().map(around).collect();
        for Views { fixture, untrusted, .. } in &*VIEWS {
            let found = fixture.tokenizer.encode_untrusted(&text);
            assert_eq!(found, ids(untrusted, &neutralise(&text)), "{} from {:?}", fixture.name, some[0]);
        }
    }
}

/// The words of every file that other tests compare with the reference.
#[test]
fn texts_of_golden_files() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut files = Vec::new();
    for folder in ["lib/mempo-text/tests/golden", "bins/mempo-sft/tests/golden", "schemas"] {
        let entries = fs_err::read_dir(root.join(folder)).unwrap();
        files.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()));
    }
    let texts: Vec<String> = files.iter().filter_map(|file| fs_err::read_to_string(file).ok()).collect();
    assert!(texts.len() > 20, "{}", texts.len());
    for text in &texts {
        check(text).unwrap();
        // Of JSON, in one line or many, also each text that it holds.
        for value in text.lines().chain([text.as_str()]).filter_map(|json| serde_json::from_str(json).ok()) {
            let mut said = Vec::new();
            collect(&value, &mut said);
            for text in &said {
                check(text).unwrap();
            }
        }
    }
}

fn collect(value: &serde_json::Value, texts: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => texts.push(text.clone()),
        serde_json::Value::Array(list) => list.iter().for_each(|value| collect(value, texts)),
        serde_json::Value::Object(fields) => fields.values().for_each(|value| collect(value, texts)),
        _ => {}
    }
}
