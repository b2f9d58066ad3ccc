//! `calculator`: arithmetic in double precision. What is wrong with an expression is told to the policy.

use mempo_text::ToolSpec;
use serde_json::{Value, json};

use crate::{Tool, ToolFailure};

/// Longest expression, in bytes.
const LONGEST: usize = 1000;
/// Deepest nesting of parentheses, signs and powers.
const DEEPEST: usize = 50;
/// Digits of a result that are certain after some operations.
const DIGITS: usize = 14;

/// The tool.
pub struct Calculator;

impl Tool for Calculator {
    fn spec(&self) -> ToolSpec {
        let description = "Evaluates an arithmetic expression: + - * / % ^, parentheses, abs, sqrt, exp, ln, log10, \
                           sin, cos, tan, floor, ceil, round, min, max, pi, e.";
        ToolSpec {
            name: "calculator".to_owned(),
            description: description.to_owned(),
            parameters: json!({
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "Such as (3 + 4) * 2 ^ 0.5."}},
                "required": ["expression"],
            }),
        }
    }

    fn call(&self, arguments: &Value) -> Result<String, ToolFailure> {
        let Some(expression) = arguments.get("expression").and_then(Value::as_str) else {
            let text = "Error: `calculator` takes {\"expression\": \"arithmetic\"}.";
            return Err(ToolFailure::BadArguments(text.to_owned()));
        };
        Ok(match evaluate(expression) {
            Ok(value) => render(value),
            Err(problem) => format!("Error: {problem}."),
        })
    }
}

/// Without the last digits, which rounding may have touched.
fn render(value: f64) -> String {
    let rounded: f64 = format!("{value:.DIGITS$e}").parse().unwrap_or(value);
    match rounded.abs() {
        0.0 => "0".to_owned(),
        size if (1e-6..1e15).contains(&size) => rounded.to_string(),
        _ => format!("{rounded:e}"),
    }
}

/// The value of an expression, or what is wrong with it.
fn evaluate(expression: &str) -> Result<f64, String> {
    if expression.len() > LONGEST {
        return Err(format!("the expression has more than {LONGEST} characters"));
    }
    let mut parser = Parser { text: expression, place: 0, depth: 0 };
    let value = parser.sum()?;
    match parser.peek() {
        None if value.is_finite() => Ok(value),
        None => Err("the result is not a number or too large".to_owned()),
        Some(_) => Err(parser.unexpected("an operator")),
    }
}

/// Reads and evaluates from left to right: sum, product, sign, power, atom.
struct Parser<'a> {
    text: &'a str,
    /// Byte reached.
    place: usize,
    depth: usize,
}

impl Parser<'_> {
    /// The next character that is no space.
    fn peek(&mut self) -> Option<char> {
        let rest = self.text[self.place..].trim_start();
        self.place = self.text.len() - rest.len();
        rest.chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let is_next = self.peek() == Some(wanted);
        self.place += if is_next { wanted.len_utf8() } else { 0 };
        is_next
    }

    fn unexpected(&mut self, expected: &str) -> String {
        match self.peek() {
            Some(found) => format!("expected {expected} at character {}, found `{found}`", self.character()),
            None => format!("expected {expected} at the end"),
        }
    }

    /// Number of the character reached, from 1.
    fn character(&self) -> usize {
        self.text[..self.place].chars().count() + 1
    }

    fn sum(&mut self) -> Result<f64, String> {
        let mut value = self.product()?;
        loop {
            if self.take('+') {
                value += self.product()?;
            } else if self.take('-') || self.take('−') {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<f64, String> {
        let mut value = self.signed()?;
        loop {
            if self.take('*') || self.take('×') {
                value *= self.signed()?;
            } else if self.take('/') || self.take('÷') {
                value /= nonzero(self.signed()?)?;
            } else if self.take('%') {
                value %= nonzero(self.signed()?)?;
            } else {
                return Ok(value);
            }
        }
    }

    /// A power binds more tightly than a sign before it: -2^2 is -4.
    fn signed(&mut self) -> Result<f64, String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("nested more than {DEEPEST} deep"));
        }
        let value = if self.take('-') || self.take('−') {
            -self.signed()?
        } else if self.take('+') {
            self.signed()?
        } else {
            self.power()?
        };
        self.depth -= 1;
        Ok(value)
    }

    /// From the right: 2^3^2 is 2^9. `**` is a power, too.
    fn power(&mut self) -> Result<f64, String> {
        let base = self.atom()?;
        self.peek();
        if self.text[self.place..].starts_with("**") {
            self.place += 2;
        } else if !self.take('^') {
            return Ok(base);
        }
        Ok(base.powf(self.signed()?))
    }

    fn atom(&mut self) -> Result<f64, String> {
        match self.peek() {
            Some('(') => {
                let values = self.parenthesised()?;
                let count = values.len();
                <[f64; 1]>::try_from(values)
                    .map(|[value]| value)
                    .map_err(|_| format!("{count} values in parentheses, expected one"))
            }
            Some(first) if first.is_ascii_digit() || first == '.' => self.number(),
            Some(first) if first.is_ascii_alphabetic() => self.named(),
            _ => Err(self.unexpected("a number")),
        }
    }

    /// Values between parentheses, separated by commas.
    fn parenthesised(&mut self) -> Result<Vec<f64>, String> {
        if !self.take('(') {
            return Err(self.unexpected("`(`"));
        }
        let mut values = vec![self.sum()?];
        while self.take(',') {
            values.push(self.sum()?);
        }
        if self.take(')') { Ok(values) } else { Err(self.unexpected("`)`")) }
    }

    fn number(&mut self) -> Result<f64, String> {
        let rest = &self.text[self.place..];
        let digits = |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let mut length = digits(rest);
        if let Some(exponent) = rest[length..].strip_prefix(['e', 'E']) {
            let sign = usize::from(exponent.starts_with(['+', '-']));
            let digits = exponent[sign..].bytes().take_while(u8::is_ascii_digit).count();
            length += if digits > 0 { 1 + sign + digits } else { 0 };
        }
        let text = &rest[..length];
        self.place += length;
        text.parse().map_err(|_| format!("`{text}` is no number"))
    }

    /// A constant, or a function with its values.
    fn named(&mut self) -> Result<f64, String> {
        let rest = &self.text[self.place..];
        let name = &rest[..rest.bytes().take_while(u8::is_ascii_alphanumeric).count()];
        self.place += name.len();
        match name {
            "pi" => return Ok(std::f64::consts::PI),
            "e" => return Ok(std::f64::consts::E),
            _ => {}
        }
        let one: Option<fn(f64) -> f64> = match name {
            "abs" => Some(f64::abs),
            "sqrt" => Some(f64::sqrt),
            "exp" => Some(f64::exp),
            "ln" => Some(f64::ln),
            "log10" => Some(f64::log10),
            "sin" => Some(f64::sin),
            "cos" => Some(f64::cos),
            "tan" => Some(f64::tan),
            "floor" => Some(f64::floor),
            "ceil" => Some(f64::ceil),
            "round" => Some(f64::round),
            "min" | "max" => None,
            _ => return Err(format!("there is no `{name}`")),
        };
        let values = self.parenthesised()?;
        if values.iter().any(|value| value.is_nan()) {
            return Err(format!("a value given to `{name}` is not a number"));
        }
        match (one, &values[..]) {
            (Some(function), [value]) => Ok(function(*value)),
            (Some(_), _) => Err(format!("`{name}` takes one value, found {}", values.len())),
            (None, _) if name == "min" => Ok(values.into_iter().fold(f64::INFINITY, f64::min)),
            (None, _) => Ok(values.into_iter().fold(f64::NEG_INFINITY, f64::max)),
        }
    }
}

fn nonzero(divisor: f64) -> Result<f64, String> {
    if divisor == 0.0 { Err("division by zero".to_owned()) } else { Ok(divisor) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An expression written with all its parentheses, and its value computed beside it.
    fn expressions() -> impl Strategy<Value = (String, f64)> {
        let number = (0_u32..1000, 0_u32..100).prop_map(|(whole, part)| {
            let text = format!("{whole}.{part:02}");
            let value: f64 = text.parse().unwrap();
            (text, value)
        });
        number.prop_recursive(6, 60, 2, |inner| {
            (inner.clone(), inner, 0..7_usize, " {0,2}").prop_map(|((a, x), (b, y), which, space)| match which {
                0 => (format!("({a}{space}+{space}{b})"), x + y),
                1 => (format!("({a}{space}-{b})"), x - y),
                2 => (format!("{space}({a} *{space}{b})"), x * y),
                3 => (format!("({a}/{space}(abs({b})+1))"), x / (y.abs() + 1.0)),
                4 => (format!("(-{a})"), -x),
                5 => (format!("max({a},{space}{b})"), x.max(y)),
                _ => (format!("sqrt(abs({a}))"), x.abs().sqrt()),
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn values_are_those_computed_beside_them((text, value) in expressions()) {
            prop_assume!(text.len() <= LONGEST);
            prop_assert_eq!(evaluate(&text), Ok(value), "{}", text);
        }

        #[test]
        fn anything_else_is_a_value_or_an_error(text in r"([-+*/%^(),. 0-9e−×é]|sqrt|min|pi|\*\*){0,60}") {
            if let Ok(value) = evaluate(&text) {
                prop_assert!(value.is_finite());
            }
        }
    }

    #[test]
    fn operators_bind_as_in_writing() {
        for (text, value) in [
            ("1 + 2 * 3", "7"),
            ("2 * 3 % 4", "2"),
            ("10 - 4 - 3", "3"),
            ("100 / 10 / 5", "2"),
            ("-2 ^ 2", "-4"),
            ("2 ^ -1", "0.5"),
            ("2 ^ 3 ^ 2", "512"),
            ("2 ** 10", "1024"),
            ("2 × 3 − 8 ÷ 4", "4"),
            ("0.1 + 0.2", "0.3"),
            ("1e3 + 2.5E-1", "1000.25"),
            ("2e", "Error: expected an operator at character 2, found `e`."),
            ("2 * e", "5.43656365691809"),
            ("12345678901 * 10", "123456789010"),
            ("10 ^ 20", "1e20"),
            ("1 / 3", "0.333333333333333"),
            ("5 - 5", "0"),
            ("min(3, 1, 2) + max(4)", "5"),
            ("round(2.5) + floor(-0.5) + ceil(0.2)", "3"),
        ] {
            assert_eq!(Calculator.call(&json!({ "expression": text })), Ok(value.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, told) in [
            ("", "expected a number at the end"),
            ("1 +", "expected a number at the end"),
            ("(1", "expected `)` at the end"),
            ("1 2", "expected an operator at character 3, found `2`"),
            ("é", "expected a number at character 1, found `é`"),
            ("1.2.3", "`1.2.3` is no number"),
            ("1 / (2 - 2)", "division by zero"),
            ("sqrt(-1)", "not a number or too large"),
            ("10 ^ 400", "not a number or too large"),
            ("tau", "there is no `tau`"),
            ("sqrt", "expected `(` at the end"),
            ("sqrt(1, 2)", "`sqrt` takes one value, found 2"),
            ("(1, 2)", "2 values in parentheses, expected one"),
            ("__import__('os')", "expected a number at character 1"),
            (&"(".repeat(300), "nested more than 50 deep"),
            (&"-".repeat(300), "nested more than 50 deep"),
            (&"2^".repeat(300), "nested more than 50 deep"),
            (&"1+".repeat(600), "more than 1000 characters"),
        ] {
            let error = evaluate(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
        for arguments in [json!({}), json!({"expression": 3}), json!([])] {
            assert!(matches!(Calculator.call(&arguments), Err(ToolFailure::BadArguments(_))));
        }
    }
}
