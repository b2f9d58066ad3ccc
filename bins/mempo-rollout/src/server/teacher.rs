//! A teacher: another model, asked in texts through an OpenAI-compatible server, whose attempts become demonstrations.
//!
//! Its completions are encoded with the student's tokenizer, as recorded demonstrations are, so that `mempo-sft build` reads
//! such a rollout like any other. Log-probabilities are unknown (NaN): what needs them refuses the rollout.

use std::sync::Arc;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_agent::{Request, SamplingOptions};
use mempo_data::StopReason;
use mempo_run::ResultExt;
use mempo_text::{Profile, PromptBuilder, Tokenizer, ToolCall, Turns};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::engine::Remote;
use super::protocol::{Protocol, Reply};
use super::{KEY, ServerOptions, address, limits};
use crate::http::{Client, Failure, Secret};

/// Which interface a teacher has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TeacherInterface {
    /// Messages, which it lays out itself: `/v1/chat/completions`.
    Chat,
    /// The prompt as text, laid out here with the template of --model: `/v1/completions`.
    Completions,
}

/// Who demonstrates.
#[derive(Debug, Args)]
pub(crate) struct TeacherOptions {
    /// Let another model work on the tasks, behind this OpenAI-compatible server, and record what it does as demonstrations
    /// (for `mempo-sft build --keep correct`): --model gives the student's tokenizer and template, its weights are not used.
    /// A key is read from the environment as MEMPO_SERVER_KEY
    #[arg(long, value_name = "URL", value_parser = address, requires = "teacher_model", conflicts_with = "server")]
    pub(crate) teacher: Option<String>,
    /// What the server calls the teacher
    #[arg(long, value_name = "NAME", requires = "teacher")]
    pub(crate) teacher_model: Option<String>,
    /// Which of the server's interfaces is used
    #[arg(long, value_enum, default_value = "chat", requires = "teacher")]
    pub(crate) teacher_interface: TeacherInterface,
    /// Say this with every request, too: a JSON object of what the server has beyond the interface. Servers take what is not
    /// said from their own defaults: llama.cpp's Python server punishes repetition unless {"repeat_penalty": 1.0} is said
    #[arg(long, value_name = "JSON", requires = "teacher", value_parser = fields)]
    pub(crate) teacher_fields: Option<Map<String, Value>>,
}

/// What a request says by other options, or an answer could not be read with.
const TAKEN: [&str; 10] =
    ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "stream"];

/// A JSON object with fields that are nobody's yet.
fn fields(text: &str) -> Result<Map<String, Value>, String> {
    let fields: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))?;
    match TAKEN.iter().find(|name| fields.contains_key(**name)) {
        Some(name) => Err(format!("`{name}` is not to be said here: it is said by other options, or always the same")),
        None => Ok(fields),
    }
}

impl TeacherOptions {
    /// Refuses what a teacher cannot do.
    pub(crate) fn check(&self, profile: &Profile, answers_at_once: bool) -> anyhow::Result<()> {
        if self.teacher.is_none() {
            return Ok(());
        }
        if answers_at_once {
            return Err(anyhow!(
                "--context closed-book begins the answer for the policy, and a teacher cannot be made to go on from it: \
                 choose another context"
            ))
            .usage();
        }
        if profile.turns == Turns::Continued && self.teacher_interface == TeacherInterface::Chat {
            let name = &profile.name;
            return Err(anyhow!(
                "profile `{name}` goes on in one turn, which a chat interface cannot continue: give --teacher-interface \
                 completions"
            ))
            .usage();
        }
        Ok(())
    }

    /// What a rollout is known by: who demonstrates, through which interface, and what it is told beside.
    pub(crate) fn recorded(&self) -> Option<Value> {
        let model = self.teacher_model.as_ref()?;
        let mut recorded = json!({"model": model, "interface": self.teacher_interface});
        if let Some(fields) = &self.teacher_fields {
            recorded["fields"] = json!(fields);
        }
        Some(recorded)
    }

    /// The teacher, if there is one.
    pub(crate) fn open(
        &self,
        server: &ServerOptions,
        builder: &PromptBuilder,
        sampling: &SamplingOptions,
    ) -> Option<Remote> {
        let (url, model) = (self.teacher.as_ref()?, self.teacher_model.clone()?);
        let client = Client::new(url, Secret::bearer(KEY), limits(server));
        let described = json!({"protocol": self.teacher_interface, "model": model});
        let texts = Texts {
            model,
            interface: self.teacher_interface,
            fields: self.teacher_fields.clone().unwrap_or_default(),
            sampling: sampling.clone(),
            stop: builder.profile().stop.clone(),
            tokenizer: builder.shared_tokenizer(),
        };
        Some(Remote { client, protocol: Box::new(texts), described })
    }

    /// In the place of a checkpoint's digest.
    pub(crate) fn policy(&self) -> Option<String> {
        Some(format!("teacher/{}", self.teacher_model.as_ref()?))
    }
}

/// What is the same in all requests.
struct Texts {
    model: String,
    interface: TeacherInterface,
    /// What is said beyond the interface.
    fields: Map<String, Value>,
    sampling: SamplingOptions,
    /// Texts that end a completion. Servers leave them out of it.
    stop: Vec<String>,
    tokenizer: Arc<Tokenizer>,
}

impl Protocol for Texts {
    fn path(&self) -> &'static str {
        match self.interface {
            TeacherInterface::Chat => "/v1/chat/completions",
            TeacherInterface::Completions => "/v1/completions",
        }
    }

    fn question(&self, request: &Request) -> Value {
        let SamplingOptions { temperature, top_p, max_completion_tokens } = &self.sampling;
        let mut body = json!({
            "model": self.model,
            "max_tokens": max_completion_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop": self.stop,
            // Some servers hold 32 bits.
            "seed": request.seed >> 33,
        });
        for (name, value) in &self.fields {
            body[name] = value.clone();
        }
        match self.interface {
            TeacherInterface::Chat => body["messages"] = json!(request.messages),
            TeacherInterface::Completions => {
                // Servers put the beginning before a text themselves: a second one would be another prompt.
                let ids = request.prompt_ids.as_slice();
                let ids = ids.strip_prefix(&self.tokenizer.beginning_ids()[..]).unwrap_or(ids);
                body["prompt"] = json!(self.tokenizer.decode_for_text(ids));
            }
        }
        body
    }

    fn reply(&self, answer: &Value) -> Result<Reply, Failure> {
        let choice = &answer["choices"][0];
        let text = match self.interface {
            TeacherInterface::Chat => said(&choice["message"]),
            TeacherInterface::Completions => choice["text"].as_str().map(str::to_owned),
        };
        let text = text.ok_or_else(|| Failure::One("it gives no text".to_owned()))?;
        match choice["finish_reason"].as_str() {
            Some("length") => Ok(Reply::Text(text, StopReason::MaxTokens)),
            Some("stop" | "tool_calls") => Ok(self.ended(text)),
            _ => Err(Failure::One(format!("it ended a completion with {}", choice["finish_reason"]))),
        }
    }

    fn wants_messages(&self) -> bool {
        self.interface == TeacherInterface::Chat
    }
}

impl Texts {
    /// A completion with the stop text that ended it: the one whose opening tag is still open.
    fn ended(&self, mut text: String) -> Reply {
        let is_open = |stop: &&String| {
            let opening = stop.replacen("</", "<", 1);
            opening != **stop && text.matches(&opening).count() > text.matches(stop.as_str()).count()
        };
        if let Some(stop) = self.stop.iter().find(is_open) {
            text.push_str(stop);
        }
        let is_stop = self.stop.iter().any(|stop| text.trim_end().ends_with(stop.as_str()));
        Reply::Text(text, if is_stop { StopReason::StopString } else { StopReason::Eos })
    }
}

/// What a message says; the first call that it makes in the interface's own form is written as the prompt asks for it.
fn said(message: &Value) -> Option<String> {
    let content = message["content"].as_str();
    let function = &message["tool_calls"][0]["function"];
    let Some(name) = function["name"].as_str() else { return content.map(str::to_owned) };
    let arguments = function["arguments"].as_str().and_then(|text| serde_json::from_str(text).ok());
    let arguments = arguments.unwrap_or_else(|| function["arguments"].clone());
    let call = ToolCall { name: name.to_owned(), arguments }.render();
    Some(format!("{}{call}", content.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use mempo_text::{NewTokenizer, train_tokenizer};

    use super::*;

    fn texts(interface: TeacherInterface) -> Texts {
        texts_with(interface, |_| ())
    }

    /// With a changed `tokenizer.json`.
    fn texts_with(interface: TeacherInterface, change: impl Fn(&mut Value)) -> Texts {
        let folder = tempfile::tempdir().unwrap();
        train_tokenizer(["red".to_owned()].into_iter(), &NewTokenizer::of_size(270), folder.path()).unwrap();
        let file = folder.path().join("tokenizer.json");
        let mut tokenizer = serde_json::from_str(&fs_err::read_to_string(&file).unwrap()).unwrap();
        change(&mut tokenizer);
        fs_err::write(&file, tokenizer.to_string()).unwrap();
        Texts {
            model: "t".to_owned(),
            interface,
            fields: fields(r#"{"repeat_penalty": 1.0}"#).unwrap(),
            sampling: SamplingOptions { temperature: 0.5, top_p: 1.0, max_completion_tokens: 9 },
            stop: vec!["</tool_call>".to_owned(), "</answer>".to_owned()],
            tokenizer: Arc::new(Tokenizer::load(folder.path()).unwrap()),
        }
    }

    #[test]
    fn what_a_teacher_cannot_do_is_refused_before_it_is_asked() {
        let options = |teacher_interface| TeacherOptions {
            teacher: Some("http://a".to_owned()),
            teacher_model: Some("t".to_owned()),
            teacher_interface,
            teacher_fields: None,
        };
        let profile = |name| Profile::load(name).unwrap();
        let (chat, completions) = (options(TeacherInterface::Chat), options(TeacherInterface::Completions));
        assert!(chat.check(&profile("mempo"), false).is_ok() && completions.check(&profile("mem1"), false).is_ok());
        for wrong in [chat.check(&profile("mem1"), false), completions.check(&profile("react"), true)] {
            assert_eq!(mempo_run::exit_code(&wrong.unwrap_err()), 2);
        }
        assert_ne!(chat.recorded(), completions.recorded());
    }

    #[test]
    fn the_text_that_ended_a_completion_is_put_back() {
        let texts = texts(TeacherInterface::Completions);
        let reply = |text: &str, finish: &str| {
            let answer = json!({"choices": [{"text": text, "finish_reason": finish}]});
            match texts.reply(&answer).unwrap() {
                Reply::Text(text, reason) => (text, reason),
                Reply::Ids(_) => panic!("a teacher gives text"),
            }
        };
        let read = |text: &str, reason| (text.to_owned(), reason);
        assert_eq!(reply("<answer>a", "stop"), read("<answer>a</answer>", StopReason::StopString));
        assert_eq!(reply("<tool_call>{}", "stop"), read("<tool_call>{}</tool_call>", StopReason::StopString));
        let done = "<tool_call>{}</tool_call>";
        assert_eq!(reply(done, "stop"), read(done, StopReason::StopString));
        assert_eq!(reply("I do not know.", "stop"), read("I do not know.", StopReason::Eos));
        assert_eq!(reply("<answer>a", "length"), read("<answer>a", StopReason::MaxTokens));
        for answer in [json!({}), json!({"choices": [{"text": "x", "finish_reason": "content_filter"}]})] {
            assert!(matches!(texts.reply(&answer), Err(Failure::One(_))), "{answer}");
        }
    }

    fn question(texts: &Texts, text: &str) -> Value {
        let prompt_ids = texts.tokenizer.encode_trusted(text);
        texts.question(&Request { trajectory: 0, prompt_ids, messages: Vec::new(), seed: 1 })
    }

    #[test]
    fn what_a_server_has_beyond_the_interface_is_said_with_every_request() {
        for interface in [TeacherInterface::Chat, TeacherInterface::Completions] {
            let said = question(&texts(interface), "red");
            assert_eq!((&said["repeat_penalty"], &said["temperature"]), (&json!(1.0), &json!(0.5)));
        }
        let with = |teacher_fields| {
            let (teacher, teacher_model) = (Some("http://a".to_owned()), Some("t".to_owned()));
            TeacherOptions { teacher, teacher_model, teacher_interface: TeacherInterface::Chat, teacher_fields }
                .recorded()
        };
        assert_ne!(with(None), with(fields(r#"{"min_p": 0}"#).ok()));
        assert!(fields(r#"{"min_p": 0, "temperature": 1}"#).unwrap_err().starts_with("`temperature` is not"));
        assert!(fields("[1]").unwrap_err().starts_with("expected a JSON object"));
    }

    #[test]
    fn a_prompt_begins_once_where_a_server_begins_it_too() {
        let start = json!({"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]});
        let template = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": start},
        });
        let (plain, begun) = (texts(TeacherInterface::Completions), |tokenizer: &mut Value| {
            let byte_level = tokenizer["post_processor"].clone();
            tokenizer["post_processor"] = json!({"type": "Sequence", "processors": [byte_level, template.clone()]});
        });
        let begun = texts_with(TeacherInterface::Completions, begun);
        let prompt = |texts: &Texts, text: &str| question(texts, text)["prompt"].clone();
        let turn = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(prompt(&plain, turn), turn);
        assert_eq!(prompt(&begun, turn), turn["<|im_start|>".len()..]);
        assert_eq!(prompt(&begun, "red"), "red");
    }

    #[test]
    fn calls_in_the_interface_s_own_form_are_written_as_text() {
        let texts = texts(TeacherInterface::Chat);
        let read = |message: Value, finish: &str| {
            texts.reply(&json!({"choices": [{"message": message, "finish_reason": finish}]}))
        };
        let call = json!({"content": "<think>so</think>", "tool_calls": [
            {"function": {"name": "search", "arguments": "{\"query\": \"red\"}"}}
        ]});
        let expected =
            "<think>so</think><tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"red\"}}\n</tool_call>";
        assert_eq!(read(call, "tool_calls"), Ok(Reply::Text(expected.to_owned(), StopReason::StopString)));
        let plain = json!({"content": "<answer>red", "tool_calls": null});
        assert_eq!(read(plain, "stop"), Ok(Reply::Text("<answer>red</answer>".to_owned(), StopReason::StopString)));
        assert!(read(json!({"content": null}), "stop").is_err());
    }
}
