//! Ids of text word by word: what the library makes of a text, in a fraction of its time and in bounded memory.
//!
//! A byte-level BPE tokenizer encodes each word of its pre-tokenizer by itself. Where that pre-tokenizer is of a published form
//! (GPT-2's, with or without digits apart: SmolLM2; Qwen2's to Qwen3's; Llama 3's), text is cut here by a walk over the
//! characters, and only words that were not met lately go through the library's model. Beside the text and its ids, memory
//! is that of the caches and of one word.

mod added;
mod cache;
mod classes;
mod nfc;
mod split;

use std::borrow::Cow;
use std::collections::HashSet;

use tokenizers::{Model, ModelWrapper, NormalizerWrapper};

use added::AddedTokens;
pub(crate) use added::Recognise;
use cache::{Pool, WordCache};
use split::Splitter;

use crate::byte_table::character_of_byte;

/// Encodes as a tokenizer of the library does, by way of its words.
pub(crate) struct WordEncoder {
    splitter: Splitter,
    added: AddedTokens,
    /// Whether text is composed first.
    composes: bool,
    characters: [char; 256],
    caches: Pool,
}

impl WordEncoder {
    /// One for a byte-level BPE tokenizer; none where something about it is not of a known form.
    pub(crate) fn like(tokenizer: &tokenizers::Tokenizer, control_ids: &[i32]) -> Option<Self> {
        let composes = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let control: HashSet<i32> = control_ids.iter().copied().collect();
        Some(Self {
            splitter: Splitter::like(tokenizer.get_pre_tokenizer())?,
            added: AddedTokens::of(tokenizer, &control)?,
            composes,
            characters: character_of_byte(),
            caches: Pool::default(),
        })
    }

    /// The ids of a text with the model of the tokenizer that this encoder is like.
    pub(crate) fn encode(
        &self,
        model: &ModelWrapper,
        text: &str,
        recognise: Recognise,
    ) -> tokenizers::Result<Vec<i32>> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        self.caches.with(|cache| {
            let mut start = 0;
            while let Some((found, id)) = self.added.find(text, start, recognise) {
                self.encode_piece(model, &text[start..found.start], cache, &mut ids)?;
                ids.push(id);
                start = found.end;
            }
            self.encode_piece(model, &text[start..], cache, &mut ids)
        })?;
        Ok(ids)
    }

    /// Text without added tokens.
    fn encode_piece(
        &self,
        model: &ModelWrapper,
        text: &str,
        cache: &mut WordCache,
        ids: &mut Vec<i32>,
    ) -> tokenizers::Result<()> {
        let text = if self.composes { nfc::compose(text) } else { Cow::Borrowed(text) };
        let mut start = 0;
        while start < text.len() {
            let end = self.splitter.word_end(&text, start);
            let word = &text.as_bytes()[start..end];
            cache.ids(word, ids, |ids| self.encode_word(model, word, ids))?;
            start = end;
        }
        Ok(())
    }

    fn encode_word(&self, model: &ModelWrapper, word: &[u8], ids: &mut Vec<i32>) -> tokenizers::Result<()> {
        let spelled: String = word.iter().map(|byte| self.characters[usize::from(*byte)]).collect();
        ids.extend(model.tokenize(&spelled)?.iter().map(|token| token.id as i32));
        Ok(())
    }
}
