//! What splitting expressions tell characters apart by: letters, numbers, white space, the rest.

use std::sync::OnceLock;

use tokenizers::utils::SysRegex;

/// What a character is to a splitting expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\r` or `\n`
    LineBreak,
    /// `\s` beside those
    Space,
    /// None of these.
    Other,
    /// A word of its own, whatever stands beside it.
    Alone,
}

const PAGE: usize = 256;
const PAGES: usize = (char::MAX as usize + 1) / PAGE;

/// The class of every character. It is asked of the library's own engine of regular expressions, a page of 256 characters at
/// a time when one of them first occurs, so no difference in versions of Unicode can come between.
pub(super) struct Classes {
    pages: Vec<OnceLock<[Class; PAGE]>>,
    expressions: [(SysRegex, Class); 4],
    /// Whether each digit is a word of its own, as after the pre-tokenizer `Digits`.
    digits_alone: bool,
}

impl Classes {
    /// None where the engine refuses the expressions.
    pub(super) fn new(digits_alone: bool) -> Option<Self> {
        let expression = |text, class| Some((SysRegex::new(text).ok()?, class));
        let expressions = [
            expression(r"\p{L}", Class::Letter)?,
            expression(r"\p{N}", Class::Number)?,
            expression(r"\s", Class::Space)?,
            expression(r"[\r\n]", Class::LineBreak)?,
        ];
        Some(Self { pages: (0..PAGES).map(|_| OnceLock::new()).collect(), expressions, digits_alone })
    }

    /// The class of the character that begins at a byte of the text, and where it ends; nothing at the end of the text.
    pub(super) fn at(&self, text: &str, start: usize) -> Option<(Class, usize)> {
        let byte = *text.as_bytes().get(start)?;
        if byte.is_ascii() {
            return Some((self.page(0)[usize::from(byte)], start + 1));
        }
        let character = text[start..].chars().next()?;
        let class = self.page(character as usize / PAGE)[character as usize % PAGE];
        Some((class, start + character.len_utf8()))
    }

    /// Where the characters of a class end that begin at `start`.
    pub(super) fn run(&self, text: &str, start: usize, class: Class) -> usize {
        let mut end = start;
        while let Some((found, next)) = self.at(text, end)
            && found == class
        {
            end = next;
        }
        end
    }

    fn page(&self, page: usize) -> &[Class; PAGE] {
        self.pages[page].get_or_init(|| self.look_up(page))
    }

    fn look_up(&self, page: usize) -> [Class; PAGE] {
        let mut classes = [Class::Other; PAGE];
        // Surrogates are no characters.
        let characters = (page * PAGE..).take(PAGE).filter_map(|code| char::from_u32(code as u32));
        let text: String = characters.clone().collect();
        let place = |start: usize| text[start..].chars().next().map_or(0, |found| found as usize % PAGE);
        for (expression, class) in &self.expressions {
            for (start, _) in expression.find_iter(&text) {
                classes[place(start)] = *class;
            }
        }
        if self.digits_alone {
            for digit in characters.filter(|character| character.is_numeric()) {
                classes[digit as usize % PAGE] = Class::Alone;
            }
        }
        classes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_of_every_class() {
        let classes = Classes::new(false).unwrap();
        for (characters, class) in [
            ("azA\u{e9}\u{17f}東𝒜\u{5d0}ー", Class::Letter),
            ("09²½Ⅷ٣𝟘", Class::Number),
            (" \t\u{b}\u{c}\u{85}\u{a0}\u{2028}\u{3000}", Class::Space),
            ("\r\n", Class::LineBreak),
            ("\0!'_\u{301}\u{200b}🙂\u{feff}\u{e000}\u{10ffff}", Class::Other),
        ] {
            for character in characters.chars() {
                let found = classes.at(&format!("-{character}-"), 1);
                assert_eq!(found, Some((class, 1 + character.len_utf8())), "{character:?}");
            }
        }
        assert_eq!(classes.at("a", 1), None);
        assert_eq!((classes.run("ab1", 0, Class::Letter), classes.run("ab1", 0, Class::Number)), (2, 0));
        assert_eq!(Classes::new(true).unwrap().at("٣x", 0), Some((Class::Alone, 2)));
    }
}
