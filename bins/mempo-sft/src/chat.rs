//! Chat messages as OpenAI, Hugging Face, ShareGPT and Swift write them -> a question and what was done about it.
//!
//! They differ in the names of keys and roles, and in where a tool call stands: beside the assistant's text (OpenAI's
//! `tool_calls`, arguments as text; Hugging Face's as an object), or in a message of its own (ShareGPT, Swift).

use std::collections::BTreeMap;

use mempo_text::python_json;
use serde::Deserialize;
use serde_json::Value;

/// What was left out of a row, by name, and how often.
pub type Ignored = BTreeMap<&'static str, u64>;

/// The name of system messages in [`Ignored`]: the profile has its own.
pub(crate) const SYSTEM_MESSAGES: &str = "system messages ignored";
/// The name of reasoning that is no part of the text in [`Ignored`].
const REASONING: &str = "reasoning_content ignored";

/// A question and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demonstration {
    /// The first user turn.
    pub question: String,
    /// What the expert wrote, and what came back.
    pub turns: Vec<Turn>,
    /// What was left out.
    pub ignored: Ignored,
}

/// One assistant turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The assistant's text, tool call included.
    pub completion: String,
    /// What followed it.
    pub observation: Option<String>,
    /// False where the message's `loss_mask` or `weight` is 0, its `train` or `loss` false.
    pub trained: bool,
}

/// One message, in any of the forms.
#[derive(Deserialize)]
pub(crate) struct Message {
    #[serde(alias = "from")]
    role: String,
    #[serde(alias = "value")]
    content: Option<Content>,
    tool_calls: Option<Vec<ToolCall>>,
    /// OpenAI's, before there were `tool_calls`.
    function_call: Option<Function>,
    reasoning_content: Option<Value>,
    #[serde(flatten)]
    marks: Marks,
}

/// Whether an assistant's message is learnt, as some call it: `loss_mask` verl, `weight` OpenAI, `train` axolotl, `loss`
/// Swift.
#[derive(Default, Deserialize)]
struct Marks {
    loss_mask: Option<Value>,
    weight: Option<Value>,
    train: Option<Value>,
    loss: Option<Value>,
}

impl Marks {
    const NOTHING_LEARNT: Value = Value::Bool(false);

    /// Whether the message is learnt; yes where it does not say.
    fn trained(&self) -> Result<bool, String> {
        let named =
            [("loss_mask", &self.loss_mask), ("weight", &self.weight), ("train", &self.train), ("loss", &self.loss)];
        let mut said: Option<(&str, bool)> = None;
        for (name, value) in named.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
            let trained = match value {
                Value::Bool(trained) => *trained,
                number if number.as_f64() == Some(0.0) => false,
                number if number.as_f64() == Some(1.0) => true,
                other => return Err(format!("{name} {other}, expected 0 or 1")),
            };
            match said {
                Some((other, before)) if before != trained => {
                    return Err(format!("{other} says {}, {name} says {}", u8::from(before), u8::from(trained)));
                }
                _ => said = Some((name, trained)),
            }
        }
        Ok(said.is_none_or(|(_, trained)| trained))
    }
}

impl Message {
    /// What an assistant says.
    pub(crate) fn assistant(text: String) -> Self {
        Self {
            role: "assistant".to_owned(),
            content: Some(Content::Text(text)),
            tool_calls: None,
            function_call: None,
            reasoning_content: None,
            marks: Marks::default(),
        }
    }

    /// Makes it something to see and not to learn.
    pub(crate) fn not_trained(&mut self) {
        self.marks = Marks { loss_mask: Some(Marks::NOTHING_LEARNT), ..Marks::default() };
    }

    fn speaker(&self) -> Result<Speaker, String> {
        match self.role.as_str() {
            "system" | "developer" => Ok(Speaker::System),
            "assistant" | "gpt" => Ok(Speaker::Assistant),
            "tool_call" | "function_call" => Ok(Speaker::Call),
            "user" | "human" | "tool" | "function" | "tool_response" | "observation" => Ok(Speaker::World),
            other => {
                Err(format!("role `{other}`, expected system, user, assistant or tool, or ShareGPT's or Swift's names"))
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaker {
    System,
    Assistant,
    /// The assistant's tool call, in a message of its own.
    Call,
    /// The user or a tool.
    World,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    text: Option<String>,
}

#[derive(Deserialize)]
struct ToolCall {
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    arguments: Value,
}

/// The trajectory that messages tell of.
pub(crate) fn demonstration(messages: Vec<Message>) -> Result<Demonstration, String> {
    let mut question = None;
    let mut turns: Vec<Turn> = Vec::new();
    let mut ignored = Ignored::new();
    let mut messages = messages.into_iter().enumerate().peekable();
    while let Some((index, message)) = messages.next() {
        let at = |problem: String| format!("message {index}: {problem}");
        let speaker = message.speaker().map_err(at)?;
        if message.reasoning_content.as_ref().is_some_and(says_something) {
            *ignored.entry(REASONING).or_default() += 1;
        }
        let open = turns.last_mut().filter(|turn| turn.observation.is_none());
        match (speaker, open) {
            (Speaker::System, _) => *ignored.entry(SYSTEM_MESSAGES).or_default() += 1,
            (Speaker::Assistant | Speaker::Call, _) if question.is_none() => {
                return Err(at("an assistant turn before the question".into()));
            }
            (Speaker::Assistant, Some(_)) => {
                return Err(at("two assistant turns in a row, expected a user or tool turn between them".into()));
            }
            (Speaker::Call, Some(turn)) => {
                if message.marks.trained().map_err(at)? != turn.trained {
                    return Err(at("it is part of the turn before it, but only one of them is to be learnt".into()));
                }
                add_call(&mut turn.completion, call_of(message).map_err(at)?).map_err(at)?;
            }
            (Speaker::Assistant | Speaker::Call, None) => {
                let turn = turn(message, speaker).map_err(at)?;
                let goes_on = messages.peek().is_some_and(|(_, next)| next.speaker() == Ok(Speaker::Call));
                if turn.trained && turn.completion.is_empty() && !goes_on {
                    return Err(at("an empty assistant turn: there is nothing to learn".into()));
                }
                turns.push(turn);
            }
            (Speaker::World, _) => {
                let text = content_text(message.content).map_err(at)?;
                match turns.last_mut() {
                    Some(turn) => observe(&mut turn.observation, &text),
                    None if question.is_some() => {
                        return Err(at("a second user turn before any assistant turn".into()));
                    }
                    None if text.trim().is_empty() => return Err(at("an empty question".into())),
                    None => question = Some(text),
                }
            }
        }
    }
    let question = question.ok_or("no user turn: there is no question")?;
    if turns.is_empty() {
        return Err("no assistant turn: the row has no targets".into());
    }
    Ok(Demonstration { question, turns, ignored })
}

fn turn(mut message: Message, speaker: Speaker) -> Result<Turn, String> {
    let trained = message.marks.trained()?;
    let calls = message.tool_calls.take().unwrap_or_default().into_iter().map(|call| call.function);
    let calls: Vec<Function> = calls.chain(message.function_call.take()).collect();
    let mut completion = String::new();
    if speaker == Speaker::Call {
        add_call(&mut completion, call_of(message)?)?;
    } else {
        completion = content_text(message.content)?;
    }
    if calls.len() > 1 {
        return Err(several_calls(calls.len()));
    }
    for call in calls {
        add_call(&mut completion, call)?;
    }
    Ok(Turn { completion, observation: None, trained })
}

/// A step makes one call: calls side by side have nothing to stand in.
fn several_calls(count: usize) -> String {
    format!(
        "{count} tool calls in one turn, expected at most one a step: calls side by side cannot be told apart here; one call \
         of `search` takes several queries as a list"
    )
}

/// Whether a value is more than nothing: null, empty text, an empty list or object.
pub(crate) fn says_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !matches!(text.trim(), "" | "[]" | "{}"),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// The call that a message consists of.
fn call_of(message: Message) -> Result<Function, String> {
    let text = content_text(message.content)?;
    serde_json::from_str(&text).map_err(|error| format!("not a tool call as `name` and `arguments`: {error}"))
}

/// Adds a call, the only one of its turn; JSON spaced as Hugging Face's templates space it.
fn add_call(completion: &mut String, function: Function) -> Result<(), String> {
    if completion.trim_end().ends_with("</tool_call>") {
        return Err(several_calls(2));
    }
    if !completion.is_empty() && !completion.ends_with('\n') {
        completion.push('\n');
    }
    let arguments = match function.arguments {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| format!("arguments of tool `{}` are not JSON: {error}", function.name))?,
        other => other,
    };
    let call = serde_json::json!({ "name": function.name, "arguments": arguments });
    completion.push_str("<tool_call>\n");
    completion.push_str(&python_json(&call));
    completion.push_str("\n</tool_call>");
    Ok(())
}

/// Adds what came back, without the tags that some keep around it.
pub(crate) fn observe(observation: &mut Option<String>, text: &str) {
    let trimmed = text.trim();
    let inner = trimmed.strip_prefix("<information>").and_then(|rest| rest.strip_suffix("</information>"));
    let text = inner.map_or(text, str::trim);
    match observation {
        Some(earlier) => {
            earlier.push('\n');
            earlier.push_str(text);
        }
        None => *observation = Some(text.to_owned()),
    }
}

fn content_text(content: Option<Content>) -> Result<String, String> {
    match content {
        None => Ok(String::new()),
        Some(Content::Text(text)) => Ok(text),
        Some(Content::Parts(parts)) => parts
            .into_iter()
            .map(|part| part.text.ok_or_else(|| "a content part that is not text".to_owned()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(messages: &str) -> Result<Demonstration, String> {
        demonstration(serde_json::from_str(&format!("[{messages}]")).unwrap())
    }

    const USER: &str = r#"{"role": "user", "content": "Who?"}"#;

    #[test]
    fn openai_messages_become_turns() {
        let demonstration = chat(
            r#"{"role": "system", "content": "Be good."}, {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
            {"role": "assistant", "content": "<think>hm</think>", "tool_calls": [{"id": "1", "type": "function",
              "function": {"name": "search", "arguments": "{\"query\":\"a, \\\"b\\\"\",\"k\":[1,2.50]}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": " <information>\nfound\n</information>\n"},
            {"role": "tool", "content": "more"},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "search", "arguments": {"query": "é"}}}],
              "loss_mask": 0},
            {"role": "user", "content": "again"}, {"role": "assistant", "content": "<answer>Ann</answer>", "tool_calls": null}"#,
        )
        .unwrap();
        let call = "<tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"a, \\\"b\\\"\", \"k\": [1, 2.5]}}\n</tool_call>";
        let expected = Demonstration {
            question: "Who?".into(),
            turns: vec![
                Turn {
                    completion: format!("<think>hm</think>\n{call}"),
                    observation: Some("found\nmore".into()),
                    trained: true,
                },
                Turn {
                    completion: "<tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"é\"}}\n</tool_call>"
                        .into(),
                    observation: Some("again".into()),
                    trained: false,
                },
                Turn { completion: "<answer>Ann</answer>".into(), observation: None, trained: true },
            ],
            ignored: Ignored::from([(SYSTEM_MESSAGES, 1)]),
        };
        assert_eq!(demonstration, expected);
    }

    #[test]
    fn openai_s_older_calls_are_calls() {
        let old = r#"{"role": "assistant", "content": null, "function_call": {"name": "search", "arguments": "{\"query\": \"x\"}"}},
            {"role": "function", "name": "search", "content": "found"}, {"role": "assistant", "content": "<answer>Ann</answer>", "function_call": null}"#;
        let found = chat(&format!("{USER}, {old}")).unwrap();
        let call = "<tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"x\"}}\n</tool_call>";
        assert_eq!((found.turns[0].completion.as_str(), found.turns[0].observation.as_deref()), (call, Some("found")));
        assert_eq!((found.turns.len(), found.turns[1].completion.as_str()), (2, "<answer>Ann</answer>"));
        let both = old.replacen(
            "\"function_call\"",
            r#""tool_calls": [{"function": {"name": "a", "arguments": {}}}], "function_call""#,
            1,
        );
        let error = chat(&format!("{USER}, {both}")).unwrap_err();
        assert!(error.contains("message 1: 2 tool calls in one turn") && error.contains("side by side"), "{error}");
    }

    #[test]
    fn reasoning_beside_the_text_is_counted() {
        let said = |reasoning: &str| {
            let row = format!(r#"{USER}, {{"role": "assistant", "content": "a", "reasoning_content": {reasoning}}}"#);
            chat(&row).unwrap().ignored
        };
        assert_eq!(said("\"hm\""), Ignored::from([(REASONING, 1)]));
        assert_eq!((said("null"), said("\"\"")), (Ignored::new(), Ignored::new()));
    }

    #[test]
    fn sharegpt_and_swift_say_the_same() {
        let call = r#"{\"name\": \"search\", \"arguments\": {\"query\": \"x\"}}"#;
        let share = format!(
            r#"{{"from": "system", "value": "Be good."}}, {{"from": "human", "value": "Who?"}}, {{"from": "function_call", "value": "{call}"}},
            {{"from": "observation", "value": "found"}}, {{"from": "gpt", "value": "<answer>Ann</answer>"}}"#
        );
        let swift = share
            .replace("from", "role")
            .replace("value", "content")
            .replace("human", "user")
            .replace("function_call", "tool_call")
            .replace("observation", "tool_response")
            .replace("gpt", "assistant");
        let found = chat(&share).unwrap();
        assert_eq!(found, chat(&swift).unwrap());
        let written = "<tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"x\"}}\n</tool_call>";
        assert_eq!(
            (found.turns[0].completion.as_str(), found.turns[0].observation.as_deref()),
            (written, Some("found"))
        );
        let thought = format!(
            r#"{USER}, {{"role": "assistant", "content": "<think>hm</think>"}}, {{"role": "tool_call", "content": "{call}"}}"#
        );
        assert_eq!(chat(&thought).unwrap().turns[0].completion, format!("<think>hm</think>\n{written}"));
        let silent = thought.replace("<think>hm</think>", "");
        assert_eq!(chat(&silent).unwrap().turns[0].completion, written);
        let twice = format!(r#"{thought}, {{"role": "tool_call", "content": "{call}"}}"#);
        assert!(chat(&twice).unwrap_err().contains("message 3: 2 tool calls in one turn"));
        let words = format!(r#"{USER}, {{"role": "tool_call", "content": "search x"}}"#);
        assert!(chat(&words).unwrap_err().contains("message 1: not a tool call as `name` and `arguments`"));
    }

    #[test]
    fn what_is_not_learnt_has_many_names() {
        let trained = |mark: &str| {
            let row = format!(r#"{USER}, {{"role": "assistant", "content": "a", {mark}}}"#);
            chat(&row).map(|found| found.turns[0].trained)
        };
        for no in [r#""loss_mask": 0"#, r#""weight": 0.0"#, r#""train": false"#, r#""loss": false, "weight": 0"#] {
            assert_eq!(trained(no), Ok(false), "{no}");
        }
        for yes in [r#""loss_mask": 1"#, r#""weight": 1, "train": null"#, r#""train": true"#, r#""name": "x""#] {
            assert_eq!(trained(yes), Ok(true), "{yes}");
        }
        for (odd, told) in [
            (r#""weight": 0.5"#, "message 1: weight 0.5, expected 0 or 1"),
            (r#""train": "no""#, "train \"no\", expected 0 or 1"),
            (r#""weight": 1, "loss_mask": 0"#, "loss_mask says 0, weight says 1"),
        ] {
            let error = trained(odd).unwrap_err();
            assert!(error.contains(told), "{odd}: {error}");
        }
    }

    #[test]
    fn refusals_say_what_was_found() {
        let check = |messages: String, expected: &str| {
            let error = chat(&messages).unwrap_err();
            assert!(error.contains(expected), "{messages}\n  found    {error}\n  expected {expected}");
        };
        check(String::new(), "no user turn");
        check(USER.into(), "no assistant turn");
        check(r#"{"role": "assistant", "content": "a"}"#.into(), "message 0: an assistant turn before the question");
        check(format!(r#"{USER}, {{"role": "assistant", "content": ""}}"#), "message 1: an empty assistant turn");
        check(format!("{USER}, {USER}"), "message 1: a second user turn");
        check(r#"{"role": "user", "content": null}"#.into(), "message 0: an empty question");
        check(format!(r#"{USER}, {{"role": "robot", "content": "a"}}"#), "role `robot`");
        let assistant = r#"{"role": "assistant", "content": "a"}"#;
        check(format!("{USER}, {assistant}, {assistant}"), "message 2: two assistant turns in a row");
        check(
            format!(r#"{USER}, {{"role": "assistant", "content": "a", "loss_mask": 2}}"#),
            "loss_mask 2, expected 0 or 1",
        );
        check(format!(r#"{USER}, {{"role": "assistant", "content": [{{"type": "image_url"}}]}}"#), "not text");
        let call = r#"{"function": {"name": "search", "arguments": "{"}}"#;
        check(
            format!(r#"{USER}, {{"role": "assistant", "tool_calls": [{call}]}}"#),
            "arguments of tool `search` are not JSON",
        );
        check(
            format!(r#"{USER}, {{"role": "assistant", "tool_calls": [{call}, {call}]}}"#),
            "2 tool calls in one turn",
        );
    }
}
