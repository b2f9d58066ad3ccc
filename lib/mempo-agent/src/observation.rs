//! Observations cut to length.

use mempo_text::Tokenizer;

/// Ends an observation that was cut.
const MARK: &str = " ... [cut]";

/// `text` if it has at most `max_tokens` tokens, else its beginning, cut between tokens, with a mark that says so.
pub(crate) fn cut(tokenizer: &Tokenizer, text: String, max_tokens: usize) -> String {
    let ids = tokenizer.encode_untrusted(&text);
    if ids.len() <= max_tokens {
        return text;
    }
    let kept = max_tokens.saturating_sub(tokenizer.encode_untrusted(MARK).len());
    let beginning = tokenizer.decode(&ids[..kept]);
    // A character whose bytes are spread over several tokens may have lost its end.
    format!("{}{MARK}", beginning.trim_end_matches('\u{fffd}'))
}
