use tokenizers::NormalizedString;

/// The text as it is compared where only its words count: white space is one blank, letters are lower case and composed (NFC).
///
/// ```
/// assert_eq!(mempo_text::fold("Caf\u{e9}\u{a0}au\n  lait "), mempo_text::fold("CAFE\u{301} au lait"));
/// assert_ne!(mempo_text::fold("1.5 m"), mempo_text::fold("15 m"));
/// ```
pub fn fold(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    let text = words.join(" ");
    if text.is_ascii() {
        return text;
    }
    NormalizedString::from(text).nfc().get().to_owned()
}
