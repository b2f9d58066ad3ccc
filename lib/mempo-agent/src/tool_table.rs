//! Which tools a policy is told of: some that are built in, and those that a file names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use mempo_text::{Profile, ToolSpec};
use serde::Deserialize;
use serde_json::Value;

use crate::{Calculator, Error, Tool};

/// Tools by name.
#[derive(Debug, Args)]
pub struct ToolNames {
    /// Built-in tools that the policy may call
    #[arg(long, value_name = "NAME,...", value_enum, value_delimiter = ',', default_value = "search")]
    tools: Vec<BuiltIn>,
    /// Further tools: a JSON file [{"name": "", "description": "", "parameters": {JSON schema}, "url": "http://HOST/PATH"}]. The
    /// policy's arguments are posted to the url; the text that comes back is what it sees
    #[arg(long, value_name = "FILE")]
    tools_file: Option<PathBuf>,
}

/// A built-in tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BuiltIn {
    /// Finds documents where --search says
    Search,
    /// Arithmetic
    Calculator,
}

/// What a file says of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedTool {
    name: String,
    description: String,
    /// JSON schema of the arguments object.
    parameters: Value,
    /// Where the arguments are posted.
    pub url: String,
}

/// The tools, in the order of the prompt: those built in first.
#[derive(Debug, Default)]
pub struct ToolTable {
    /// Those built in.
    pub built_in: Vec<BuiltIn>,
    /// Those of the file.
    pub named: Vec<NamedTool>,
}

impl BuiltIn {
    fn spec(self) -> ToolSpec {
        match self {
            Self::Search => ToolSpec::search(),
            Self::Calculator => Calculator.spec(),
        }
    }
}

impl NamedTool {
    /// What the policy is told.
    pub fn spec(&self) -> ToolSpec {
        let Self { name, description, parameters, .. } = self.clone();
        ToolSpec { name, description, parameters }
    }
}

impl ToolNames {
    /// The tools, with those of the file.
    pub fn read(&self) -> Result<ToolTable, Error> {
        let named = self.tools_file.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(ToolTable { built_in: self.tools.clone(), named })
    }
}

impl ToolTable {
    /// What the policy is told.
    pub fn specs(&self) -> Vec<ToolSpec> {
        let built_in = self.built_in.iter().map(|tool| tool.spec());
        built_in.chain(self.named.iter().map(NamedTool::spec)).collect()
    }

    /// Refuses two tools of one name, and tools that no call of the profile can name.
    pub fn check(&self, profile: &Profile) -> Result<(), Error> {
        let (mut names, specs) = (BTreeSet::new(), self.specs());
        if let Some(twice) = specs.iter().find(|spec| !names.insert(&spec.name)) {
            return Err(Error::Tools(format!("the tool `{}` is named twice by --tools and --tools-file", twice.name)));
        }
        let (name, tag) = (&profile.name, &profile.tags.tool_call);
        match specs.iter().find(|spec| tag == "search" && spec.name != *tag) {
            Some(spec) => Err(Error::Tools(format!(
                "profile `{name}` calls by <search>QUERY</search>, which names no tool but `search`: take `{}` out of the \
                 tools, or choose a profile whose calls are JSON",
                spec.name
            ))),
            None => Ok(()),
        }
    }
}

/// The tools of a file: a JSON list.
fn read(path: &Path) -> Result<Vec<NamedTool>, Error> {
    let error = |message: String| Error::ToolFile { path: path.to_owned(), message };
    let text = fs_err::read_to_string(path).map_err(|cause| Error::Tools(cause.to_string()))?;
    let tools: Vec<NamedTool> = serde_json::from_str(&text).map_err(|cause| {
        let expected = r#"expected [{"name": …, "description": …, "parameters": {JSON schema}, "url": "http://…"}, …]"#;
        error(format!("{expected}: {cause}"))
    })?;
    for NamedTool { name, parameters, .. } in &tools {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if name.is_empty() || !name.chars().all(is_word) {
            return Err(error(format!("`{name}` is no name for a tool")));
        }
        if !parameters.is_object() {
            return Err(error(format!("`parameters` of `{name}` is no JSON schema")));
        }
    }
    Ok(tools)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tools: &[BuiltIn], file: Option<&str>) -> (tempfile::TempDir, ToolNames) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tools.json");
        let tools_file = file.map(|text| {
            fs_err::write(&path, text).unwrap();
            path
        });
        (folder, ToolNames { tools: tools.to_vec(), tools_file })
    }

    #[test]
    fn tools_of_both_kinds_are_told_in_order() {
        let weather = r#"[{"name": "weather", "description": "d", "parameters": {}, "url": "http://w"}]"#;
        let (_folder, all) = names(&[BuiltIn::Calculator, BuiltIn::Search], Some(weather));
        let table = all.read().unwrap();
        let specs = table.specs();
        assert_eq!(
            specs.iter().map(|spec| spec.name.as_str()).collect::<Vec<_>>(),
            ["calculator", "search", "weather"]
        );
        assert!(table.check(&Profile::load("mempo").unwrap()).is_ok());
        let told = table.check(&Profile::load("mem1").unwrap()).unwrap_err().to_string();
        assert!(told.contains("take `calculator` out"), "{told}");
        let (_folder, twice) = names(&[BuiltIn::Search, BuiltIn::Search], None);
        let told = twice.read().unwrap().check(&Profile::load("mempo").unwrap()).unwrap_err().to_string();
        assert!(told.contains("named twice"), "{told}");
    }

    #[test]
    fn a_file_that_names_no_tools_is_refused_with_its_name() {
        for (text, told) in [
            ("{", "expected [{"),
            (r#"[{"name": "a b", "description": "", "parameters": {}, "url": "u"}]"#, "`a b` is no name for a tool"),
            (r#"[{"name": "a", "description": "", "parameters": 1, "url": "u"}]"#, "`parameters` of `a` is no"),
            (r#"[{"name": "a", "description": "", "parameters": {}, "url": "u", "more": 1}]"#, "unknown field `more`"),
        ] {
            let error = names(&[], Some(text)).1.read().unwrap_err().to_string();
            assert!(error.contains("tools.json: ") && error.contains(told), "{error}");
        }
    }
}
