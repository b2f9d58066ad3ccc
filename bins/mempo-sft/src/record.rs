//! Rows of training data as people have them: JSON text -> question and turns, or prompt and completion, or plain text.
//!
//! Knows nothing of tokens. Which form a row has is told by its columns; [`crate::chat`] reads messages, [`crate::transcript`]
//! one text with tags. Every error is a sentence for the person who owns the file.

use serde::Deserialize;
use serde_json::{Map, Value};

pub use crate::chat::{Demonstration, Turn};
use crate::chat::{Message, demonstration};
use crate::transcript;

/// What a row is read from; other columns do not matter.
pub const COLUMNS: [&str; 12] = [
    "id",
    "task_id",
    "split",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "response",
    "question",
    "transcript",
    "trajectory",
    "text",
];

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
    let found = |names: &[&'static str]| names.iter().copied().find(|name| row.contains_key(*name));
    let (list, completion) = (found(&["messages", "conversations"]), found(&["completion", "response"]));
    let transcript = found(&["transcript", "trajectory"]);
    let (has_prompt, has_question, has_text) =
        (row.contains_key("prompt"), row.contains_key("question"), row.contains_key("text"));
    let mut take = |name: &str| row.remove(name).unwrap_or_default();
    if let Some(name) = list {
        return Ok(Form::Chat(demonstration(messages(take(name), name)?)?));
    }
    if let Some(name) = completion.filter(|_| has_prompt) {
        return prompted(take("prompt"), name, take(name));
    }
    if let Some(name) = transcript.filter(|_| has_question) {
        let (question, text) = (text_of(take("question"), "question")?, text_of(take(name), name)?);
        return Ok(Form::Chat(transcript::split(&question, &text)?));
    }
    if has_text {
        return Ok(Form::Text(text_of(take("text"), "text")?));
    }
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    Err(format!(
        "unknown columns [{}]; expected `messages` or `conversations`, or `prompt` and `completion` (or `response`), or \
         `question` and `transcript`, or `text`",
        names.join(", ")
    ))
}

fn messages(list: Value, name: &str) -> Result<Vec<Message>, String> {
    Vec::<Message>::deserialize(list).map_err(|error| format!("`{name}` is not a list of chat messages: {error}"))
}

/// Two texts, or what was said before and what follows, as messages: of those only what follows is learnt.
fn prompted(prompt: Value, name: &str, completion: Value) -> Result<Form, String> {
    if !prompt.is_array() {
        return Ok(Form::Pair { prompt: text_of(prompt, "prompt")?, completion: text_of(completion, name)? });
    }
    let mut all = messages(prompt, "prompt")?;
    all.iter_mut().for_each(Message::not_trained);
    match completion {
        Value::String(text) => all.push(Message::assistant(text)),
        list => all.extend(messages(list, name)?),
    }
    Ok(Form::Chat(demonstration(all)?))
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
    fn of_a_prompt_of_messages_only_what_follows_is_learnt() {
        let row = r#"{"prompt": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Hm"},
            {"role": "user", "content": "Well?"}], "response": "Ann"}"#;
        let Form::Chat(found) = parse_record(row.as_bytes()).unwrap().form else { panic!("expected a chat") };
        let turns: Vec<_> = found.turns.iter().map(|turn| (turn.completion.as_str(), turn.trained)).collect();
        assert_eq!(turns, [("Hm", false), ("Ann", true)]);
        let row = r#"{"question": "Who?", "trajectory": "a<information>b</information>c", "answer": "c"}"#;
        let Form::Chat(found) = parse_record(row.as_bytes()).unwrap().form else { panic!("expected a chat") };
        assert_eq!((found.question.as_str(), found.turns.len()), ("Who?", 2));
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
        check(r#"{"question": "q", "response": "a"}"#, "unknown columns [question, response]; expected `messages`");
        check(r#"{"prompt": 1, "completion": "c"}"#, "`prompt` is a number, expected text");
        check(r#"{"prompt": [], "completion": "c"}"#, "message 0: an assistant turn before the question");
        check(r#"{"prompt": "p", "completion": []}"#, "`completion` is a list, expected text");
        check(r#"{"question": "q", "transcript": ""}"#, "the transcript is empty");
        check(r#"{"conversations": 1}"#, "`conversations` is not a list of chat messages");
        check(r#"{"text": 3}"#, "`text` is a number");
        check(r#"{"id": [], "text": "x"}"#, "`id` is a list");
        check(r#"{"messages": "hello"}"#, "`messages` is not a list of chat messages");
    }
}
