//! Namespaces of a chat template are kept to their attributes: one that came to hold itself would be printed without an end,
//! on a stack that has one, and no error comes of that.

use std::sync::LazyLock;

use regex::Regex;

/// The code of a template, strings and all: `{% … %}`, `{{ … }}`; comments are passed over.
static CODE: LazyLock<Regex> = LazyLock::new(|| {
    let inside = r#"((?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^"'])*?)"#;
    pattern(&format!(r"(?s)\{{#.*?#\}}|\{{%{inside}%\}}|\{{\{{{inside}\}}\}}"))
});
static STRING: LazyLock<Regex> = LazyLock::new(|| pattern(r#"(?s)"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"#));
static DECLARATION: LazyLock<Regex> = LazyLock::new(|| pattern(r"\bset\s+(\w+)\s*=\s*namespace\s*\("));
static WORD: LazyLock<Regex> = LazyLock::new(|| pattern(r"\w+"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern compiles")
}

/// Refuses a template that makes a namespace otherwise than by `set NAME = namespace(…)`, or uses one otherwise than by its
/// attributes: as a value, it could be put into itself.
pub(crate) fn check_namespaces(source: &str) -> Result<(), String> {
    let code = CODE.captures_iter(source).filter_map(|found| found.get(1).or_else(|| found.get(2)));
    let code: Vec<String> = code.map(|code| STRING.replace_all(code.as_str(), "''").into_owned()).collect();
    let names: Vec<&str> = code
        .iter()
        .flat_map(|code| DECLARATION.captures_iter(code))
        .filter_map(|found| Some(found.get(1)?.as_str()))
        .collect();
    let made = code.iter().flat_map(|code| WORD.find_iter(code)).filter(|word| word.as_str() == "namespace").count();
    if made > names.len() {
        return Err("`namespace` stands elsewhere than in `set NAME = namespace(…)`".to_owned());
    }
    for code in &code {
        for word in WORD.find_iter(code).filter(|word| names.contains(&word.as_str())) {
            let (before, after) = (code[..word.start()].trim_end(), code[word.end()..].trim_start());
            let is_attribute_of_another = before.ends_with('.');
            let is_left_of_equals = after.starts_with('=') && !after.starts_with("==");
            let is_by_attribute = after.starts_with(['.', '[']) || after.starts_with("is ");
            if !(is_attribute_of_another || is_left_of_equals || is_by_attribute) {
                return Err(format!("the namespace `{}` is used as a value, not by its attributes", word.as_str()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_namespaces;

    #[test]
    fn namespaces_are_used_by_their_attributes() {
        for source in [
            "",
            "the namespace ns is text {# ns #}{# don't {{ ns #}",
            "{%- set ns = namespace(found=false, is_tool='ns }}') -%}{% if not ns.found %}{% set ns.found = true %}{% endif %}",
            "{% set ns = namespace() %}{{ ns['x'] ~ 'ns' ~ \"it's ns\" ~ message.ns }}{% if ns is defined %}{{ f(ns=1) }}{% endif %}",
            "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}",
        ] {
            assert_eq!(check_namespaces(source), Ok(()), "{source}");
        }
    }

    #[test]
    fn none_can_come_to_hold_itself() {
        for source in [
            "{% set n = namespace() %}{% set n.x = n %}{{ n.x }}",
            "{% set n = namespace() %}{% set n.x = [1, {'a': n}] %}{{ n.x }}",
            "{% set n = namespace() %}{% set m = n %}{% set n.x = m %}{{ n.x }}",
            "{% set n = namespace() %}{% set n.x = ['%}', n] %}{{ n.x }}",
            "{% set n = namespace() %}{% set n.x = [\"\\\"%}\", n] %}{{ n.x }}",
            "{% set n = namespace() %}{# ' #}{% set n.x = n %}{# ' #}",
            "{% for n in [namespace()] %}{% set n.x = n %}{{ n }}{% endfor %}",
            "{% macro m(a) %}{% set a.x = a %}{% endmacro %}{{ m(namespace()) }}",
            "{% set n = namespace() %}{% macro m(a) %}{% set a.x = a %}{% endmacro %}{{ m(n) }}",
            "{% set f = namespace %}{% set n = f() %}",
            "{% set n = namespace(x=namespace()) %}",
            "{% set n = namespace() %}{{ n == n }}",
        ] {
            assert!(check_namespaces(source).is_err(), "{source}");
        }
    }
}
