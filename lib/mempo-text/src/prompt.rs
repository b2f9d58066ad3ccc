//! The one place where a step's prompt is built.
//!
//! The chat template is rendered with a slot where each question, completion and observation goes. What the template
//! wrote around the slots is encoded as trusted text; into the slots go ids: the question encoded as outside text,
//! completions and observations exactly as they were.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::neutralise::neutralise;
use crate::profile::{Profile, Turns, fill};
use crate::segment::{
    Located, ParsedCompletion, Segment, between_tags, bytes_of, cut_at_tags, ids_touching, parse_memory,
};
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::Tokenizer;
use crate::tool::ToolSpec;

/// Ends a text that was cut to length.
pub const CUT_MARK: &str = " ... [cut]";

/// Slots are letters and digits, so that trimming and splitting in a template leave them alone.
const SLOT: &str = "MEMPOSLOT";

/// A step that is shown again in a later prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CarriedStep<'a> {
    /// What the policy wrote, or what is left of it.
    pub completion_ids: Cow<'a, [i32]>,
    /// What the environment replied.
    pub observation_ids: Option<Cow<'a, [i32]>>,
}

impl<'a> CarriedStep<'a> {
    /// A step as it was.
    pub fn new(completion_ids: &'a [i32], observation_ids: Option<&'a [i32]>) -> Self {
        Self { completion_ids: Cow::Borrowed(completion_ids), observation_ids: observation_ids.map(Cow::Borrowed) }
    }
}

/// What a prompt holds beside the question.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Carried<'a> {
    /// Notes of earlier steps, shown with the question as text from outside: results are quoted in them.
    pub notes: Option<String>,
    /// Earlier steps, oldest first.
    pub steps: Vec<CarriedStep<'a>>,
    /// What is remembered of a document, where the profile shows that.
    pub memory: Option<Cow<'a, [i32]>>,
    /// The part of a document to read now.
    pub chunk: Option<Cow<'a, [i32]>>,
}

impl<'a> From<Vec<CarriedStep<'a>>> for Carried<'a> {
    fn from(steps: Vec<CarriedStep<'a>>) -> Self {
        Self { steps, ..Self::default() }
    }
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
    /// Ids of what the template writes.
    fixed_ids: Mutex<HashMap<Slots, FixedIds>>,
}

/// The slots of a prompt after the question's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Slots {
    /// Whether there is a chunk of a document to read.
    reads: bool,
    /// Whether there are notes.
    notes: bool,
    /// For each carried step that has turns of its own, whether it has a reply.
    replies: Vec<bool>,
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
        let opening = builder.fixed_pieces(&Slots::default())?.concat();
        if !opening.contains(builder.system.trim()) {
            let message = "it leaves out or changes the system message, which holds the agent's rules: use another \
                           template, or a profile with an empty system.txt";
            return Err(builder.template.error(message.to_owned()));
        }
        let asked = builder.profile.asks(false).1.len();
        let pieces = builder.fixed_pieces(&Slots { replies: vec![true, true], ..Slots::default() })?;
        let after_completion = builder.tokenizer.encode_trusted(&pieces[asked + 1]);
        builder.end_of_turn_id = after_completion.first().copied().filter(|id| builder.tokenizer.is_control(*id));
        Ok(builder)
    }

    /// The prompt of a step: system and question, what is carried over from before, the opening of the next turn.
    ///
    /// An end-of-turn id at the end of a carried completion is left to the template, which closes the turn itself.
    pub fn prompt(&self, question: &str, carried: &Carried<'_>) -> Result<Vec<i32>, Error> {
        let has_turns = self.profile.turns == Turns::Separate;
        let replies = carried.steps.iter().filter(|_| has_turns).map(|step| step.observation_ids.is_some()).collect();
        let reads = carried.chunk.is_some();
        let pieces = self.fixed_ids(Slots { reads, notes: carried.notes.is_some(), replies })?;
        let asked = self.profile.asks(reads).1.into_iter().map(|name| match (name, &carried.memory) {
            ("{memory}", Some(memory)) => memory.clone(),
            ("{memory}", None) => Cow::Owned(self.tokenizer.encode_plain(&self.profile.no_memory)),
            ("{chunk}", _) => carried.chunk.clone().unwrap_or_default(),
            _ => Cow::Owned(self.tokenizer.encode_untrusted(question)),
        });
        let asked: Vec<Cow<'_, [i32]>> = asked.collect();
        let notes_ids = carried.notes.as_ref().map(|notes| self.tokenizer.encode_untrusted(notes));
        let steps = carried.steps.iter().flat_map(|step| {
            let completion = self.without_end_of_turn(&step.completion_ids);
            std::iter::once(completion).chain(step.observation_ids.as_deref())
        });
        let slots = asked.iter().map(|ids| &**ids).chain(notes_ids.as_deref()).chain(steps);
        let mut pieces = pieces.iter();
        let mut ids = pieces.next().cloned().unwrap_or_default();
        for slot in slots {
            ids.extend_from_slice(slot);
            // Steps without turns of their own follow one another as they are.
            ids.extend(pieces.next().into_iter().flatten());
        }
        Ok(ids)
    }

    /// The same prompt as messages, for a model behind a chat interface, which has a template of its own. What stands in them
    /// spells none of this tokenizer's control tokens; of those of the other model nothing is known.
    pub fn messages(&self, question: &str, carried: &Carried<'_>) -> Result<Vec<Message>, Error> {
        if self.profile.turns == Turns::Continued && !carried.steps.is_empty() {
            let message = "its steps go on in one turn, which a chat interface cannot continue".to_owned();
            return Err(Error::Profile { name: self.profile.name.clone(), message });
        }
        let text_of = |ids: &Option<Cow<'_, [i32]>>| ids.as_deref().map(|ids| self.tokenizer.decode_for_text(ids));
        let mut asked = fill(
            self.profile.asks(carried.chunk.is_some()).0,
            &[
                ("question", &self.tokenizer.break_controls(&neutralise(question))),
                ("memory", text_of(&carried.memory).as_deref().unwrap_or(&self.profile.no_memory)),
                ("chunk", text_of(&carried.chunk).as_deref().unwrap_or_default()),
            ],
        );
        if let Some(notes) = &carried.notes {
            let notes = self.tokenizer.break_controls(&neutralise(notes));
            asked.push_str(&self.profile.notes.replace("{notes}", &notes));
        }
        let system = (!self.system.is_empty()).then(|| Message::new("system", self.system.as_str()));
        let mut messages: Vec<Message> = system.into_iter().chain([Message::new("user", asked)]).collect();
        for step in &carried.steps {
            let completion = self.without_end_of_turn(&step.completion_ids);
            messages.push(Message::new("assistant", self.tokenizer.decode_for_text(completion)));
            let reply = step.observation_ids.as_deref();
            messages.extend(reply.map(|ids| Message::new("user", self.tokenizer.decode_for_text(ids))));
        }
        Ok(messages)
    }

    /// The environment's reply as ids: the profile's own words around the results, which are outside text. With how many
    /// steps are left, where that is known: some profiles tell.
    pub fn observation_ids(&self, results: &str, steps_left: Option<usize>) -> Vec<i32> {
        let (before, after) = self.profile.around_results(steps_left);
        let mut ids = self.tokenizer.encode_trusted(&before);
        ids.extend(self.tokenizer.encode_untrusted(results));
        ids.extend(self.tokenizer.encode_trusted(after));
        ids
    }

    /// What follows a completion without a readable call or an answer, if the profile says something then.
    pub fn correction_ids(&self) -> Option<Vec<i32>> {
        self.profile.correction.as_deref().map(|text| self.tokenizer.encode_trusted(text))
    }

    /// `<answer>` (or `\boxed{`), as it stands before the first character of an answer.
    pub fn answer_opening_ids(&self) -> Vec<i32> {
        self.tokenizer.encode_plain(self.profile.answer.opening())
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
            let length = self.tokenizer.normalise(&neutralise(answer)).len();
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
        let found = Located::new(&self.tokenizer, &self.profile.tags, completion_ids, segment);
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

    /// A completion whose memory has at most so many tokens between its tags, a mark included, and where it is then; nothing if
    /// it has no more as it is. The mark is whole, even where there is room for nothing else.
    pub fn cap_memory(&self, completion_ids: &[i32], memory: &Segment, most: usize) -> Option<(Vec<i32>, Segment)> {
        let inside = between_tags(&self.tokenizer, &self.profile.tags, completion_ids, memory);
        if inside.len() <= most {
            return None;
        }
        let mark = self.tokenizer.encode_plain(CUT_MARK);
        let mut end = inside.start + most.saturating_sub(mark.len());
        // A character whose bytes are spread over several tokens is kept whole or not at all.
        while end > inside.start && self.tokenizer.decode(&completion_ids[inside.start..end]).ends_with('\u{fffd}') {
            end -= 1;
        }
        let located = Located::new(&self.tokenizer, &self.profile.tags, completion_ids, memory);
        let shared = String::from_utf8_lossy(&located.bytes[located.outside.end..]).into_owned();
        let mut ids = completion_ids[..end].to_vec();
        ids.extend(mark);
        ids.extend(self.tokenizer.encode_plain(&format!("</{}>", self.profile.tags.memory)));
        let range = memory.range.start..ids.len();
        ids.extend(self.tokenizer.encode_plain(&shared));
        ids.extend(&completion_ids[memory.range.end..]);
        Some((ids, Segment { kind: memory.kind, range }))
    }

    /// Target ids of a demonstrated completion. Tags are encoded apart from what stands around them, so that the same
    /// ids follow `<answer>` or `</mem>` whatever comes next.
    pub fn completion_ids_from_text(&self, text: &str) -> Vec<i32> {
        cut_at_tags(text, &self.profile.tags).into_iter().flat_map(|piece| self.tokenizer.encode_plain(piece)).collect()
    }

    /// What a step that reads has written: a memory and nothing else.
    pub fn parse_memory(&self, completion_ids: &[i32]) -> ParsedCompletion {
        parse_memory(&self.tokenizer, completion_ids, self.without_end_of_turn(completion_ids).len())
    }

    /// A completion's text, without what ends the turn.
    pub fn said(&self, completion_ids: &[i32]) -> String {
        self.tokenizer.decode(self.without_end_of_turn(completion_ids))
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

    /// The same, for who outlives the builder.
    pub fn shared_tokenizer(&self) -> Arc<Tokenizer> {
        Arc::clone(&self.tokenizer)
    }

    /// The profile prompts are made with.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// [`Self::fixed_pieces`] as ids; there are few kinds of prompts, and each is rendered once.
    fn fixed_ids(&self, slots: Slots) -> Result<FixedIds, Error> {
        let known = || self.fixed_ids.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ids) = known().get(&slots) {
            return Ok(Arc::clone(ids));
        }
        let pieces = self.fixed_pieces(&slots)?;
        let ids: FixedIds = pieces.iter().map(|piece| self.tokenizer.encode_trusted(piece)).collect();
        known().insert(slots, Arc::clone(&ids));
        Ok(ids)
    }

    /// What the template writes around the question (memory, chunk), the notes, each carried completion and each reply.
    /// One piece more than slots.
    fn fixed_pieces(&self, Slots { reads, notes, replies }: &Slots) -> Result<Vec<String>, Error> {
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
        let (asked, names) = self.profile.asks(*reads);
        let mut asked = names.into_iter().fold(asked.to_owned(), |asked, name| asked.replace(name, &slot()));
        if *notes {
            asked.push_str(&self.profile.notes.replace("{notes}", &slot()));
        }
        messages.push(Message::new("user", asked));
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
