//! Added tokens, found in text as the library finds them.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;

/// Which of the added tokens are recognised in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recognise {
    /// All.
    All,
    /// All but control tokens.
    NoControl,
    /// None.
    Nothing,
}

struct Added {
    content: String,
    id: i32,
    control: bool,
}

/// Those of a tokenizer.
pub(super) struct AddedTokens {
    /// By the first byte, longer ones first.
    by_first_byte: Vec<Vec<Added>>,
}

impl AddedTokens {
    /// None where one of them is not simply text: found after normalising, only between words, or with the white space beside
    /// it.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer, control: &HashSet<i32>) -> Option<Self> {
        let mut by_first_byte: Vec<Vec<Added>> = (0..256).map(|_| Vec::new()).collect();
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if token.normalized || token.single_word || token.lstrip || token.rstrip {
                return None;
            }
            let (id, first) = (id as i32, *token.content.as_bytes().first()?);
            by_first_byte[usize::from(first)].push(Added {
                content: token.content,
                id,
                control: control.contains(&id),
            });
        }
        for tokens in &mut by_first_byte {
            tokens.sort_by_key(|token| Reverse(token.content.len()));
        }
        Some(Self { by_first_byte })
    }

    /// The first recognised token of the text from a byte on, the longest of those that begin there, and its id. A control token
    /// that is not recognised hides what begins inside it.
    pub(super) fn find(&self, text: &str, from: usize, recognise: Recognise) -> Option<(Range<usize>, i32)> {
        if recognise == Recognise::Nothing {
            return None;
        }
        let bytes = text.as_bytes();
        let mut at = from;
        while at < bytes.len() {
            let tokens = &self.by_first_byte[usize::from(bytes[at])];
            match tokens.iter().find(|token| bytes[at..].starts_with(token.content.as_bytes())) {
                None => at += 1,
                Some(token) if token.control && recognise == Recognise::NoControl => at += token.content.len(),
                Some(token) => return Some((at..at + token.content.len(), token.id)),
            }
        }
        None
    }
}
