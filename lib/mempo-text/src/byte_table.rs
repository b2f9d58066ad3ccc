//! The bytes behind each token of a byte-level BPE vocabulary.

use std::collections::HashMap;

/// Bytes of tokens, tokens of bytes.
pub(crate) struct ByteTable {
    /// The bytes of all tokens one after the other; token `id` is `bytes[starts[id]..starts[id + 1]]`.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    /// The id that stands for one byte alone.
    byte_ids: [Option<i32>; 256],
}

impl ByteTable {
    /// Of a tokenizer with this vocabulary, added tokens included.
    pub(crate) fn new(tokenizer: &tokenizers::Tokenizer, vocabulary: HashMap<String, u32>) -> Self {
        let byte_of = byte_of_character();
        let size = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        let mut contents: Vec<Vec<u8>> = vec![Vec::new(); size];
        let mut byte_ids = [None; 256];
        for (token, id) in vocabulary {
            let bytes: Option<Vec<u8>> = token.chars().map(|character| *byte_of.get(character as usize)?).collect();
            let bytes = bytes.unwrap_or_else(|| token.into_bytes());
            if let [byte] = bytes[..] {
                byte_ids[usize::from(byte)] = Some(id as i32);
            }
            contents[id as usize] = bytes;
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            contents[id as usize] = token.content.into_bytes();
        }
        let mut starts = vec![0];
        let mut bytes = Vec::new();
        for content in contents {
            bytes.extend(content);
            starts.push(bytes.len());
        }
        Self { bytes, starts, byte_ids }
    }

    /// The highest id + 1.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The bytes of a token; empty for an unknown id.
    pub(crate) fn get(&self, id: i32) -> &[u8] {
        let range = usize::try_from(id).ok().and_then(|id| Some(*self.starts.get(id)?..*self.starts.get(id + 1)?));
        range.map_or(&[], |range| &self.bytes[range])
    }

    /// The id that stands for this byte alone.
    pub(crate) fn id_of_byte(&self, byte: u8) -> Option<i32> {
        self.byte_ids[usize::from(byte)]
    }
}

/// Undoes GPT-2's spelling of bytes as printable characters, all of which are below U+0144.
fn byte_of_character() -> [Option<u8>; 0x144] {
    let mut bytes = [None; 0x144];
    for (character, byte) in character_of_byte().into_iter().zip(0..=255) {
        bytes[character as usize] = Some(byte);
    }
    bytes
}

/// GPT-2's spelling of each byte as a printable character.
pub(crate) fn character_of_byte() -> [char; 256] {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if printable(byte) { Some(char::from(byte)) } else { others.next() }.unwrap_or_default()
    })
}
