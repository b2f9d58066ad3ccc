//! The one place where a step's prompt is built.
//!
//! The chat template is rendered with a slot where each question, completion and observation goes. What the template
//! wrote around the slots is encoded as trusted text; into the slots go ids: the question encoded as outside text,
//! completions and observations exactly as they were.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::profile::Profile;
use crate::segment::{Located, Segment, bytes_of, cut_at_tags, ids_touching};
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::Tokenizer;
use crate::tool::ToolSpec;

/// Slots are letters and digits, so that trimming and splitting in a template leave them alone.
const SLOT: &str = "MEMPOSLOT";

/// A step that is shown again in a later prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CarriedStep<'a> {
    /// What the policy wrote.
    pub completion_ids: &'a [i32],
    /// What the environment replied.
    pub observation_ids: Option<&'a [i32]>,
}

/// The gold answers as the policy would write them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerIds {
    /// All answers joined by `; `.
    pub ids: Vec<i32>,
    /// For each answer its own ids, separators left out.
    pub spans: Vec<Range<usize>>,
}

/// Builds prompts for one tokenizer, chat template and profile.
pub struct PromptBuilder {
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    profile: Profile,
    system: String,
    end_of_turn_id: Option<i32>,
    /// Ids of what the template writes, by which carried steps have a reply.
    fixed_ids: Mutex<HashMap<Vec<bool>, FixedIds>>,
}

/// What the template writes around the slots of a prompt.
type FixedIds = Arc<[Vec<i32>]>;

impl PromptBuilder {
    /// With the tokenizer and chat template of a model directory.
    pub fn load(dir: &Path, profile: Profile, tools: &[ToolSpec]) -> Result<Self, Error> {
        Self::new(Arc::new(Tokenizer::load(dir)?), ChatTemplate::load(dir)?, profile, tools)
    }

    /// Fails if the template does not carry the system text and every message through unchanged.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        template: ChatTemplate,
        profile: Profile,
        tools: &[ToolSpec],
    ) -> Result<Self, Error> {
        let schemas: Vec<String> = tools.iter().map(ToolSpec::render).collect();
        let system = profile.system.replace("{tools}", &schemas.join("\n"));
        let fixed_ids = Mutex::default();
        let mut builder = Self { tokenizer, template, profile, system, end_of_turn_id: None, fixed_ids };
        let opening = builder.fixed_pieces(&[])?.concat();
        if !opening.contains(builder.system.trim()) {
            let message = "it leaves out or changes the system message, which holds the agent's rules: use another \
                           template, or a profile with an empty system.txt";
            return Err(builder.template.error(message.to_owned()));
        }
        let pieces = builder.fixed_pieces(&[true, true])?;
        let after_completion = builder.tokenizer.encode_trusted(&pieces[2]);
        builder.end_of_turn_id = after_completion.first().copied().filter(|id| builder.tokenizer.is_control(*id));
        Ok(builder)
    }

    /// The prompt of a step: system and question, the steps carried over from before, the opening of the next turn.
    ///
    /// An end-of-turn id at the end of a carried completion is left to the template, which closes the turn itself.
    pub fn prompt(&self, question: &str, carried: &[CarriedStep<'_>]) -> Result<Vec<i32>, Error> {
        let replies: Vec<bool> = carried.iter().map(|step| step.observation_ids.is_some()).collect();
        let pieces = self.fixed_ids(replies)?;
        let question_ids = self.tokenizer.encode_untrusted(question);
        let mut slots: Vec<&[i32]> = vec![&question_ids];
        for step in carried {
            slots.push(self.without_end_of_turn(step.completion_ids));
            slots.extend(step.observation_ids);
        }
        let mut ids = pieces[0].clone();
        for (slot, piece) in slots.into_iter().zip(&pieces[1..]) {
            ids.extend_from_slice(slot);
            ids.extend_from_slice(piece);
        }
        Ok(ids)
    }

    /// The environment's reply as ids: the profile's own words around the results, which are outside text.
    pub fn observation_ids(&self, results: &str) -> Vec<i32> {
        let (before, after) = self.profile.around_results();
        let mut ids = self.tokenizer.encode_trusted(before);
        ids.extend(self.tokenizer.encode_untrusted(results));
        ids.extend(self.tokenizer.encode_trusted(after));
        ids
    }

    /// `<answer>`, as it stands before the first character of an answer.
    pub fn answer_opening_ids(&self) -> Vec<i32> {
        self.tokenizer.encode_plain("<answer>")
    }

    /// The answers joined by `; `, encoded as [`Self::completion_ids_from_text`] encodes what stands after `<answer>`.
    ///
    /// A token that touches two answers belongs to the earlier one; an empty answer has an empty span.
    pub fn answer_ids(&self, answers: &[&str]) -> AnswerIds {
        let answers: Vec<&str> = answers.iter().map(|answer| answer.trim()).collect();
        let ids = self.tokenizer.encode_untrusted(&answers.join("; "));
        let (_, ends) = bytes_of(&self.tokenizer, &ids);
        let mut spans = Vec::with_capacity(answers.len());
        let (mut byte, mut free) = (0, 0);
        for answer in answers {
            let length = self.tokenizer.normalise(&crate::neutralise(answer)).len();
            let mut span = ids_touching(&ends, &(byte..byte + length));
            span.start = span.start.max(free);
            span.end = if length == 0 { span.start } else { span.end.max(span.start) };
            free = span.end;
            spans.push(span);
            byte += length + "; ".len();
        }
        AnswerIds { ids, spans }
    }

    /// The ids of exactly `<mem>…</mem>`: where the first or last id of the segment reaches beyond the tags (`><`),
    /// the part of it that belongs to the memory is encoded instead.
    pub fn memory_ids(&self, completion_ids: &[i32], segment: &Segment) -> Vec<i32> {
        let found = Located::new(&self.tokenizer, completion_ids, segment);
        let Range { start, end } = found.outside;
        let touching = ids_touching(&found.ends, &found.outside);
        let mut ids = Vec::with_capacity(touching.len() + 2);
        for index in touching {
            let token = found.token(index);
            if token.start >= start && token.end <= end {
                ids.push(found.ids[index]);
            } else {
                let part = &found.bytes[token.start.max(start)..token.end.min(end)];
                ids.extend(self.tokenizer.encode_plain(&String::from_utf8_lossy(part)));
            }
        }
        ids
    }

    /// Target ids of a demonstrated completion. Tags are encoded apart from what stands around them, so that the same
    /// ids follow `<answer>` or `</mem>` whatever comes next.
    pub fn completion_ids_from_text(&self, text: &str) -> Vec<i32> {
        cut_at_tags(text).into_iter().flat_map(|piece| self.tokenizer.encode_plain(piece)).collect()
    }

    /// The id with which the template closes the assistant's turn, if it is a control token. It ends a turn even if
    /// the model's files do not list it.
    pub fn end_of_turn_id(&self) -> Option<i32> {
        self.end_of_turn_id
    }

    /// The tokenizer prompts are made with.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The profile prompts are made with.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// [`Self::fixed_pieces`] as ids; there are few kinds of prompts, and each is rendered once.
    fn fixed_ids(&self, replies: Vec<bool>) -> Result<FixedIds, Error> {
        let known = || self.fixed_ids.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ids) = known().get(&replies) {
            return Ok(Arc::clone(ids));
        }
        let pieces = self.fixed_pieces(&replies)?;
        let ids: FixedIds = pieces.iter().map(|piece| self.tokenizer.encode_trusted(piece)).collect();
        known().insert(replies, Arc::clone(&ids));
        Ok(ids)
    }

    /// What the template writes around the question, each carried completion and each reply; `replies` says for each
    /// carried step whether it has one. One piece more than slots.
    fn fixed_pieces(&self, replies: &[bool]) -> Result<Vec<String>, Error> {
        let mut slots = Vec::new();
        let mut slot = || {
            let name = format!("{SLOT}{}X", slots.len());
            slots.push(name.clone());
            name
        };
        let mut messages = Vec::new();
        if !self.system.is_empty() {
            messages.push(Message::new("system", self.system.as_str()));
        }
        messages.push(Message::new("user", self.profile.user.replace("{question}", &slot())));
        for reply in replies {
            messages.push(Message::new("assistant", slot()));
            if *reply {
                messages.push(Message::new("user", slot()));
            }
        }
        let rendered = self.template.render(messages, true)?;
        self.cut_at_slots(&rendered, &slots)
    }

    fn cut_at_slots(&self, rendered: &str, slots: &[String]) -> Result<Vec<String>, Error> {
        let mut pieces = Vec::with_capacity(slots.len() + 1);
        let mut rest = rendered;
        for (index, slot) in slots.iter().enumerate() {
            let Some((before, after)) = rest.split_once(slot.as_str()) else {
                return Err(self.template.error(format!(
                    "the content of message {} after the system message does not come through unchanged and in \
                     order; step ids cannot be spliced in: use a template that writes messages as they are",
                    index + 1
                )));
            };
            pieces.push(before.to_owned());
            rest = after;
        }
        pieces.push(rest.to_owned());
        if pieces.iter().any(|piece| piece.contains(SLOT)) {
            return Err(self.template.error(format!("it writes a message twice, or a text holds `{SLOT}`")));
        }
        Ok(pieces)
    }

    fn without_end_of_turn<'a>(&self, completion_ids: &'a [i32]) -> &'a [i32] {
        match (self.end_of_turn_id, completion_ids) {
            (Some(end), [rest @ .., last]) if *last == end || self.tokenizer.end_of_turn_ids().contains(last) => rest,
            _ => completion_ids,
        }
    }
}
