//! Observations cut to length.

use mempo_text::{CUT_MARK, Tokenizer};

/// `text` if it has at most `max_tokens` tokens, else its beginning, cut between tokens, with a mark that says so.
pub(crate) fn cut(tokenizer: &Tokenizer, text: String, max_tokens: usize) -> String {
    let ids = tokenizer.encode_untrusted(&text);
    if ids.len() <= max_tokens {
        return text;
    }
    let kept = max_tokens.saturating_sub(tokenizer.encode_untrusted(CUT_MARK).len());
    let beginning = tokenizer.decode(&ids[..kept]);
    // A character whose bytes are spread over several tokens may have lost its end.
    format!("{}{CUT_MARK}", beginning.trim_end_matches('\u{fffd}'))
}
