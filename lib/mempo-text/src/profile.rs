//! Profiles: how an agent talks, as files. A profile is `profile.json` beside `system.txt`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Whether an agent keeps a memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryRule {
    /// Exactly one `<mem>` in every step from the second on.
    Required,
    /// No `<mem>` in any step.
    Absent,
    /// A step that reads a chunk of a document writes nothing but its memory: the whole completion is one, without tags
    /// (MemAgent, arXiv 2507.02259).
    Whole,
}

/// What an answer stands in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerForm {
    /// `<answer>…</answer>`.
    #[default]
    Tagged,
    /// The last `\boxed{…}` of the completion, up to the brace that closes it.
    Boxed,
}

impl AnswerForm {
    /// What stands before the first character of an answer.
    pub fn opening(self) -> &'static str {
        match self {
            Self::Tagged => "<answer>",
            Self::Boxed => "\\boxed{",
        }
    }
}

/// Which tags stand for what, where they are not the same with every agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tags {
    /// The memory: `mem`; or `think`, where an agent remembers in its thoughts and has no others (MEM1, arXiv 2506.15841).
    pub memory: String,
    /// A tool call: `tool_call` with JSON inside; or `search` with a query inside (Search-R1, arXiv 2503.09516).
    pub tool_call: String,
}

impl Default for Tags {
    fn default() -> Self {
        Self { memory: "mem".to_owned(), tool_call: "tool_call".to_owned() }
    }
}

/// Where carried steps stand in a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Turns {
    /// Each completion is a turn of the assistant, each reply one of the user.
    #[default]
    Separate,
    /// One turn of the assistant goes on and on: completions and replies follow the generation prompt as they are.
    Continued,
}

/// What a reply says of the steps that are left, in the place of `{hint}`; nothing when the last step is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hint {
    /// Before the last step.
    pub last: String,
    /// Earlier; `{n}` becomes their number.
    pub several: String,
}

/// How an agent talks. Placeholders are words in braces; what fills them is never looked at for placeholders again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Its name.
    pub name: String,
    /// The system message; `{tools}` becomes the tool schemas, one a line. Empty: no system message is sent, and the
    /// template may put its own.
    #[serde(skip)]
    pub system: String,
    /// The first user message; holds `{question}` once, and after it `{memory}` where a step answers from what was read.
    pub user: String,
    /// The user message of a step that is shown a chunk of a document; holds `{question}`, then perhaps `{memory}`, then
    /// `{chunk}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading: Option<String>,
    /// What stands for `{memory}` before anything was read.
    #[serde(default = "default_no_memory")]
    pub no_memory: String,
    /// What an answer stands in.
    #[serde(default)]
    pub answer: AnswerForm,
    /// Texts that end a completion, themselves included in it.
    pub stop: Vec<String>,
    /// Whether the agent keeps a memory.
    pub memory: MemoryRule,
    /// Which tags stand for what.
    #[serde(default)]
    pub tags: Tags,
    /// Where carried steps stand.
    #[serde(default)]
    pub turns: Turns,
    /// What follows the question where a context policy has notes of earlier steps; holds `{notes}` once.
    #[serde(default = "default_notes")]
    pub notes: String,
    /// What the environment replies; holds `{results}` once, and may hold `{hint}` before it.
    #[serde(default = "default_observation")]
    pub observation: String,
    /// What follows a completion without a readable call or an answer, after which it goes on; without this a completion that
    /// holds neither ends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<String>,
    /// What stands for `{hint}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<Hint>,
    /// One search result, with `{i}` (from 1), `{title}` and `{text}`.
    #[serde(default = "default_document")]
    pub document: String,
}

/// What stands in a user message, in this order.
const ASKED: [&str; 3] = ["{question}", "{memory}", "{chunk}"];

/// Name, profile.json and system.txt of a folder beside this crate's sources.
macro_rules! built_in {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!("../profiles/", $name, "/profile.json")),
            include_str!(concat!("../profiles/", $name, "/system.txt")),
        )
    };
}

const BUILT_IN: [(&str, &str, &str); 9] = [
    built_in!("mempo"),
    built_in!("react"),
    built_in!("mem1"),
    built_in!("search-r1"),
    built_in!("rag-memory"),
    built_in!("a-mem"),
    built_in!("none"),
    built_in!("memagent"),
    built_in!("full-document"),
];

fn default_notes() -> String {
    "\n\n{notes}".to_owned()
}

fn default_no_memory() -> String {
    "No previous memory".to_owned()
}

fn default_observation() -> String {
    "{results}".to_owned()
}

fn default_document() -> String {
    "{text}\n".to_owned()
}

impl Profile {
    /// A built-in profile by name (`mempo`, `react`, …), or the one in a folder.
    pub fn load(name_or_dir: &str) -> Result<Self, Error> {
        if let Some((name, json, system)) = BUILT_IN.iter().find(|(name, ..)| *name == name_or_dir) {
            return Self::parse(name, json, system);
        }
        let Some([json, system]) = Self::files(name_or_dir) else {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, ..)| *name).collect();
            let message = format!("neither built in ({}) nor a folder with profile.json", names.join(", "));
            return Err(Error::Profile { name: name_or_dir.to_owned(), message });
        };
        Self::parse(name_or_dir, &fs_err::read_to_string(json)?, &fs_err::read_to_string(system)?)
    }

    /// The files of a profile that is a folder; nothing of one that is built in, whatever folders there are.
    pub fn files(name_or_dir: &str) -> Option<[PathBuf; 2]> {
        let dir = Path::new(name_or_dir);
        let is_built_in = BUILT_IN.iter().any(|(name, ..)| *name == name_or_dir);
        (!is_built_in && dir.is_dir()).then(|| ["profile.json", "system.txt"].map(|name| dir.join(name)))
    }

    /// One search result as the policy reads it; `number` counts from 1.
    pub fn render_document(&self, number: usize, title: &str, text: &str) -> String {
        fill(&self.document, &[("i", &number.to_string()), ("title", title), ("text", text)])
    }

    /// What stands before and after the results in an observation, with as many steps left (where that is known).
    pub(crate) fn around_results(&self, steps_left: Option<usize>) -> (String, &str) {
        let (before, after) = self.observation.split_once("{results}").unwrap_or((&self.observation, ""));
        let hint = match (&self.hint, steps_left) {
            (None, _) | (_, None | Some(0)) => String::new(),
            (Some(hint), Some(1)) => hint.last.clone(),
            (Some(hint), Some(several)) => fill(&hint.several, &[("n", &several.to_string())]),
        };
        (fill(before, &[("hint", &hint)]), after)
    }

    /// The user message of a step, and what is filled into it, in order.
    pub(crate) fn asks(&self, reads: bool) -> (&str, Vec<&'static str>) {
        let text = self.reading.as_deref().filter(|_| reads).unwrap_or(&self.user);
        (text, ASKED.into_iter().filter(|name| text.contains(name)).collect())
    }

    /// Whether what is filled into the user messages stands there once and in order, and whether a memory that is a whole
    /// completion has its places.
    fn check_reading(&self) -> Result<(), String> {
        let remembers = self.memory == MemoryRule::Whole;
        if remembers && self.reading.is_none() {
            return Err("`memory` is `whole`, but there is no `reading`".to_owned());
        }
        for (field, text, reads) in [("user", Some(&self.user), false), ("reading", self.reading.as_ref(), true)] {
            let Some(text) = text else { continue };
            let mut found: Vec<(usize, &str)> = ASKED.iter().flat_map(|name| text.match_indices(name)).collect();
            found.sort_unstable();
            let expected = ASKED.into_iter().zip([true, remembers, reads]).filter_map(|(name, is)| is.then_some(name));
            if !expected.clone().eq(found.into_iter().map(|(_, name)| name)) {
                let expected: Vec<&str> = expected.collect();
                return Err(format!("`{field}` must hold {}, each once and in this order", expected.join(", ")));
            }
        }
        Ok(())
    }

    fn parse(name: &str, json: &str, system: &str) -> Result<Self, Error> {
        let error = |message: String| Error::Profile { name: name.to_owned(), message };
        let mut profile: Self = serde_json::from_str(json).map_err(|cause| error(format!("profile.json: {cause}")))?;
        system.trim_end().clone_into(&mut profile.system);
        for (field, text, placeholder) in [
            ("user", &profile.user, "{question}"),
            ("observation", &profile.observation, "{results}"),
            ("notes", &profile.notes, "{notes}"),
        ] {
            let count = text.matches(placeholder).count();
            if count != 1 {
                return Err(error(format!("`{field}` holds {placeholder} {count} times, expected once")));
            }
        }
        profile.check_reading().map_err(error)?;
        for (field, tag, known) in [
            ("memory", &profile.tags.memory, ["mem", "think"]),
            ("tool_call", &profile.tags.tool_call, ["tool_call", "search"]),
        ] {
            if !known.contains(&tag.as_str()) {
                return Err(error(format!("`tags.{field}` is `{tag}`, expected `{}`", known.join("` or `"))));
            }
        }
        if profile.correction.as_ref().is_some_and(|text| text.trim().is_empty()) {
            return Err(error("`correction` is empty: say what is wrong, or leave it out".to_owned()));
        }
        if profile.stop.iter().any(String::is_empty) {
            return Err(error("`stop` holds an empty text, which would end every completion at once".to_owned()));
        }
        Ok(profile)
    }
}

/// Fills `{name}` placeholders in one pass; unknown ones stay as they are.
pub(crate) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut filled = String::new();
    let mut rest = template;
    while let Some(brace) = rest.find('{') {
        filled.push_str(&rest[..brace]);
        rest = &rest[brace..];
        let value = values.iter().find_map(|(name, value)| {
            let after = rest[1..].strip_prefix(name)?.strip_prefix('}')?;
            Some((*value, after))
        });
        if let Some((value, after)) = value {
            filled.push_str(value);
            rest = after;
        } else {
            filled.push('{');
            rest = &rest[1..];
        }
    }
    filled + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_are_whole() {
        for (name, ..) in BUILT_IN {
            let profile = Profile::load(name).unwrap();
            assert_eq!(profile.name, name);
            let (memory, call) = (format!("<{}>", profile.tags.memory), format!("<{}>", profile.tags.tool_call));
            let told = format!("{}{}", profile.system, profile.user);
            if let Some(reading) = &profile.reading {
                assert_eq!((profile.answer, profile.stop.len()), (AnswerForm::Boxed, 0), "{name}");
                assert!(told.contains("\\boxed{}") && reading.contains("{chunk}"), "{name}");
                continue;
            }
            assert!(told.contains(&call) && told.contains("<answer>"), "{name}");
            assert_eq!(profile.system.contains("{tools}"), profile.tags.tool_call == "tool_call", "{name}");
            let remembers = profile.memory == MemoryRule::Required;
            assert_eq!(told.contains(&memory), remembers, "{name}");
            assert_eq!(profile.stop, [call.replace('<', "</"), "</answer>".to_owned()], "{name}");
        }
    }

    #[test]
    fn hints_tell_how_many_steps_are_left() {
        let profile = Profile::load("mem1").unwrap();
        let before = |steps_left| profile.around_results(steps_left).0;
        assert!(before(Some(3)).contains('3') && !before(Some(1)).contains("{n}"));
        assert_eq!(before(None), before(Some(0)));
        assert_ne!(before(Some(1)), before(Some(0)));
        assert_eq!(
            Profile::load("mempo").unwrap().around_results(Some(3)),
            ("<information>".to_owned(), "</information>")
        );
    }

    #[test]
    fn placeholders_are_filled_once() {
        let profile = Profile::load("mempo").unwrap();
        assert_eq!(profile.render_document(2, "{text} {i}", "{title}"), "Doc 2(Title: {text} {i}) {title}\n");
        assert_eq!(fill("{a}{{a}{", &[("a", "1")]), "1{1{");
    }

    #[test]
    fn a_folder_works_and_faults_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().to_str().unwrap();
        let write = |json: &str| fs_err::write(dir.path().join("profile.json"), json).unwrap();
        fs_err::write(dir.path().join("system.txt"), "Be brief.\n").unwrap();
        let (_, json, _) = BUILT_IN[1];
        write(json);
        assert_eq!(Profile::load(name).unwrap().system, "Be brief.");
        write(&json.replace("{question}", "?"));
        assert!(Profile::load(name).unwrap_err().to_string().contains("{question} 0 times"));
        write(&json.replace("\"user\"", "\"usr\""));
        assert!(Profile::load(name).unwrap_err().to_string().contains("usr"));
        write(&json.replace("\"memory\":", "\"tags\": {\"memory\": \"answer\"}, \"memory\":"));
        assert!(Profile::load(name).unwrap_err().to_string().contains("`tags.memory` is `answer`, expected `mem` or"));
        write(&json.replace("\"memory\":", "\"correction\": \" \", \"memory\":"));
        assert!(Profile::load(name).unwrap_err().to_string().contains("`correction` is empty"));
        let (_, json, _) = BUILT_IN[7];
        for (from, to, told) in [
            ("{memory}", "", "`user` must hold {question}, {memory}, each once"),
            ("{chunk}", "{chunk} {question}", "`reading` must hold {question}, {memory}, {chunk}, each once"),
            ("\"reading\"", "\"notes\"", "`notes` holds {notes} 0 times"),
        ] {
            write(&json.replace(from, to));
            let error = Profile::load(name).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        assert!(Profile::load("nothing").unwrap_err().to_string().contains("mempo, react"));
    }
}
