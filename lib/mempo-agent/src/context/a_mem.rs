//! Notes instead of history, after A-MEM (arXiv 2502.12110): each step becomes a note with keywords, which is linked to
//! earlier notes it has to do with, and these take on what it adds. There a model writes keywords, links and changes; here
//! they follow from the words alone, so that the same steps give the same notes, and no calls are made for them.

use std::collections::BTreeSet;

use mempo_data::{SegmentKind, Step};
use mempo_text::{Carried, PromptBuilder, ToolCall};

use super::relevance::Texts;
use super::{ContextPolicy, Past, whole};

/// Words of the results that a note keeps.
const NOTE_WORDS: usize = 60;
/// Keywords of a new note, and most that it may grow to.
const KEYWORDS: usize = 5;
const MOST_KEYWORDS: usize = 8;
/// Earlier notes that a new one is linked to.
const LINKS: usize = 2;
/// Keywords that a linked note takes on.
const TAKEN_ON: usize = 2;

/// The last step, and the notes of earlier steps that have most to do with the question and with what the last step wrote,
/// with those they are linked to.
#[derive(Debug, Clone, Copy)]
pub struct AMem {
    /// Most notes that are retrieved, before links are followed.
    pub retrieved: usize,
}

struct Note {
    content: String,
    keywords: Vec<String>,
    /// Places of earlier notes.
    links: Vec<usize>,
}

impl Note {
    fn text(&self) -> String {
        format!("{} {}", self.content, self.keywords.join(" "))
    }

    fn render(&self, place: usize) -> String {
        let keywords = self.keywords.join(", ");
        let links: Vec<String> = self.links.iter().map(|link| (link + 1).to_string()).collect();
        let links = if links.is_empty() { String::new() } else { format!("; see {}", links.join(", ")) };
        format!("[{}] {} ({keywords}{links})", place + 1, self.content)
    }
}

impl ContextPolicy for AMem {
    fn name(&self) -> &'static str {
        "a-mem"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        let Some((last, earlier)) = past.steps.split_last() else { return Carried::default() };
        let notes = write_notes(earlier, past.builder);
        let texts: Vec<String> = notes.iter().map(Note::text).collect();
        let query = format!("{} {}", past.question, last.completion);
        let best = Texts::new(texts.iter().map(String::as_str)).best(&query, self.retrieved);
        let linked = best.iter().flat_map(|place| notes[*place].links.iter().copied());
        let shown: BTreeSet<usize> = best.iter().copied().chain(linked).collect();
        let lines: Vec<String> = shown.into_iter().map(|place| notes[place].render(place)).collect();
        Carried { notes: (!lines.is_empty()).then(|| lines.join("\n")), steps: vec![whole(last)], ..Carried::default() }
    }
}

/// One note a step, in order; each new one changes those it is linked to.
fn write_notes(steps: &[Step], builder: &PromptBuilder) -> Vec<Note> {
    let contents: Vec<String> = steps.iter().map(|step| content(step, builder)).collect();
    let mut notes: Vec<Note> = Vec::new();
    for (place, content) in contents.iter().enumerate() {
        let keywords = Texts::new(contents[..=place].iter().map(String::as_str)).keywords(place, KEYWORDS);
        let texts: Vec<String> = notes.iter().map(Note::text).collect();
        let links = Texts::new(texts.iter().map(String::as_str)).best(&keywords.join(" "), LINKS);
        for link in &links {
            let old = &mut notes[*link].keywords;
            let new: Vec<String> = keywords.iter().filter(|word| !old.contains(word)).take(TAKEN_ON).cloned().collect();
            old.extend(new);
            old.truncate(MOST_KEYWORDS);
        }
        notes.push(Note { content: content.clone(), keywords, links });
    }
    notes
}

/// What was asked, and the first words of what was found.
fn content(step: &Step, builder: &PromptBuilder) -> String {
    let found = step.observation.as_deref().unwrap_or_default();
    let found = found.replace("<information>", "").replace("</information>", "");
    let found: Vec<&str> = found.split_whitespace().take(NOTE_WORDS).collect();
    format!("{}: {}", asked(step, builder), found.join(" "))
}

fn asked(step: &Step, builder: &PromptBuilder) -> String {
    let call = step.segments.iter().find(|segment| segment.kind == SegmentKind::ToolCall);
    let Some(call) = call else { return String::new() };
    let range = call.start as usize..call.end as usize;
    let segment = mempo_text::Segment { kind: mempo_text::SegmentKind::ToolCall, range };
    let tags = &builder.profile().tags;
    let inside = mempo_text::between_tags(builder.tokenizer(), tags, &step.completion_ids, &segment);
    let text = builder.tokenizer().decode(&step.completion_ids[inside]);
    let query = ToolCall::parse(&text).ok().and_then(|call| Some(call.arguments.get("query")?.as_str()?.to_owned()));
    query.unwrap_or(text)
}
