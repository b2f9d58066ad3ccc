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
const PRETOKENS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with spaces cut off as tokens of their own, so that a word has the same ids wherever it stands: a very small
/// model that copies answers need not learn that ` Lima` and `Lima` are one. Words that begin no answer keep theirs.
const PRETOKENS_APART: &str = r" (?:an?|and|as|at|by|for|from|has|in|is|of|on|or|the|to|was|which|whose|with)(?![\p{L}\p{N}])|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s";
const CHAT_TEMPLATE: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// What a new tokenizer is like.
#[derive(Debug, Clone, Default)]
pub struct NewTokenizer {
    /// Most ids, control and added tokens included.
    pub vocabulary_size: usize,
    /// Texts that are one token each where the policy writes them; never in text from outside.
    pub added_tokens: Vec<String>,
    /// Spaces are tokens of their own.
    pub separate_spaces: bool,
}

impl NewTokenizer {
    /// One of Qwen2's kind with nothing added.
    pub fn of_size(vocabulary_size: usize) -> Self {
        Self { vocabulary_size, ..Self::default() }
    }
}

/// Trains byte-level BPE on the texts and writes `tokenizer.json` and `tokenizer_config.json` (with a ChatML template)
/// into `out_dir`. Returns the number of ids, which is below `vocabulary_size` where the texts offer fewer merges.
///
/// The texts are read once; memory grows with the number of distinct words.
pub fn train_tokenizer(
    texts: impl Iterator<Item = String> + Send,
    wanted: &NewTokenizer,
    out_dir: &Path,
) -> Result<usize, Error> {
    let (size, smallest) = (wanted.vocabulary_size, SMALLEST_VOCABULARY + wanted.added_tokens.len());
    if size < smallest {
        let taken = format!("{smallest} ids are taken by bytes, control and added tokens");
        return Err(Error::Train(format!("a vocabulary of {size} is too small: {taken}")));
    }
    let error = |cause: tokenizers::Error| Error::Train(cause.to_string());
    let mut tokenizer = untrained(wanted.separate_spaces).map_err(error)?;
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size - wanted.added_tokens.len())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(CONTROL_TOKENS.map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    tokenizer.train(&mut trainer, texts.map(|text| without(&text, &wanted.added_tokens))).map_err(error)?;
    let added: Vec<AddedToken> =
        wanted.added_tokens.iter().map(|text| AddedToken::from(text, false).normalized(false)).collect();
    tokenizer.add_tokens(added).map_err(error)?;

    fs_err::create_dir_all(out_dir)?;
    fs_err::write(out_dir.join("tokenizer.json"), tokenizer.to_string(true).map_err(error)?)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": CONTROL_TOKENS[2],
        "pad_token": CONTROL_TOKENS[0],
        "additional_special_tokens": [CONTROL_TOKENS[1], CONTROL_TOKENS[2]],
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    });
    fs_err::write(out_dir.join("tokenizer_config.json"), format!("{config:#}\n"))?;
    Ok(tokenizer.get_vocab_size(true))
}

/// Qwen2's normaliser, cutting and decoder around an empty model.
fn untrained(separate_spaces: bool) -> tokenizers::Result<TokenizerImpl<BPE, NFC, Sequence, ByteLevel, ByteLevel>> {
    let split = Split::new(
        SplitPattern::Regex(if separate_spaces { PRETOKENS_APART } else { PRETOKENS }.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    );
    let byte_level = ByteLevel::new(false, false, false);
    let pre_tokenizer =
        Sequence::new(vec![PreTokenizerWrapper::Split(split?), PreTokenizerWrapper::ByteLevel(byte_level)]);
    TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(pre_tokenizer))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
}

/// Merges learnt from a token's own text would rebuild a control token from ordinary pieces, and be wasted on added ones.
fn without(text: &str, added_tokens: &[String]) -> String {
    let tokens = added_tokens.iter().map(String::as_str).chain(CONTROL_TOKENS);
    tokens.fold(text.to_owned(), |text, token| text.replace(token, " "))
}
