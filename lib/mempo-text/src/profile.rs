//! Profiles: how an agent talks, as files. A profile is `profile.json` beside `system.txt`.

use std::path::Path;

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
    /// The first user message; holds `{question}` once.
    pub user: String,
    /// Texts that end a completion, themselves included in it.
    pub stop: Vec<String>,
    /// Whether the agent keeps a memory.
    pub memory: MemoryRule,
    /// What the environment replies; holds `{results}` once.
    pub observation: String,
    /// One search result, with `{i}` (from 1), `{title}` and `{text}`.
    pub document: String,
}

const BUILT_IN: [(&str, &str, &str); 2] = [
    ("mempo", include_str!("../profiles/mempo/profile.json"), include_str!("../profiles/mempo/system.txt")),
    ("react", include_str!("../profiles/react/profile.json"), include_str!("../profiles/react/system.txt")),
];

impl Profile {
    /// A built-in profile by name (`mempo`, `react`), or the one in a folder.
    pub fn load(name_or_dir: &str) -> Result<Self, Error> {
        if let Some((name, json, system)) = BUILT_IN.iter().find(|(name, ..)| *name == name_or_dir) {
            return Self::parse(name, json, system);
        }
        let dir = Path::new(name_or_dir);
        if !dir.is_dir() {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, ..)| *name).collect();
            let message = format!("neither built in ({}) nor a folder with profile.json", names.join(", "));
            return Err(Error::Profile { name: name_or_dir.to_owned(), message });
        }
        let json = fs_err::read_to_string(dir.join("profile.json"))?;
        let system = fs_err::read_to_string(dir.join("system.txt"))?;
        Self::parse(name_or_dir, &json, &system)
    }

    /// One search result as the policy reads it; `number` counts from 1.
    pub fn render_document(&self, number: usize, title: &str, text: &str) -> String {
        fill(&self.document, &[("i", &number.to_string()), ("title", title), ("text", text)])
    }

    /// What stands before and after the results in an observation.
    pub(crate) fn around_results(&self) -> (&str, &str) {
        self.observation.split_once("{results}").unwrap_or((&self.observation, ""))
    }

    fn parse(name: &str, json: &str, system: &str) -> Result<Self, Error> {
        let error = |message: String| Error::Profile { name: name.to_owned(), message };
        let mut profile: Self = serde_json::from_str(json).map_err(|cause| error(format!("profile.json: {cause}")))?;
        system.trim_end().clone_into(&mut profile.system);
        for (field, text, placeholder) in
            [("user", &profile.user, "{question}"), ("observation", &profile.observation, "{results}")]
        {
            let count = text.matches(placeholder).count();
            if count != 1 {
                return Err(error(format!("`{field}` holds {placeholder} {count} times, expected once")));
            }
        }
        if profile.stop.iter().any(String::is_empty) {
            return Err(error("`stop` holds an empty text, which would end every completion at once".to_owned()));
        }
        Ok(profile)
    }
}

/// Fills `{name}` placeholders in one pass; unknown ones stay as they are.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
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
            assert!(profile.system.contains("{tools}") && profile.system.contains("<tool_call>"), "{name}");
            assert_eq!(profile.system.contains("<mem>"), profile.memory == MemoryRule::Required, "{name}");
            assert_eq!(profile.stop, ["</tool_call>", "</answer>"]);
        }
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
        assert!(Profile::load("nothing").unwrap_err().to_string().contains("mempo, react"));
    }
}
