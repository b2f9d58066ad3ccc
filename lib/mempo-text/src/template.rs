//! Chat templates as Hugging Face renders them, in a sandbox: no files; bounded source, work, time, memory and output.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mempo_guard::{Bounds, bounded};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;

use crate::error::Error;
use crate::json::{python_json, python_json_indented};
use crate::namespaces::check_namespaces;
use crate::tokenizer::{read_json, token_text};

/// Instructions a template may run; Qwen's needs some hundred for a short conversation.
const FUEL: u64 = 1_000_000;
/// Bytes of the longest template; well-known ones have up to 17,000.
const SOURCE_BYTES: usize = 64 * 1024;
/// Bytes a template may write beyond four times its input.
const OUTPUT_ALLOWANCE: usize = 64 * 1024;
/// What reading or rendering one may take; the stack is for its recursion.
const BOUNDS: Bounds = Bounds { time: Some(Duration::from_secs(10)), memory: 1 << 30, stack: 512 << 20 };

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of that role.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into() }
    }
}

/// The names a template can use. Our tools stand in the system text, so `tools` is none, as in transformers.
#[derive(Serialize)]
struct Context {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    tools: (),
    documents: (),
    #[serde(flatten)]
    special_tokens: BTreeMap<String, String>,
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// `bos_token` and so on, which templates refer to by name.
    special_tokens: BTreeMap<String, String>,
    path: PathBuf,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json` (the one named `default` if
    /// there are several).
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or_default();
        let jinja_path = dir.join("chat_template.jinja");
        let (path, source) = match fs_err::read_to_string(&jinja_path) {
            Ok(source) => (jinja_path, source),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let message = "no chat_template here and no chat_template.jinja beside it: take both files from the \
                               instruct model of the same family";
                let source = config_template(&config["chat_template"])
                    .ok_or_else(|| Error::File { path: config_path.clone(), message: message.to_owned() })?;
                (config_path, source)
            }
            Err(error) => return Err(error.into()),
        };
        let tokens = ["bos_token", "eos_token", "pad_token", "unk_token"];
        let special_tokens =
            tokens.iter().filter_map(|name| Some(((*name).to_owned(), token_text(&config[name])?))).collect();
        Self::new(source, special_tokens, path)
    }

    fn new(source: String, special_tokens: BTreeMap<String, String>, path: PathBuf) -> Result<Self, Error> {
        let error = |message| Error::Template { path: path.clone(), message };
        if source.len() > SOURCE_BYTES {
            return Err(error(format!("it has {} bytes, more than {SOURCE_BYTES}", source.len())));
        }
        check_namespaces(&source).map_err(error)?;
        let environment = within_bounds(|| environment(source)).map_err(error)?;
        Ok(Self { environment: Arc::new(environment), special_tokens, path })
    }

    /// The conversation as the template writes it, with the opening of the assistant's next turn if asked for.
    pub fn render(&self, messages: Vec<Message>, add_generation_prompt: bool) -> Result<String, Error> {
        let (environment, special_tokens) = (Arc::clone(&self.environment), self.special_tokens.clone());
        let context = Context { messages, add_generation_prompt, tools: (), documents: (), special_tokens };
        within_bounds(move || render(&environment, context)).map_err(|message| self.error(message))
    }

    /// An error that names this template.
    pub(crate) fn error(&self, message: String) -> Error {
        Error::Template { path: self.path.clone(), message }
    }
}

fn within_bounds<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    bounded(&BOUNDS, work).map_err(|given_up| given_up.to_string()).flatten()
}

/// The engine with the template in it.
fn environment(source: String) -> Result<Environment<'static>, String> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    let mut environment = Environment::new();
    environment.set_syntax(syntax.map_err(|error| told(&error))?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_template_owned("chat_template", source).map_err(|error| told(&error))?;
    Ok(environment)
}

fn render(environment: &Environment<'static>, context: Context) -> Result<String, String> {
    let content_bytes: usize = context.messages.iter().map(|message| message.content.len()).sum();
    let mut output = CappedWriter { bytes: Vec::new(), limit: 4 * content_bytes + OUTPUT_ALLOWANCE };
    let template = environment.get_template("chat_template").map_err(|error| told(&error))?;
    template.render_captured_to(Serde(context), &mut output).map_err(|error| told(&error))?;
    String::from_utf8(output.bytes).map_err(|error| error.to_string())
}

/// An error with its causes in one line.
fn told(error: &minijinja::Error) -> String {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        message = format!("{message}: {inner}");
        cause = inner.source();
    }
    message
}

fn config_template(value: &serde_json::Value) -> Option<String> {
    let named = |name: &str| value.as_array()?.iter().find(|entry| entry["name"] == name)?["template"].as_str();
    value.as_str().or_else(|| named("default")).map(str::to_owned)
}

/// `tojson` of transformers: Python's separators, nothing escaped but what JSON demands.
#[allow(clippy::needless_pass_by_value, reason = "the engine hands keyword arguments over by value")]
fn tojson(value: &minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ensure_ascii == Some(true) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson(ensure_ascii=true) is not supported"));
    }
    let value = serde_json::to_value(value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(indent.map_or_else(|| python_json(&value), |indent| python_json_indented(&value, indent)))
}

fn raise_exception(message: &str) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// Templates that print today's date get a fixed one, 26 July 2024 (the fallback date of Llama's own template): the
/// same inputs must give the same prompt on every day.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        text.push_str(match characters.next() {
            Some('d' | 'e') => "26",
            Some('m') => "07",
            Some('b') => "Jul",
            Some('B') => "July",
            Some('y') => "24",
            Some('Y') => "2024",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('H' | 'M' | 'S') => "00",
            Some('F') => "2024-07-26",
            Some('%') => "%",
            _ => {
                let message = format!("strftime_now cannot write {format:?}");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(text)
}

struct CappedWriter {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for CappedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!("the template writes more than {} bytes", self.limit)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        template: String,
        special_tokens: BTreeMap<String, String>,
        messages: Vec<(String, String)>,
        add_generation_prompt: bool,
        expected: String,
    }

    fn template(source: &str) -> Result<ChatTemplate, Error> {
        ChatTemplate::new(source.to_owned(), BTreeMap::new(), PathBuf::from("here"))
    }

    #[test]
    fn same_as_transformers() {
        let cases: Vec<Golden> = serde_json::from_str(include_str!("../tests/golden/templates.json")).unwrap();
        assert!(cases.len() >= 15);
        for case in cases {
            let source = fs_err::read_to_string(format!("tests/golden/{}", case.template)).unwrap();
            let template = ChatTemplate::new(source, case.special_tokens, PathBuf::from(&case.template)).unwrap();
            let messages: Vec<Message> =
                case.messages.iter().map(|(role, content)| Message::new(role, content.as_str())).collect();
            let found = template.render(messages, case.add_generation_prompt).unwrap();
            assert_eq!(found, case.expected, "{} {:?}", case.template, case.messages);
        }
    }

    #[test]
    fn a_hostile_template_ends() {
        let messages = || vec![Message::new("user", "x")];
        for source in [
            &"x".repeat(SOURCE_BYTES + 1),
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
            "{% for i in range(900) %}{% if range(99999) | sort | unique | list %}{% endif %}{% endfor %}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for a in range(90000) %}{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}",
            "{{ raise_exception('only users') }}",
            "{{ messages[0].content.nothing.more }}",
            "{% include '/etc/passwd' %}",
            "{{ strftime_now('%Q') }}",
        ] {
            let error =
                template(source).and_then(|template| template.render(messages(), true)).unwrap_err().to_string();
            assert!(error.starts_with("chat template of here: "), "{error}");
        }
        let error = template("{{ raise_exception('only users') }}").unwrap().render(messages(), true).unwrap_err();
        assert!(error.to_string().contains("only users"), "{error}");
        assert!(template("{% if %}").is_err());
    }

    #[test]
    fn deep_nesting_does_not_end_the_process() {
        let nested = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(15_000), close.repeat(15_000));
        let chain = |link: &str| format!("{{{{ 1{} }}}}", link.repeat(60_000 / link.len()));
        let list = "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}";
        for source in [
            nested("(", ")"),
            nested("[", "]"),
            nested("not ", ""),
            chain("~1"),
            chain("|string"),
            chain(" or 0"),
            list.into(),
        ] {
            // Whatever comes of it.
            let _ = template(&source).and_then(|template| template.render(vec![], true));
        }
    }

    #[test]
    fn the_date_stands_still() {
        let text = template("{{ strftime_now('%d %b %Y, 100%%') }}").unwrap().render(vec![], false).unwrap();
        assert_eq!(text, "26 Jul 2024, 100%");
    }
}
