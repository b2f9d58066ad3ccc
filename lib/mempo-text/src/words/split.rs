//! Text cut into words as published pre-tokenizers cut it, without their regular expressions.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::classes::{Class, Classes};

/// The expression of Qwen2, Qwen2.5 and Qwen3; Llama 3's is the same with three digits a word.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Which expression words are cut by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expression {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`: GPT-2's, which `ByteLevel` has built in.
    Gpt2,
    /// [`QWEN2`] or [`LLAMA3`], with the most digits of a word.
    Gpt4 { digits: usize },
}

/// Cuts text as a pre-tokenizer does whose expression is known.
pub(super) struct Splitter {
    expression: Expression,
    classes: Classes,
}

impl Splitter {
    /// One that cuts as this pre-tokenizer does; none where it is not of a known form.
    pub(super) fn like(pre_tokenizer: Option<&PreTokenizerWrapper>) -> Option<Self> {
        use PreTokenizerWrapper::{ByteLevel, Digits, Sequence, Split};
        let parts = match pre_tokenizer? {
            Sequence(parts) => parts.as_ref(),
            one => std::slice::from_ref(one),
        };
        let (expression, digits_alone) = match parts {
            [ByteLevel(bytes)] if splits(*bytes) == Some(true) => (Expression::Gpt2, false),
            [Digits(digits), ByteLevel(bytes)] if splits(*bytes) == Some(true) && digits.individual_digits => {
                (Expression::Gpt2, true)
            }
            [Split(split), ByteLevel(bytes)] if splits(*bytes) == Some(false) => (expression_of(split)?, false),
            _ => return None,
        };
        Some(Self { expression, classes: Classes::new(digits_alone)? })
    }

    /// Where the word ends that begins at `start`, which is not the end of the text.
    pub(super) fn word_end(&self, text: &str, start: usize) -> usize {
        let Some((class, next)) = self.classes.at(text, start) else { return text.len() };
        if class == Class::Alone {
            return next;
        }
        let byte = text.as_bytes()[start];
        let any_case = self.expression != Expression::Gpt2;
        if byte == b'\''
            && let Some(length) = contraction(&text[next..], any_case)
        {
            return next + length;
        }
        match self.expression {
            Expression::Gpt2 => self.gpt2(text, (start, next), class),
            Expression::Gpt4 { digits } => self.gpt4(text, (start, next), class, digits),
        }
    }

    fn gpt2(&self, text: &str, (start, next): (usize, usize), class: Class) -> usize {
        let joined = |class| matches!(class, Class::Letter | Class::Number | Class::Other);
        if joined(class) {
            return self.classes.run(text, next, class);
        }
        match self.classes.at(text, next) {
            Some((class, after)) if text.as_bytes()[start] == b' ' && joined(class) => {
                self.classes.run(text, after, class)
            }
            _ => self.white_space(text, start).0,
        }
    }

    fn gpt4(&self, text: &str, (start, next): (usize, usize), class: Class, digits: usize) -> usize {
        let after = self.classes.at(text, next).map(|(class, _)| class);
        match class {
            Class::Letter => self.classes.run(text, next, Class::Letter),
            Class::Number => self.numbers(text, next, digits - 1),
            Class::Space | Class::Other if after == Some(Class::Letter) => self.classes.run(text, next, Class::Letter),
            Class::Other => self.others(text, next),
            Class::Space if text.as_bytes()[start] == b' ' && after == Some(Class::Other) => self.others(text, next),
            Class::Space | Class::LineBreak | Class::Alone => {
                let (end, after_line_break) = self.white_space(text, start);
                after_line_break.unwrap_or(end)
            }
        }
    }

    fn numbers(&self, text: &str, start: usize, most: usize) -> usize {
        let mut end = start;
        for _ in 0..most {
            match self.classes.at(text, end) {
                Some((Class::Number, next)) => end = next,
                _ => break,
            }
        }
        end
    }

    /// `[^\s\p{L}\p{N}]*[\r\n]*`
    fn others(&self, text: &str, start: usize) -> usize {
        let end = self.classes.run(text, start, Class::Other);
        self.classes.run(text, end, Class::LineBreak)
    }

    /// Ends of `\s+(?!\S)|\s+` and, where a line break is among these, of `\s*[\r\n]+`.
    fn white_space(&self, text: &str, start: usize) -> (usize, Option<usize>) {
        let (mut end, mut before_last, mut after_line_break) = (start, start, None);
        while let Some((class @ (Class::Space | Class::LineBreak), next)) = self.classes.at(text, end) {
            (before_last, end) = (end, next);
            if class == Class::LineBreak {
                after_line_break = Some(end);
            }
        }
        // The last one goes with what follows, if that is of the same piece of text.
        let followed = self.classes.at(text, end).is_some_and(|(class, _)| class != Class::Alone);
        let end = if followed && before_last > start { before_last } else { end };
        (end, after_line_break)
    }
}

/// Whether it cuts by its own expression; nothing where it adds to the text.
fn splits(bytes: ByteLevel) -> Option<bool> {
    (!bytes.add_prefix_space).then_some(bytes.use_regex)
}

fn expression_of(split: &Split) -> Option<Expression> {
    match &split.pattern {
        _ if split.invert || split.behavior != SplitDelimiterBehavior::Isolated => None,
        SplitPattern::Regex(text) if text == QWEN2 => Some(Expression::Gpt4 { digits: 1 }),
        SplitPattern::Regex(text) if text == LLAMA3 => Some(Expression::Gpt4 { digits: 3 }),
        _ => None,
    }
}

/// Bytes of `s`, `t`, `re`, `ve`, `m`, `ll` or `d` at the beginning of what follows an apostrophe.
fn contraction(text: &str, any_case: bool) -> Option<usize> {
    let mut letters = text.chars().map(|letter| match letter {
        // The long s is one of the cases of s.
        'ſ' if any_case => 's',
        _ if any_case => letter.to_ascii_lowercase(),
        _ => letter,
    });
    match (letters.next()?, letters.next()) {
        ('s' | 't' | 'm' | 'd', _) => text.chars().next().map(char::len_utf8),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => Some(2),
        _ => None,
    }
}
