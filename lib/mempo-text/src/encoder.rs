//! The tokenizer of a text encoder: WordPiece, as BERT, E5, MiniLM and BGE have it.

use std::path::Path;

use tokenizers::{ModelWrapper, TruncationParams};

use crate::error::Error;

/// Ids of whole texts for an encoder, between the control tokens that it knows texts by (`[CLS] … [SEP]`).
pub struct EncoderTokenizer {
    tokenizer: tokenizers::Tokenizer,
    path: std::path::PathBuf,
}

impl EncoderTokenizer {
    /// Reads `DIR/tokenizer.json`. Texts are cut to `max_tokens` ids, control tokens included; truncation and padding settings
    /// of the file are ignored.
    pub fn load(dir: &Path, max_tokens: usize) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let error = |message: String| Error::File { path: path.clone(), message };
        let json = fs_err::read(&path)?;
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&json).map_err(|cause| error(cause.to_string()))?;
        if !matches!(tokenizer.get_model(), ModelWrapper::WordPiece(_)) {
            return Err(error("the model is not WordPiece, as that of a BERT encoder is".to_owned()));
        }
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|cause| error(cause.to_string()))?;
        let empty = tokenizer.encode_fast("", true).map_err(|cause| error(cause.to_string()))?;
        let around = empty.len();
        if around == 0 {
            let message = "nothing is put around a text; expected a post-processor that adds [CLS] and [SEP]";
            return Err(error(message.to_owned()));
        }
        if max_tokens <= around {
            let message = format!("{max_tokens} ids leave no room for a text beside its {around} control tokens");
            return Err(error(message));
        }
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|cause| error(cause.to_string()))?;
        // What spells a control token in a text is text.
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { tokenizer, path })
    }

    /// Ids of each text. No control token comes out of what the texts say.
    pub fn encode(&self, texts: Vec<String>) -> Result<Vec<Vec<i32>>, Error> {
        let encoded = self.tokenizer.encode_batch_fast(texts, true);
        let encoded = encoded.map_err(|cause| Error::File { path: self.path.clone(), message: cause.to_string() })?;
        Ok(encoded.iter().map(|text| text.get_ids().iter().map(|id| *id as i32).collect()).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn load(change: &Value, max_tokens: usize) -> Result<EncoderTokenizer, Error> {
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let mut json = json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "[PAD]"},
            "added_tokens": [special(0, "[PAD]"), special(1, "[UNK]"), special(2, "[CLS]"), special(3, "[SEP]")],
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            "decoder": null,
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100,
                      "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "##der": 5, "fish": 6}},
        });
        json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        EncoderTokenizer::load(folder.path(), max_tokens)
    }

    #[test]
    fn texts_stand_between_control_tokens_that_none_of_them_can_spell() {
        let tokenizer = load(&json!({}), 6).unwrap();
        let texts = ["Redder fish", "", "red red red red red red", "red [SEP]", "\u{0}"];
        let ids = tokenizer.encode(texts.map(str::to_owned).to_vec()).unwrap();
        assert_eq!(ids, [&[2, 4, 5, 6, 3][..], &[2, 3], &[2, 4, 4, 4, 4, 3], &[2, 4, 1, 1, 1, 3], &[2, 3]]);
    }

    #[test]
    fn ids_are_those_of_transformers() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mempo-model/tests/golden/bert");
        let expected: Value = serde_json::from_slice(&fs_err::read(golden.join("expected.json")).unwrap()).unwrap();
        let texts: Vec<String> = serde_json::from_value(expected["texts"].clone()).unwrap();
        let tokenizer = EncoderTokenizer::load(&golden, expected["max_tokens"].as_u64().unwrap() as usize).unwrap();
        assert_eq!(json!(tokenizer.encode(texts).unwrap()), expected["ids"]);
    }

    #[test]
    fn tokenizers_of_other_kinds_are_refused() {
        let refused = |change: &Value, max_tokens| load(change, max_tokens).map(drop).unwrap_err().to_string();
        let words = json!({"model": {"type": "WordLevel", "vocab": {"[UNK]": 1}, "unk_token": "[UNK]"}});
        assert!(refused(&words, 6).contains("not WordPiece"));
        assert!(refused(&json!({"post_processor": null}), 6).contains("post-processor"));
        assert!(refused(&json!({}), 2).contains("no room for a text"));
    }
}
