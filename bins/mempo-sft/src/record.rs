//! Rows of training data as people have them: JSON text -> question and turns, or prompt and completion, or plain text.
//!
//! Knows nothing of tokens. Which form a row has is told by its columns, or by the user ([`InputFormat`]); [`crate::chat`]
//! reads messages, [`crate::transcript`] one text with tags, [`crate::mem1`] the rows of MEM1. Every error is a sentence for
//! the person who owns the file.

use serde::Deserialize;
use serde_json::{Map, Value};

pub use crate::chat::{Demonstration, Ignored, Turn};
use crate::chat::{Message, SYSTEM_MESSAGES, demonstration, says_something};
use crate::{mem1, transcript};

/// What a row is read from; other columns do not matter. (Those of MEM1, which are numbered, are not among them: it has
/// JSON only.)
pub const COLUMNS: [&str; 20] = [
    "id",
    "task_id",
    "source",
    "data_source",
    "split",
    "golden_answers",
    "Golden_answer",
    "reward_model",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "response",
    "question",
    "transcript",
    "trajectory",
    "text",
    "system",
    "tools",
    "extra_info",
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
    /// `source` or `data_source`, where the row has one.
    pub source: Option<String>,
    /// The row's own gold answers: those accepted for each objective.
    pub gold: Option<Vec<Vec<String>>>,
    /// What was left out of its columns.
    pub ignored: Ignored,
    /// What it holds.
    pub form: Form,
}

impl Record {
    /// What is asked; nothing in plain text.
    pub fn question(&self) -> Option<&str> {
        match &self.form {
            Form::Chat(demonstration) => Some(&demonstration.question),
            Form::Pair { prompt, .. } => Some(prompt),
            Form::Text(_) => None,
        }
    }
}

/// How rows are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum InputFormat {
    /// Each row as its columns say
    Auto,
    /// `messages` or `conversations`
    Chat,
    /// `prompt` and `completion` or `response`, or those in verl's `extra_info`
    Pair,
    /// `question` and `transcript` or `trajectory`
    Transcript,
    /// `q`, `t0`, `r0`, `i0`, `t1`, …
    Mem1,
    /// `text`
    Text,
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
pub fn parse_record(json: &[u8], format: InputFormat) -> Result<Record, String> {
    let mut row: Map<String, Value> = serde_json::from_slice(json)
        .map_err(|error| format!("not a JSON object: {error}; expected one object a line, or one array of objects"))?;
    let format = if format == InputFormat::Auto { format_of(&row)? } else { format };
    Ok(Record {
        id: label(&row, "id")?,
        task_id: label(&row, "task_id")?,
        split: label(&row, "split")?,
        source: label(&row, "source")?.map_or_else(|| label(&row, "data_source"), |source| Ok(Some(source)))?,
        gold: gold(&row)?,
        ignored: ignored(&row),
        form: parse_form(&mut row, format)?,
    })
}

const LISTS: [&str; 2] = ["messages", "conversations"];
const COMPLETIONS: [&str; 2] = ["completion", "response"];
const TRANSCRIPTS: [&str; 2] = ["transcript", "trajectory"];

/// The format that the columns tell. A row with columns of two is of the first in this order.
fn format_of(row: &Map<String, Value>) -> Result<InputFormat, String> {
    let has = |name: &str| row.contains_key(name);
    let has_any = |names: [&str; 2]| names.into_iter().any(has);
    Ok(match () {
        () if has_any(LISTS) => InputFormat::Chat,
        () if has("prompt") && has_any(COMPLETIONS) => InputFormat::Pair,
        () if has("question") && has_any(TRANSCRIPTS) => InputFormat::Transcript,
        () if has("q") && (has("t0") || has("r0")) => InputFormat::Mem1,
        () if has("text") => InputFormat::Text,
        () if nested(row).is_some() => InputFormat::Pair,
        () if is_task(row) => return Err(TASK.to_owned()),
        () => {
            return Err(format!(
                "unknown columns [{}]; expected `messages` or `conversations`, or `prompt` and `completion` (or `response`), \
                 or `question` and `transcript`, or `q`, `t0`, `r0`, …, or `text`, or `extra_info` with `prompt` and `response`",
                names(row)
            ));
        }
    })
}

const TASK: &str =
    "prompts without responses: these are tasks; use `mempo-rollout compose`, and `sample` to have them answered";

/// Whether it is a row of verl's for reinforcement learning.
fn is_task(row: &Map<String, Value>) -> bool {
    row.contains_key("prompt") && row.contains_key("reward_model")
}

/// The prompt, the name of the response and the response that verl's rows for fine-tuning have in `extra_info`; the prompt may
/// stand beside it. What is a gold answer of the row is no response.
fn nested(row: &Map<String, Value>) -> Option<(Value, &'static str, Value)> {
    let extra = row.get("extra_info")?;
    let there = |name: &str| extra.get(name).filter(|value| says_something(value));
    let prompt = there("prompt").or_else(|| there("question")).or_else(|| row.get("prompt"))?;
    let response = |name| Some((name, there(name).filter(|value| is_said(value))?));
    let (name, response) = ["response", "completion", "answer"].into_iter().find_map(response)?;
    let is_gold = |answer: &String| response.as_str().is_some_and(|text| text.trim() == answer.trim());
    let gold = gold(row).ok().flatten().unwrap_or_default();
    (!gold.iter().flatten().any(is_gold)).then(|| (prompt.clone(), name, response.clone()))
}

/// Text, or messages.
fn is_said(value: &Value) -> bool {
    value.is_string() || value.as_array().is_some_and(|items| items.iter().all(Value::is_object))
}

fn names(row: &Map<String, Value>) -> String {
    row.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn parse_form(row: &mut Map<String, Value>, format: InputFormat) -> Result<Form, String> {
    match format {
        InputFormat::Mem1 => Ok(Form::Chat(mem1::demonstration(row)?)),
        InputFormat::Text => Ok(Form::Text(text_of(take(row, ["text"; 2])?.1, "text")?)),
        InputFormat::Transcript => {
            let question = text_of(take(row, ["question"; 2])?.1, "question")?;
            let (name, text) = take(row, TRANSCRIPTS)?;
            Ok(Form::Chat(transcript::split(&question, &text_of(text, name)?)?))
        }
        InputFormat::Pair => {
            if !row.keys().any(|name| COMPLETIONS.contains(&name.as_str())) {
                if let Some((prompt, name, response)) = nested(row) {
                    return prompted(prompt, name, response);
                }
                if is_task(row) {
                    return Err(TASK.to_owned());
                }
            }
            let (_, prompt) = take(row, ["prompt"; 2])?;
            let (name, completion) = take(row, COMPLETIONS)?;
            prompted(prompt, name, completion)
        }
        InputFormat::Chat | InputFormat::Auto => {
            let (name, list) = take(row, LISTS)?;
            Ok(Form::Chat(demonstration(messages(list, name)?)?))
        }
    }
}

/// The column of the first of two names that is there, and its name.
fn take(row: &mut Map<String, Value>, either: [&'static str; 2]) -> Result<(&'static str, Value), String> {
    let found = either.into_iter().find_map(|name| Some((name, row.remove(name)?)));
    found.ok_or_else(|| {
        let expected = if either[0] == either[1] { either[0].to_owned() } else { either.join("` or `") };
        format!("no column `{expected}`, found [{}]", names(row))
    })
}

/// The row's gold answers as `golden_answers` (MEM1: `Golden_answer`; verl: `reward_model.ground_truth`) has them: a text,
/// the answers accepted for the one question, or a list of those for each objective.
fn gold(row: &Map<String, Value>) -> Result<Option<Vec<Vec<String>>>, String> {
    let verl = || {
        let truth = row.get("reward_model")?.get("ground_truth")?;
        Some(truth.get("target").unwrap_or(truth))
    };
    let own = ["golden_answers", "Golden_answer"].into_iter().map(|name| row.get(name));
    let Some(found) = own.chain([verl()]).flatten().find(|value| !value.is_null()) else { return Ok(None) };
    let nested = found.as_array().is_some_and(|list| list.iter().any(Value::is_array));
    let objectives = if nested { found.as_array().cloned().unwrap_or_default() } else { vec![found.clone()] };
    let gold: Option<Vec<Vec<String>>> = objectives.iter().map(accepted).collect();
    match gold {
        Some(gold) if gold.iter().all(|answers| !answers.is_empty()) && !gold.is_empty() => Ok(Some(gold)),
        _ => Err("the gold answers are no text, list of texts or list of such lists".to_owned()),
    }
}

/// The answers accepted for one objective.
fn accepted(value: &Value) -> Option<Vec<String>> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    match value {
        Value::Array(list) => list.iter().map(text).collect(),
        one => Some(vec![text(one)?]),
    }
}

fn messages(list: Value, name: &str) -> Result<Vec<Message>, String> {
    Vec::<Message>::deserialize(list).map_err(|error| format!("`{name}` is not a list of chat messages: {error}"))
}

/// What beside messages would say something, were it not the profile that does: ShareGPT's system message, tools.
fn ignored(row: &Map<String, Value>) -> Ignored {
    let names = [("system", SYSTEM_MESSAGES), ("tools", "tools of rows ignored")];
    let told = |(column, _): &(&str, _)| row.get(*column).is_some_and(says_something);
    names.into_iter().filter(told).map(|(_, name)| (name, 1)).collect()
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

pub(crate) fn text_of(value: Value, name: &str) -> Result<String, String> {
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
            let _ = parse_record(&row, InputFormat::Auto);
        }
    }

    #[test]
    fn labels_and_the_other_forms() {
        let record = parse_record(
            br#"{"id": 7, "task_id": "t1", "split": "dev", "prompt": "p", "response": "r"}"#,
            InputFormat::Auto,
        )
        .unwrap();
        assert_eq!(
            (record.id.as_deref(), record.task_id.as_deref(), record.split.as_deref()),
            (Some("7"), Some("t1"), Some("dev"))
        );
        assert_eq!(record.form, Form::Pair { prompt: "p".into(), completion: "r".into() });
        let record = parse_record(br#"{"prompt": "p", "completion": "c", "text": "x"}"#, InputFormat::Auto).unwrap();
        assert_eq!(record.form, Form::Pair { prompt: "p".into(), completion: "c".into() });
        assert_eq!(parse_record(br#"{"text": "x"}"#, InputFormat::Auto).unwrap().form, Form::Text("x".into()));
    }

    #[test]
    fn of_a_prompt_of_messages_only_what_follows_is_learnt() {
        let row = r#"{"prompt": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Hm"},
            {"role": "user", "content": "Well?"}], "response": "Ann"}"#;
        let Form::Chat(found) = parse_record(row.as_bytes(), InputFormat::Auto).unwrap().form else {
            panic!("expected a chat")
        };
        let turns: Vec<_> = found.turns.iter().map(|turn| (turn.completion.as_str(), turn.trained)).collect();
        assert_eq!(turns, [("Hm", false), ("Ann", true)]);
        let row = r#"{"question": "Who?", "trajectory": "a<information>b</information>c", "answer": "c"}"#;
        let Form::Chat(found) = parse_record(row.as_bytes(), InputFormat::Auto).unwrap().form else {
            panic!("expected a chat")
        };
        assert_eq!((found.question.as_str(), found.turns.len()), ("Who?", 2));
    }

    #[test]
    fn rows_of_verl_are_pairs_where_they_have_a_response() {
        let read = |columns: &str, format| {
            let row = format!(
                r#"{{"data_source": "d", "prompt": [{{"role": "user", "content": "Who?"}}], "reward_model": {{"ground_truth": "7"}}, {columns}}}"#
            );
            parse_record(row.as_bytes(), format).map(|record| record.form)
        };
        let pair = Ok(Form::Pair { prompt: "2+5?".into(), completion: "It is 7.".into() });
        for columns in [
            r#""extra_info": {"prompt": "2+5?", "response": "It is 7.", "index": 3}"#,
            r#""extra_info": {"question": "2+5?", "answer": "It is 7.", "response": null}"#,
        ] {
            assert_eq!(read(columns, InputFormat::Auto), pair, "{columns}");
            assert_eq!(read(columns, InputFormat::Pair), pair, "{columns}");
        }
        for columns in [r#""response": "It is 7.""#, r#""extra_info": {"response": "It is 7."}"#] {
            let Form::Chat(found) = read(columns, InputFormat::Auto).unwrap() else { panic!("expected a chat") };
            assert_eq!((found.question.as_str(), found.turns[0].completion.as_str()), ("Who?", "It is 7."));
        }
        for columns in [
            r#""extra_info": {"question": "2+5?", "answer": " 7"}"#,
            r#""extra_info": {"answer": ["7"]}"#,
            r#""ability": "x""#,
        ] {
            for format in [InputFormat::Auto, InputFormat::Pair] {
                let error = read(columns, format).unwrap_err();
                assert!(
                    error.contains("prompts without responses: these are tasks; use `mempo-rollout compose`"),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn a_forced_format_looks_for_its_own_columns() {
        let row = br#"{"messages": [], "text": "x", "prompt": "p"}"#;
        assert_eq!(parse_record(row, InputFormat::Text).unwrap().form, Form::Text("x".into()));
        let refused = |format| parse_record(row, format).unwrap_err();
        assert!(refused(InputFormat::Pair).contains("no column `completion` or `response`, found [messages, text"));
        assert!(refused(InputFormat::Transcript).contains("no column `question`"));
        assert!(refused(InputFormat::Mem1).contains("no column `q`"));
        assert!(refused(InputFormat::Auto).contains("no user turn"));
    }

    #[test]
    fn gold_answers_stand_in_several_places() {
        let check = |columns: &str, expected: &[&[&str]]| {
            let row = format!(r#"{{"text": "x", {columns}}}"#);
            let found = parse_record(row.as_bytes(), InputFormat::Auto).unwrap().gold.unwrap();
            assert_eq!(found, expected, "{columns}");
        };
        check(r#""golden_answers": ["Paris", "paris"]"#, &[&["Paris", "paris"]]);
        check(r#""golden_answers": 1889"#, &[&["1889"]]);
        check(r#""Golden_answer": [["Paris"], ["1889", 1890]]"#, &[&["Paris"], &["1889", "1890"]]);
        check(r#""Golden_answer": [["Paris"], "Rome"]"#, &[&["Paris"], &["Rome"]]);
        check(r#""reward_model": {"ground_truth": {"target": ["a"]}}"#, &[&["a"]]);
        check(r#""golden_answers": null, "data_source": "nq", "reward_model": {"ground_truth": "a"}"#, &[&["a"]]);
        for odd in ["{}", "[]", "[[]]", "[null]", "true"] {
            let row = format!(r#"{{"text": "x", "golden_answers": {odd}}}"#);
            let error = parse_record(row.as_bytes(), InputFormat::Auto).unwrap_err();
            assert!(error.contains("the gold answers are no text"), "{odd}: {error}");
        }
        let row = br#"{"text": "x", "data_source": "nq", "golden_answers": null}"#;
        let record = parse_record(row, InputFormat::Auto).unwrap();
        assert_eq!((record.source.as_deref(), record.gold), (Some("nq"), None));
    }

    #[test]
    fn columns_that_the_profile_speaks_for_are_counted() {
        let ignored = |columns: &str| {
            let row = format!(
                r#"{{"conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "a"}}], {columns}}}"#
            );
            parse_record(row.as_bytes(), InputFormat::Auto).unwrap().ignored
        };
        let both = Ignored::from([(SYSTEM_MESSAGES, 1), ("tools of rows ignored", 1)]);
        assert_eq!(ignored(r#""system": "Be good.", "tools": "[{\"name\": \"search\"}]""#), both);
        assert_eq!(ignored(r#""tools": [{"type": "function"}], "system": "x""#), both);
        assert_eq!(ignored(r#""system": "", "tools": "[]""#), Ignored::new());
        assert_eq!(ignored(r#""system": null, "tools": []"#), Ignored::new());
    }

    #[test]
    fn refusals_say_what_was_found() {
        let check = |json: &str, expected: &str| {
            let error = parse_record(json.as_bytes(), InputFormat::Auto).unwrap_err();
            assert!(error.contains(expected), "{json}\n  found    {error}\n  expected {expected}");
        };
        check("{\"text\": ", "not a JSON object: EOF");
        check("[{}]", "expected one object a line, or one array of objects");
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
