//! Rows of training data as people have them: JSON text -> question and turns, or prompt and completion, or plain text.
//!
//! Knows nothing of tokens. Messages follow OpenAI's form and what Hugging Face makes of it (arguments as an object,
//! parts, nulls). Every error is a sentence for the person who owns the file.

use mempo_text::python_json;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What a row is read from; other columns do not matter.
pub const COLUMNS: [&str; 8] = ["id", "task_id", "split", "messages", "prompt", "completion", "response", "text"];

/// A row with its labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// `id`, where the row has one.
    pub id: Option<String>,
    /// `task_id`, where the row has one.
    pub task_id: Option<String>,
    /// `split`, where the row has one.
    pub split: Option<String>,
    /// What it holds.
    pub form: Form,
}

/// The forms a row may have.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// A recorded trajectory.
    Chat(Demonstration),
    /// A prompt and what should follow it.
    Pair {
        /// What is given.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// Text to model as it stands.
    Text(String),
}

/// A question and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demonstration {
    /// The first user turn.
    pub question: String,
    /// What the expert wrote, and what came back.
    pub turns: Vec<Turn>,
    /// System messages left out: the profile has its own.
    pub system_messages: u64,
}

/// One assistant turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The assistant's text, tool call included.
    pub completion: String,
    /// What followed it.
    pub observation: Option<String>,
    /// False where the message's `loss_mask` is 0.
    pub trained: bool,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<ToolCall>>,
    loss_mask: Option<u8>,
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

/// Reads one JSON row.
pub fn parse_record(json: &[u8]) -> Result<Record, String> {
    let mut row: Map<String, Value> = serde_json::from_slice(json).map_err(|error| {
        let found = if json.trim_ascii_start().starts_with(b"[") { " (this looks like a JSON array)" } else { "" };
        format!("not a JSON object: {error}{found}; expected one object a line")
    })?;
    Ok(Record {
        id: label(&row, "id")?,
        task_id: label(&row, "task_id")?,
        split: label(&row, "split")?,
        form: parse_form(&mut row)?,
    })
}

fn parse_form(row: &mut Map<String, Value>) -> Result<Form, String> {
    if let Some(messages) = row.remove("messages") {
        let messages = Vec::<Message>::deserialize(messages)
            .map_err(|error| format!("`messages` is not a list of chat messages: {error}"))?;
        return Ok(Form::Chat(demonstration(messages)?));
    }
    let completion = ["completion", "response"].into_iter().find(|name| row.contains_key(*name));
    if let (Some(name), Some(prompt)) = (completion, row.remove("prompt")) {
        let completion = row.remove(name).unwrap_or_default();
        return Ok(Form::Pair { prompt: text_of(prompt, "prompt")?, completion: text_of(completion, name)? });
    }
    if let Some(text) = row.remove("text") {
        return Ok(Form::Text(text_of(text, "text")?));
    }
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    Err(format!(
        "unknown columns [{}]; expected `messages`, or `prompt` and `completion` (or `response`), or `text`",
        names.join(", ")
    ))
}

fn label(row: &Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Number(number)) => Ok(Some(number.to_string())),
        Some(other) => Err(format!("`{name}` is {}, expected text", kind_of(other))),
    }
}

fn text_of(value: Value, name: &str) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("`{name}` is {}, expected text", kind_of(&other))),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn demonstration(messages: Vec<Message>) -> Result<Demonstration, String> {
    let mut question = None;
    let mut turns: Vec<Turn> = Vec::new();
    let mut system_messages = 0;
    for (index, message) in messages.into_iter().enumerate() {
        let at = |problem: String| format!("message {index}: {problem}");
        match message.role.as_str() {
            "system" | "developer" => system_messages += 1,
            "assistant" if question.is_none() => return Err(at("an assistant turn before the question".into())),
            "assistant" => {
                if turns.last().is_some_and(|turn| turn.observation.is_none()) {
                    return Err(at("two assistant turns in a row, expected a user or tool turn between them".into()));
                }
                turns.push(turn(message).map_err(at)?);
            }
            "user" | "tool" => {
                let text = content_text(message.content).map_err(at)?;
                match turns.last_mut() {
                    Some(turn) => observe(&mut turn.observation, &text),
                    None if question.is_some() => {
                        return Err(at("a second user turn before any assistant turn".into()));
                    }
                    None => question = Some(text),
                }
            }
            other => return Err(at(format!("role `{other}`, expected system, user, assistant or tool"))),
        }
    }
    let question = question.ok_or("no user turn: there is no question")?;
    if turns.is_empty() {
        return Err("no assistant turn: the row has no targets".into());
    }
    Ok(Demonstration { question, turns, system_messages })
}

fn turn(message: Message) -> Result<Turn, String> {
    let mut completion = content_text(message.content)?;
    let calls = message.tool_calls.unwrap_or_default();
    if calls.len() > 1 {
        return Err(format!("{} tool calls in one turn, expected at most one a step", calls.len()));
    }
    for call in calls {
        if !completion.is_empty() && !completion.ends_with('\n') {
            completion.push('\n');
        }
        completion.push_str(&render_tool_call(call.function)?);
    }
    let trained = match message.loss_mask {
        None | Some(1) => true,
        Some(0) => false,
        Some(other) => return Err(format!("loss_mask {other}, expected 0 or 1")),
    };
    if trained && completion.is_empty() {
        return Err("an empty assistant turn: there is nothing to learn".into());
    }
    Ok(Turn { completion, observation: None, trained })
}

/// Texts of a step's results, one below the other, without the wrapper that the prompt adds again.
fn observe(observation: &mut Option<String>, text: &str) {
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

/// A call as the policy writes it; JSON spaced as Hugging Face's templates space it.
fn render_tool_call(function: Function) -> Result<String, String> {
    let arguments = match function.arguments {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| format!("arguments of tool `{}` are not JSON: {error}", function.name))?,
        other => other,
    };
    let call = serde_json::json!({ "name": function.name, "arguments": arguments });
    Ok(format!("<tool_call>\n{}\n</tool_call>", python_json(&call)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Rows as they come, cut, glued and with foreign pieces in between.
    fn rows() -> impl Strategy<Value = Vec<u8>> {
        const PIECES: [&str; 14] = [
            r#"{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<answer>Ann</answer>"}]}"#,
            r#"{"prompt": "a", "completion": "b", "id": 7}"#,
            r#"{"messages": ["#,
            r#"{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "search", "arguments": "{"}}]},"#,
            r#"{"role": "tool", "content": [{"type": "text"}]}"#,
            "]}",
            "null",
            "1e999",
            "\"\\ud800\"",
            "{",
            "[[[[[[[[",
            "\u{feff}",
            "\0",
            ",",
        ];
        let piece = prop_oneof![
            (0..PIECES.len(), 0.0..1.0_f64).prop_map(|(piece, share)| {
                let bytes = PIECES[piece].as_bytes();
                bytes[..(bytes.len() as f64 * share).ceil() as usize].to_vec()
            }),
            (0..PIECES.len()).prop_map(|piece| PIECES[piece].as_bytes().to_vec()),
            proptest::collection::vec(any::<u8>(), 0..8),
        ];
        proptest::collection::vec(piece, 0..5).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn whatever_a_row_holds_it_is_read_or_refused(row in rows()) {
            let _ = parse_record(&row);
        }
    }

    fn chat(messages: &str) -> Result<Demonstration, String> {
        match parse_record(format!("{{\"messages\": [{messages}]}}").as_bytes())?.form {
            Form::Chat(demonstration) => Ok(demonstration),
            other => panic!("expected a chat, found {other:?}"),
        }
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
            system_messages: 1,
        };
        assert_eq!(demonstration, expected);
    }

    #[test]
    fn labels_and_the_other_forms() {
        let record =
            parse_record(br#"{"id": 7, "task_id": "t1", "split": "dev", "prompt": "p", "response": "r"}"#).unwrap();
        assert_eq!(
            (record.id.as_deref(), record.task_id.as_deref(), record.split.as_deref()),
            (Some("7"), Some("t1"), Some("dev"))
        );
        assert_eq!(record.form, Form::Pair { prompt: "p".into(), completion: "r".into() });
        let record = parse_record(br#"{"prompt": "p", "completion": "c", "text": "x"}"#).unwrap();
        assert_eq!(record.form, Form::Pair { prompt: "p".into(), completion: "c".into() });
        assert_eq!(parse_record(br#"{"text": "x"}"#).unwrap().form, Form::Text("x".into()));
    }

    #[test]
    fn refusals_say_what_was_found() {
        let check = |json: &str, expected: &str| {
            let error = parse_record(json.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{json}\n  found    {error}\n  expected {expected}");
        };
        check("{\"text\": ", "not a JSON object: EOF");
        check("[{}]", "looks like a JSON array");
        check(r#"{"question": "q", "answer": "a"}"#, "unknown columns [question, answer]; expected `messages`");
        check(r#"{"prompt": [], "completion": "c"}"#, "`prompt` is a list, expected text");
        check(r#"{"text": 3}"#, "`text` is a number");
        check(r#"{"id": [], "text": "x"}"#, "`id` is a list");
        check(r#"{"messages": "hello"}"#, "`messages` is not a list of chat messages");
        let check = |messages: String, expected: &str| {
            let error = chat(&messages).unwrap_err();
            assert!(error.contains(expected), "{messages}\n  found    {error}\n  expected {expected}");
        };
        check(String::new(), "no user turn");
        check(USER.into(), "no assistant turn");
        check(r#"{"role": "assistant", "content": "a"}"#.into(), "message 0: an assistant turn before the question");
        check(format!(r#"{USER}, {{"role": "assistant", "content": ""}}"#), "message 1: an empty assistant turn");
        check(format!("{USER}, {USER}"), "message 1: a second user turn");
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
