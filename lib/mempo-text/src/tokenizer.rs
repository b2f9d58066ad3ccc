//! A Hugging Face byte-level BPE tokenizer that keeps trusted and outside text apart.
//!
//! Three views of one vocabulary: *trusted* recognises every added token (chat templates), *plain* all but control
//! tokens (what a policy writes), *untrusted* none (everything from outside). Ids are `i32`, as in the tables. Tokenizers of a
//! published form are encoded with word by word ([`WordEncoder`]: long texts, too, in bounded memory), others by the library.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, AddedVocabulary, DecoderWrapper, ModelWrapper, NormalizerWrapper};

use crate::byte_table::ByteTable;
use crate::error::Error;
use crate::neutralise::neutralise;
use crate::words::{Recognise, WordEncoder};

/// The largest id that is believed: tables of tokens are as long as the largest.
const LARGEST_ID: u32 = 1 << 24;

/// Ids of text, text of ids, and which ids are special.
pub struct Tokenizer {
    trusted: tokenizers::Tokenizer,
    encoder: Encoder,
    bytes: ByteTable,
    added_ids: HashSet<i32>,
    control_ids: Vec<i32>,
    end_of_turn_ids: Vec<i32>,
}

/// Who makes ids of text.
enum Encoder {
    /// For tokenizers of a published form.
    Words(Box<WordEncoder>),
    /// The library: the trusted tokenizer, or one of its copies that recognise less.
    Library(Box<Copies>),
}

struct Copies {
    plain: tokenizers::Tokenizer,
    untrusted: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they are, the end-of-turn tokens named by `tokenizer_config.json`,
    /// `config.json` and `generation_config.json`. Truncation and padding settings of the file are ignored.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let error = |message: String| Error::File { path: path.clone(), message };
        let json = fs_err::read(&path)?;
        let mut trusted = tokenizers::Tokenizer::from_bytes(&json).map_err(|cause| error(cause.to_string()))?;
        trusted.with_truncation(None).map_err(|cause| error(cause.to_string()))?;
        trusted.with_padding(None);
        check_kind(&trusted).map_err(error)?;
        let vocabulary = trusted.get_vocab(true);
        check_added_ids(&json, &trusted, &vocabulary).map_err(error)?;

        let control_ids = control_ids(&trusted);
        let encoder = match WordEncoder::like(&trusted, &control_ids) {
            Some(encoder) => Encoder::Words(Box::new(encoder)),
            None => Encoder::Library(Box::new(Copies::of(&trusted).map_err(|cause| error(cause.to_string()))?)),
        };
        let bytes = ByteTable::new(&trusted, vocabulary);
        let end_of_turn_ids = end_of_turn_ids(dir, &trusted, bytes.len())?;
        let added_ids = trusted.get_added_tokens_decoder().into_keys().map(|id| id as i32).collect();
        let tokenizer = Self { trusted, encoder, bytes, added_ids, control_ids, end_of_turn_ids };
        let probe = "a b";
        let found = tokenizer.decode(&tokenizer.encode_untrusted(probe));
        if found != probe {
            return Err(error(format!("`{probe}` comes back as `{found}`: only lossless tokenizers can be used")));
        }
        Ok(tokenizer)
    }

    /// Ids of text that we wrote ourselves (templates, profiles): added tokens are recognised, nothing is put before
    /// or after.
    pub fn encode_trusted(&self, text: &str) -> Vec<i32> {
        self.encode(text, Recognise::All)
    }

    /// Ids of text from outside. No added token, control or other, can come out, and protocol tags are made harmless
    /// first (see [`neutralise`]). Bytes that the vocabulary lacks (SmolLM2 has none for planes nobody uses and some
    /// control characters) are left out, as the library does.
    pub fn encode_untrusted(&self, text: &str) -> Vec<i32> {
        let ids = self.encode(&neutralise(text), Recognise::Nothing);
        self.spell_out(ids, |id| self.added_ids.contains(&id))
    }

    /// Ids of text as a policy writes it: protocol tags are ordinary, added tokens such as Qwen's `<tool_call>` are
    /// recognised, control tokens never come out.
    pub fn encode_plain(&self, text: &str) -> Vec<i32> {
        let ids = self.encode(text, Recognise::NoControl);
        self.spell_out(ids, |id| self.is_control(id))
    }

    /// Text of the ids, special tokens' text included; bytes that are not UTF-8 become `U+FFFD`, unknown ids nothing.
    pub fn decode(&self, ids: &[i32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The same for a program that takes control tokens from text: what only spells one, in ids of other tokens, is broken by
    /// a zero-width space after its first character.
    pub fn decode_for_text(&self, ids: &[i32]) -> String {
        let runs = ids.chunk_by(|one, next| self.is_control(*one) == self.is_control(*next));
        let text = |run: &[i32]| {
            let text = self.decode(run);
            if self.is_control(run[0]) { text } else { self.break_controls(&text) }
        };
        runs.map(text).collect()
    }

    /// Text from outside in which no control token is spelled any more.
    pub fn break_controls(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for id in &self.control_ids {
            let spelled = self.decode(&[*id]);
            let Some(first) = spelled.chars().next() else { continue };
            if spelled.chars().nth(1).is_some() && text.contains(&spelled) {
                text = text.replace(&spelled, &format!("{first}\u{200b}{}", &spelled[first.len_utf8()..]));
            }
        }
        text
    }

    /// The bytes of one token; a character can be split over several tokens. Empty for an unknown id.
    pub fn token_bytes(&self, id: i32) -> &[u8] {
        self.bytes.get(id)
    }

    /// The highest id + 1; a model's embedding may have more rows.
    pub fn vocabulary_size(&self) -> usize {
        self.bytes.len()
    }

    /// Ids of the control tokens, ascending: added tokens marked special and those spelled `<|…|>`.
    pub fn control_ids(&self) -> &[i32] {
        &self.control_ids
    }

    /// Every id that ends a turn according to the model's files, ascending.
    pub fn end_of_turn_ids(&self) -> &[i32] {
        &self.end_of_turn_ids
    }

    /// Whether the id is a control token.
    pub fn is_control(&self, id: i32) -> bool {
        self.control_ids.binary_search(&id).is_ok()
    }

    /// Ids that other programs put before every text of their own accord, as the tokenizer's file says (Llama 3:
    /// `<|begin_of_text|>`). Nothing here does: templates write them.
    pub fn beginning_ids(&self) -> Vec<i32> {
        let Ok(encoding) = self.trusted.encode("a", true) else { return Vec::new() };
        let marked = encoding.get_ids().iter().zip(encoding.get_special_tokens_mask());
        marked.take_while(|(_, mask)| **mask == 1).map(|(id, _)| *id as i32).collect()
    }

    /// The text as the tokenizer's own normaliser leaves it (Qwen: NFC), which is what its ids decode to.
    pub(crate) fn normalise(&self, text: &str) -> String {
        self.decode(&self.encode(text, Recognise::Nothing))
    }

    fn encode(&self, text: &str, recognise: Recognise) -> Vec<i32> {
        let ids = match &self.encoder {
            Encoder::Words(words) => words.encode(self.trusted.get_model(), text, recognise),
            Encoder::Library(copies) => library_ids(copies.that(&self.trusted, recognise), text),
        };
        // The splitting expression gave up on hostile text: bytes always work.
        ids.unwrap_or_else(|_| self.byte_ids_of(text.as_bytes()).collect())
    }

    /// Merges learnt from text that held a control token can rebuild it: such ids are written out byte by byte.
    fn spell_out(&self, ids: Vec<i32>, forbidden: impl Fn(i32) -> bool) -> Vec<i32> {
        if !ids.iter().any(|id| forbidden(*id)) {
            return ids;
        }
        let spell = |id: i32| -> Vec<i32> {
            if forbidden(id) { self.byte_ids_of(self.token_bytes(id)).collect() } else { vec![id] }
        };
        ids.into_iter().flat_map(spell).collect()
    }

    fn byte_ids_of<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = i32> + 'a {
        let ids = bytes.iter().filter_map(|byte| self.bytes.id_of_byte(*byte));
        ids.filter(|id| !self.added_ids.contains(id))
    }
}

impl Copies {
    fn of(trusted: &tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        let (mut plain, mut untrusted) = (trusted.clone(), trusted.clone());
        plain.add_special_tokens(control_tokens(trusted).map(|(_, token)| token.special(true)))?;
        plain.set_encode_special_tokens(true);
        untrusted.with_added_vocabulary(AddedVocabulary::new());
        Ok(Self { plain, untrusted })
    }

    fn that<'a>(&'a self, trusted: &'a tokenizers::Tokenizer, recognise: Recognise) -> &'a tokenizers::Tokenizer {
        match recognise {
            Recognise::All => trusted,
            Recognise::NoControl => &self.plain,
            Recognise::Nothing => &self.untrusted,
        }
    }
}

fn library_ids(tokenizer: &tokenizers::Tokenizer, text: &str) -> tokenizers::Result<Vec<i32>> {
    Ok(tokenizer.encode_fast(text, false)?.get_ids().iter().map(|id| *id as i32).collect())
}

fn control_ids(tokenizer: &tokenizers::Tokenizer) -> Vec<i32> {
    let mut ids: Vec<i32> = control_tokens(tokenizer).map(|(id, _)| id as i32).collect();
    ids.sort_unstable();
    ids
}

fn control_tokens(tokenizer: &tokenizers::Tokenizer) -> impl Iterator<Item = (u32, AddedToken)> {
    let added = tokenizer.get_added_tokens_decoder().into_iter();
    added.filter(|(_, token)| token.special || looks_like_control(&token.content))
}

/// Some control tokens are not marked special, as Qwen's `<|fim_prefix|>`.
fn looks_like_control(content: &str) -> bool {
    content.starts_with("<|") && content.ends_with("|>")
}

fn check_kind(tokenizer: &tokenizers::Tokenizer) -> Result<(), String> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else {
        return Err("the model is not BPE; byte-level BPE (Qwen, Llama 3, SmolLM2) is supported".to_owned());
    };
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        return Err("BPE dropout is on, so the same text would give different ids: set `dropout` to null".to_owned());
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err("the model marks parts of words by affixes; byte-level BPE without them is supported".to_owned());
    }
    // Others could turn harmless text into tags after it was looked through, or make text that does not come back.
    if !matches!(tokenizer.get_normalizer(), None | Some(NormalizerWrapper::NFC(_))) {
        return Err("the normalizer rewrites text; NFC or none is supported".to_owned());
    }
    match tokenizer.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => Ok(()),
        _ => Err("the decoder is not ByteLevel; byte-level BPE (Qwen, Llama 3, SmolLM2) is supported".to_owned()),
    }
}

/// The library numbers added tokens itself and only warns where the file says otherwise.
fn check_added_ids(
    json: &[u8],
    tokenizer: &tokenizers::Tokenizer,
    vocabulary: &HashMap<String, u32>,
) -> Result<(), String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Token>,
    }
    #[derive(Deserialize)]
    struct Token {
        id: u32,
        content: String,
    }
    let file: File = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if let Some(id) = vocabulary.values().max().filter(|id| **id > LARGEST_ID) {
        return Err(format!("id {id} is larger than {LARGEST_ID}, which no vocabulary has need of"));
    }
    for Token { id, content } in file.added_tokens {
        let found = tokenizer.token_to_id(&content);
        if found != Some(id) {
            return Err(format!("added token `{content}` says id {id} but is loaded as {found:?}: ids have a gap"));
        }
    }
    Ok(())
}

fn end_of_turn_ids(dir: &Path, tokenizer: &tokenizers::Tokenizer, size: usize) -> Result<Vec<i32>, Error> {
    let mut ids = Vec::new();
    for name in ["config.json", "generation_config.json"] {
        let path = dir.join(name);
        let found = read_json(&path)?.map_or(Value::Null, |config| config["eos_token_id"].clone());
        let found = if let Value::Array(found) = found { found } else { vec![found] };
        for id in found.iter().filter(|id| !id.is_null()) {
            let known = id.as_u64().filter(|id| *id < size as u64);
            let message = || format!("eos_token_id {id} is not an id of tokenizer.json, which has {size}: correct it");
            ids.push(known.ok_or_else(|| Error::File { path: path.clone(), message: message() })? as i32);
        }
    }
    let path = dir.join("tokenizer_config.json");
    if let Some(token) = read_json(&path)?.and_then(|config| token_text(&config["eos_token"])) {
        let message = || format!("eos_token `{token}` is not a token of tokenizer.json");
        let id = tokenizer.token_to_id(&token).ok_or_else(|| Error::File { path: path.clone(), message: message() })?;
        ids.push(id as i32);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// A token in a configuration file: its text, or an object with its text under `content`.
pub(crate) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// The file's JSON; `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    match fs_err::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::File { path: path.to_owned(), message: format!("not valid JSON: {error}") }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}
