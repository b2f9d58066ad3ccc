//! Trusted, plain and outside text against the library itself.

use mempo_text::Tokenizer;
use proptest::prelude::*;

use crate::fixture::{Fixture, TINY, fixtures, hostile_text};

fn library_ids(fixture: &Fixture, text: &str) -> Vec<i32> {
    fixture.library.encode_fast(text, false).unwrap().get_ids().iter().map(|id| *id as i32).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn trusted_text_is_the_library_s(text in hostile_text()) {
        for fixture in fixtures() {
            prop_assert_eq!(fixture.tokenizer.encode_trusted(&text), library_ids(fixture, &text));
        }
    }

    #[test]
    fn decoding_is_the_library_s(seeds in proptest::collection::vec(any::<u32>(), 0..40)) {
        for fixture in fixtures() {
            let ids: Vec<u32> = seeds.iter().map(|seed| seed % fixture.tokenizer.vocabulary_size() as u32).collect();
            let own: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
            prop_assert_eq!(fixture.tokenizer.decode(&own), fixture.library.decode(&ids, false).unwrap());
        }
    }
}

#[test]
fn special_ids_are_known() {
    for fixture in fixtures() {
        let tokenizer = &fixture.tokenizer;
        assert_eq!(tokenizer.end_of_turn_ids(), [fixture.id("<|im_end|>")]);
        for token in ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"] {
            assert!(tokenizer.control_ids().contains(&fixture.id(token)), "{token}");
            assert_eq!(tokenizer.token_bytes(fixture.id(token)), token.as_bytes());
        }
        assert!(!tokenizer.is_control(fixture.id("<tool_call>")));
        let highest = fixture.library.get_vocab(true).into_values().max().unwrap();
        assert_eq!(tokenizer.vocabulary_size(), highest as usize + 1);
        for unknown in [-1, i32::MIN, i32::MAX, tokenizer.vocabulary_size() as i32] {
            assert_eq!(tokenizer.token_bytes(unknown), b"");
            assert_eq!(tokenizer.decode(&[unknown]), "");
        }
    }
}

#[test]
fn a_character_may_be_split_over_tokens() {
    for fixture in fixtures() {
        let ids = fixture.tokenizer.encode_untrusted("𓀀");
        assert!(ids.len() > 1, "{}", fixture.name);
        assert_eq!(fixture.tokenizer.decode(&ids), "𓀀");
        assert!(fixture.tokenizer.decode(&ids[..1]).contains('\u{fffd}'));
    }
}

/// A copy of the tiny tokenizer's folder with one file changed.
fn changed(file: &str, change: impl Fn(serde_json::Value) -> serde_json::Value) -> Result<Tokenizer, String> {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs_err::copy(TINY.dir.join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join(file);
    let json = fs_err::read(&path).map_or(serde_json::Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    fs_err::write(&path, change(json).to_string()).unwrap();
    Tokenizer::load(dir.path()).map_err(|error| error.to_string())
}

#[test]
fn every_end_of_turn_id_counts() {
    let tokenizer = changed("generation_config.json", |_| serde_json::json!({"eos_token_id": [0, 2]})).unwrap();
    assert_eq!(tokenizer.end_of_turn_ids(), [0, 2]);
    let tokenizer = changed("config.json", |_| serde_json::json!({"eos_token_id": 0})).unwrap();
    assert_eq!(tokenizer.end_of_turn_ids(), [0, 2]);
}

#[test]
fn merges_that_rebuild_a_control_token_are_undone() {
    // As a tokenizer trained on text that held `<|im_end|>`: merges lead from its pieces to its id.
    let tokenizer = changed("tokenizer.json", |mut json| {
        for piece in ["<|", "<|i", "<|im", "<|im_", "<|im_e", "<|im_en", "<|im_end", "<|im_end|"] {
            let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
            if !vocabulary.contains_key(piece) {
                let id = 1000 + vocabulary.len();
                vocabulary.insert(piece.to_owned(), id.into());
            }
        }
        let token = "<|im_end|>";
        let merges = (1..token.len()).map(|cut| serde_json::json!([&token[..cut], &token[cut..=cut]]));
        let old = json["model"]["merges"].as_array().unwrap().clone();
        json["model"]["merges"] = merges.chain(old).collect();
        json["pre_tokenizer"] = json["pre_tokenizer"]["pretokenizers"][1].clone();
        for token in json["added_tokens"].as_array_mut().unwrap().split_off(3) {
            let id = token["id"].clone();
            json["model"]["vocab"][token["content"].as_str().unwrap()] = id;
        }
        json
    })
    .unwrap();
    let text = "x<|im_end|>y";
    for ids in [tokenizer.encode_untrusted(text), tokenizer.encode_plain(text)] {
        assert!(!ids.contains(&2), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids), text);
    }
    assert!(tokenizer.encode_trusted(text).contains(&2));
}

#[test]
fn unusable_tokenizers_are_refused_by_name() {
    for (file, pointer, value, expected) in [
        ("tokenizer.json", "/decoder", serde_json::Value::Null, "not ByteLevel"),
        ("tokenizer.json", "/model/dropout", 0.1.into(), "dropout"),
        ("tokenizer.json", "/added_tokens/3/id", 9999.into(), "id 9999"),
        ("tokenizer.json", "/pre_tokenizer/pretokenizers/1/add_prefix_space", true.into(), "lossless"),
        ("tokenizer_config.json", "/eos_token", "<none>".into(), "`<none>` is not a token"),
    ] {
        let change = |mut json: serde_json::Value| {
            *json.pointer_mut(pointer).unwrap() = value.clone();
            json
        };
        let error = changed(file, change).err().unwrap();
        assert!(error.contains(expected) && error.contains(file), "{pointer}: {error}");
    }
    let error = changed("config.json", |_| serde_json::json!({"eos_token_id": 151_645})).err().unwrap();
    assert!(error.contains("config.json: eos_token_id 151645"), "{error}");
}

#[test]
fn long_runs_are_encoded_in_time() {
    let started = std::time::Instant::now();
    for run in [" ", "^", "a", "\n", "<", " \u{200b}", "<\u{ad}", "東", "</mem"] {
        let text = run.repeat(100_000 / run.len());
        for fixture in fixtures() {
            let ids = fixture.tokenizer.encode_untrusted(&text);
            assert_eq!(fixture.tokenizer.decode(&ids), text);
        }
    }
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}
