//! Trains a small tokenizer of Qwen2's kind, for models that start from nothing.

use std::path::Path;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerBuilder, TokenizerImpl};

use crate::error::Error;

/// Padding, turn start, turn end: ids 0, 1 and 2.
const CONTROL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Every byte has a token of its own, so that any text can be encoded.
const SMALLEST_VOCABULARY: usize = 256 + CONTROL_TOKENS.len();
/// Where Qwen2 cuts text before merging: contractions, words, single digits, punctuation, line ends, white space.
const PRETOKENS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CHAT_TEMPLATE: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Trains byte-level BPE on the texts and writes `tokenizer.json` and `tokenizer_config.json` (with a ChatML template)
/// into `out_dir`. Returns the number of ids, which is below `vocabulary_size` where the texts offer fewer merges.
///
/// The texts are read once; memory grows with the number of distinct words.
pub fn train_tokenizer(
    texts: impl Iterator<Item = String> + Send,
    vocabulary_size: usize,
    out_dir: &Path,
) -> Result<usize, Error> {
    if vocabulary_size < SMALLEST_VOCABULARY {
        return Err(Error::Train(format!(
            "a vocabulary of {vocabulary_size} is too small: {SMALLEST_VOCABULARY} ids are taken by bytes and control tokens"
        )));
    }
    let error = |cause: tokenizers::Error| Error::Train(cause.to_string());
    let mut tokenizer = untrained().map_err(error)?;
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocabulary_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(
            CONTROL_TOKENS
                .map(|token| AddedToken::from(token, true))
                .to_vec(),
        )
        .build();
    tokenizer
        .train(
            &mut trainer,
            texts.map(|text| without_control_tokens(&text)),
        )
        .map_err(error)?;

    fs_err::create_dir_all(out_dir)?;
    fs_err::write(
        out_dir.join("tokenizer.json"),
        tokenizer.to_string(true).map_err(error)?,
    )?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": CONTROL_TOKENS[2],
        "pad_token": CONTROL_TOKENS[0],
        "additional_special_tokens": [CONTROL_TOKENS[1], CONTROL_TOKENS[2]],
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    });
    fs_err::write(
        out_dir.join("tokenizer_config.json"),
        format!("{config:#}\n"),
    )?;
    Ok(tokenizer.get_vocab_size(true))
}

/// Qwen2's normaliser, cutting and decoder around an empty model.
fn untrained() -> tokenizers::Result<TokenizerImpl<BPE, NFC, Sequence, ByteLevel, ByteLevel>> {
    let split = Split::new(
        SplitPattern::Regex(PRETOKENS.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    );
    let byte_level = ByteLevel::new(false, false, false);
    let pre_tokenizer = Sequence::new(vec![
        PreTokenizerWrapper::Split(split?),
        PreTokenizerWrapper::ByteLevel(byte_level),
    ]);
    TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(pre_tokenizer))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
}

/// Merges learnt from a control token's text would rebuild it from ordinary pieces.
fn without_control_tokens(text: &str) -> String {
    CONTROL_TOKENS
        .iter()
        .fold(text.to_owned(), |text, token| text.replace(token, " "))
}
