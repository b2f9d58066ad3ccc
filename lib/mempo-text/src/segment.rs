//! The grammar of a completion: which ids are memory, thought, tool call and answer.
//!
//! Tags are found in the bytes the ids stand for, never by tag ids, so that it makes no difference how a tag was cut
//! into tokens. Whatever the policy writes can be parsed: faults are listed as problems.

use std::ops::Range;
use std::sync::LazyLock;

use regex::bytes::Regex;

use crate::answer::last_box;
use crate::profile::{AnswerForm, MemoryRule, Profile, Tags};
use crate::tokenizer::Tokenizer;
use crate::tool::ToolCall;

/// Kinds of segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SegmentKind {
    /// `<mem>`, or as the profile says: what is carried instead of history.
    Memory,
    /// `<think>`: reasoning.
    Think,
    /// `<tool_call>`, or as the profile says: a JSON call, or the query of a search.
    ToolCall,
    /// `<answer>`: the final answer.
    Answer,
}

impl SegmentKind {
    /// The name inside the tag.
    pub fn tag(self, tags: &Tags) -> &str {
        match self {
            Self::Memory => &tags.memory,
            Self::Think => "think",
            Self::ToolCall => &tags.tool_call,
            Self::Answer => "answer",
        }
    }

    /// Of a name that two kinds have, the memory.
    fn from_tag(tag: &[u8], tags: &Tags) -> Option<Self> {
        let kinds = [Self::Memory, Self::Think, Self::ToolCall, Self::Answer];
        kinds.into_iter().find(|kind| kind.tag(tags).as_bytes() == tag)
    }

    /// Place in a step; a segment must come before all segments of a higher place, and once.
    fn place(self) -> u8 {
        match self {
            Self::Memory => 0,
            Self::Think => 1,
            Self::ToolCall | Self::Answer => 2,
        }
    }
}

/// A tagged part of a completion, tags included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Which tag.
    pub kind: SegmentKind,
    /// Half-open range over the completion's ids.
    pub range: Range<usize>,
}

/// What a completion says.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedCompletion {
    /// The completion as text.
    pub text: String,
    /// In order, never overlapping: a token that straddles two belongs to the earlier.
    pub segments: Vec<Segment>,
    /// Number of closed memories; only the first counts as one.
    pub memory_count: usize,
    /// The first tool call unless an answer precedes it; `Err` says what is wrong with it.
    pub tool_call: Option<Result<ToolCall, String>>,
    /// The text of the first answer unless a tool call precedes it, trimmed.
    pub answer: Option<String>,
    /// Faults of form, in words; empty means well-formed. How many memories a step needs is for the caller to judge.
    pub problems: Vec<String>,
}

/// A tag as it stands in the bytes. `kind` is none for `information`, which only the environment writes.
#[derive(Debug, Clone)]
struct Tag {
    kind: Option<SegmentKind>,
    closing: bool,
    range: Range<usize>,
}

/// A segment in bytes, tags included.
#[derive(Debug, Clone)]
struct Span {
    kind: SegmentKind,
    range: Range<usize>,
    inside: Range<usize>,
}

static TAG: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"<(/?)(mem|think|tool_call|search|answer|information)>").expect("a constant pattern compiles")
});

/// Finds the segments of a completion and what they say. Total: any ids give a result.
pub fn parse_completion(tokenizer: &Tokenizer, ids: &[i32], profile: &Profile) -> ParsedCompletion {
    let (bytes, ends) = bytes_of(tokenizer, ids);
    let mut problems = Vec::new();
    let spans = match profile.answer {
        AnswerForm::Tagged => spans(&tags(&bytes, &profile.tags), &profile.tags, &mut problems),
        AnswerForm::Boxed => {
            let answer = |(range, inside)| Span { kind: SegmentKind::Answer, range, inside };
            last_box(&bytes).map(answer).into_iter().collect()
        }
    };
    check_order(&spans, profile, &mut problems);

    let action = spans.iter().find(|span| span.kind.place() == SegmentKind::Answer.place());
    let inside = |span: &Span| String::from_utf8_lossy(&bytes[span.inside.clone()]).into_owned();
    let tool_call = action.filter(|span| span.kind == SegmentKind::ToolCall).map(|span| ToolCall::parse(&inside(span)));
    let answer = action.filter(|span| span.kind == SegmentKind::Answer).map(|span| inside(span).trim().to_owned());
    match &tool_call {
        Some(Err(problem)) => problems.push(problem.clone()),
        None if answer.is_none() => problems.push("neither a tool call nor an answer".to_owned()),
        _ => {}
    }
    ParsedCompletion {
        text: String::from_utf8_lossy(&bytes).into_owned(),
        segments: segments(&spans, &ends),
        memory_count: spans.iter().filter(|span| span.kind == SegmentKind::Memory).count(),
        tool_call,
        answer,
        problems,
    }
}

/// The same for a completion whose prompt ends with an `opening`, as `<answer>`: a segment begun there counts, from the
/// first id of the completion on.
pub fn parse_continuation(tokenizer: &Tokenizer, opening: &[i32], ids: &[i32], profile: &Profile) -> ParsedCompletion {
    let mut parsed = parse_completion(tokenizer, &[opening, ids].concat(), profile);
    if opening.is_empty() {
        return parsed;
    }
    parsed.text = String::from_utf8_lossy(&bytes_of(tokenizer, ids).0).into_owned();
    parsed.segments.retain_mut(|segment| {
        let Range { start, end } = segment.range;
        segment.range = start.saturating_sub(opening.len())..end.saturating_sub(opening.len());
        !segment.range.is_empty()
    });
    parsed
}

/// A completion that is a memory from its first id to `end`, which leaves out an id that ends the turn (MemAgent,
/// arXiv 2507.02259). What a model that thinks first writes up to `</think>` is not remembered.
pub(crate) fn parse_memory(tokenizer: &Tokenizer, ids: &[i32], end: usize) -> ParsedCompletion {
    const THOUGHT: &[u8] = b"</think>";
    let (bytes, ends) = bytes_of(tokenizer, ids);
    let thought = bytes.windows(THOUGHT.len()).rposition(|part| part == THOUGHT).map_or(0, |at| at + THOUGHT.len());
    let range = ends.partition_point(|end| *end <= thought).min(end)..end;
    let is_there = !range.is_empty();
    ParsedCompletion {
        text: String::from_utf8_lossy(&bytes).into_owned(),
        segments: is_there.then_some(Segment { kind: SegmentKind::Memory, range }).into_iter().collect(),
        memory_count: usize::from(is_there),
        tool_call: None,
        answer: None,
        problems: if is_there { Vec::new() } else { vec!["an empty memory".to_owned()] },
    }
}

/// The bytes of the ids, and where each id's bytes end.
pub(crate) fn bytes_of(tokenizer: &Tokenizer, ids: &[i32]) -> (Vec<u8>, Vec<usize>) {
    let mut bytes = Vec::new();
    let ends = ids.iter().map(|id| {
        bytes.extend_from_slice(tokenizer.token_bytes(*id));
        bytes.len()
    });
    let ends = ends.collect();
    (bytes, ends)
}

/// The ids of a segment that lie wholly between its tags; empty if there are none. An unclosed segment reaches to its end.
pub fn between_tags(tokenizer: &Tokenizer, tags: &Tags, completion_ids: &[i32], segment: &Segment) -> Range<usize> {
    let found = Located::new(tokenizer, tags, completion_ids, segment);
    let whole = |index: &usize| {
        let token = found.token(*index);
        token.start >= found.inside.start && token.end <= found.inside.end
    };
    let inside: Vec<usize> = (0..found.ids.len()).filter(whole).collect();
    match (inside.first(), inside.last()) {
        (Some(from), Some(to)) => found.first + from..found.first + to + 1,
        _ => segment.range.start..segment.range.start,
    }
}

/// A segment in the bytes of its completion's ids.
pub(crate) struct Located<'a> {
    /// Ids that hold the segment, and what shares a token with it.
    pub(crate) ids: &'a [i32],
    /// Their bytes.
    pub(crate) bytes: Vec<u8>,
    /// Where each id's bytes end.
    pub(crate) ends: Vec<usize>,
    /// The segment's bytes, tags included; unclosed, up to the end.
    pub(crate) outside: Range<usize>,
    /// Those between the tags.
    inside: Range<usize>,
    /// The place of the first of `ids` in the completion.
    first: usize,
}

impl<'a> Located<'a> {
    pub(crate) fn new(tokenizer: &Tokenizer, tags: &Tags, completion_ids: &'a [i32], segment: &Segment) -> Self {
        // A `<` that an earlier segment's token took with it is looked for one token back.
        let first = segment.range.start.saturating_sub(1).min(completion_ids.len());
        let ids = &completion_ids[first..segment.range.end.clamp(first, completion_ids.len())];
        let (bytes, ends) = bytes_of(tokenizer, ids);
        let name = segment.kind.tag(tags);
        let (opening, closing) = (format!("<{name}>"), format!("</{name}>"));
        let find = |from: usize, tag: &str| {
            let at = bytes[from..].windows(tag.len()).position(|part| part == tag.as_bytes())?;
            Some(from + at..from + at + tag.len())
        };
        let open = find(0, &opening).unwrap_or(0..0);
        let close = find(open.end, &closing).unwrap_or(bytes.len()..bytes.len());
        let (outside, inside) = (open.start..close.end, open.end..close.start);
        Self { ids, bytes, ends, outside, inside, first }
    }

    /// The bytes of the `index`-th of `ids`.
    pub(crate) fn token(&self, index: usize) -> Range<usize> {
        if index == 0 { 0..self.ends[0] } else { self.ends[index - 1]..self.ends[index] }
    }
}

/// The ids whose bytes touch the byte range.
pub(crate) fn ids_touching(ends: &[usize], bytes: &Range<usize>) -> Range<usize> {
    let first = ends.partition_point(|end| *end <= bytes.start);
    let last = ends.partition_point(|end| *end < bytes.end);
    first..(last + 1).min(ends.len())
}

/// Cuts text at the tags of segments: tags and what stands between them, in order, nothing lost or empty.
pub(crate) fn cut_at_tags<'t>(text: &'t str, names: &Tags) -> Vec<&'t str> {
    let mut cuts = vec![0];
    cuts.extend(tags(text.as_bytes(), names).iter().flat_map(|tag| [tag.range.start, tag.range.end]));
    cuts.push(text.len());
    cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).filter(|piece| !piece.is_empty()).collect()
}

fn tags(bytes: &[u8], names: &Tags) -> Vec<Tag> {
    let tag = |found: regex::bytes::Captures| {
        let kind = SegmentKind::from_tag(&found[2], names);
        // What means something to other agents only is text.
        let counts = kind.is_some() || &found[2] == b"information";
        counts.then(|| Tag { kind, closing: !found[1].is_empty(), range: found.get_match().range() })
    };
    TAG.captures_iter(bytes).filter_map(tag).collect()
}

/// Pairs opening with closing tags. What stands inside a pair is its text, tags or not; an opening tag that is never
/// closed is passed over.
fn spans(tags: &[Tag], names: &Tags, problems: &mut Vec<String>) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut index = 0;
    while let Some(tag) = tags.get(index) {
        index += 1;
        let Some(kind) = tag.kind else {
            problems.push("<information> is for the environment to write".to_owned());
            continue;
        };
        let name = kind.tag(names);
        if tag.closing {
            problems.push(format!("</{name}> without <{name}>"));
            continue;
        }
        let Some(distance) = tags[index..].iter().position(|other| other.closing && other.kind == Some(kind)) else {
            problems.push(format!("<{name}> is not closed"));
            continue;
        };
        if distance > 0 {
            problems.push(format!("another tag inside <{name}>"));
        }
        let closing = &tags[index + distance];
        index += distance + 1;
        spans.push(Span {
            kind,
            range: tag.range.start..closing.range.end,
            inside: tag.range.end..closing.range.start,
        });
    }
    spans
}

fn check_order(spans: &[Span], profile: &Profile, problems: &mut Vec<String>) {
    for (index, span) in spans.iter().enumerate() {
        let name = span.kind.tag(&profile.tags);
        for earlier in &spans[..index] {
            if earlier.kind == span.kind {
                problems.push(format!("more than one <{name}>"));
                break;
            }
            if earlier.kind.place() >= span.kind.place() {
                problems.push(format!("<{name}> after <{}>", earlier.kind.tag(&profile.tags)));
                break;
            }
        }
        if span.kind == SegmentKind::Memory && profile.memory == MemoryRule::Absent {
            problems.push("a memory, where the profile has none".to_owned());
        }
    }
}

/// The spans as ranges of ids. Only the first memory is a segment.
fn segments(spans: &[Span], ends: &[usize]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for span in spans {
        let second_memory =
            span.kind == SegmentKind::Memory && segments.iter().any(|segment| segment.kind == SegmentKind::Memory);
        let mut range = ids_touching(ends, &span.range);
        range.start = range.start.max(segments.last().map_or(0, |earlier| earlier.range.end));
        if !second_memory && range.start < range.end {
            segments.push(Segment { kind: span.kind, range });
        }
    }
    segments
}
