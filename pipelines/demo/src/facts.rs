//! Facts: (entity, attribute, value, document), taken from fields by a pattern each, rejected where they can't be asked.

use std::collections::{BTreeMap, HashMap};

use mempo_data::Document;
use regex::Regex;

use crate::factbook::Entity;
use crate::passages::{doc_id, place};

/// Attributes asked about, and what of the field is the value (the first group).
pub(crate) const ATTRIBUTES: [(&str, &str); 19] = [
    ("capital", r"^([^;(,]+)"),
    ("currency", r"^(.+?) \([A-Z]{3}\) per US"),
    ("highest point", r"^([^\d(;]+?),? [\d,.]+ m\b"),
    ("lowest point", r"^([^\d(;]+?),? -?[\d,.]+ m\b"),
    ("national symbol", r"^([^;(]+)"),
    ("national colors", r"^([^;(]+)"),
    ("national anthem", r#"^"([^"]+)""#),
    ("internet code", r"^(\.[a-z]{2})\b"),
    ("aircraft prefix", r"^([A-Z0-9][A-Z0-9-]*)"),
    ("number of airports", r"^([\d,]+)"),
    ("railway length", r"^([\d,.]+ km)"),
    ("government type", r"^([^;(]+)"),
    ("legislature", r"^([^;(]+)"),
    ("chief of state", r"^([^;(,]+)"),
    ("independence date", r"^(\d+ [A-Z][a-z]+ \d{4})"),
    ("national holiday", r"^([^;(,]+)"),
    ("nationality", r"^([^;(,]+)"),
    ("median age", r"^([\d.]+ years)"),
    ("coastline", r"^([\d,.]+ km)"),
];
/// The neighbour across the only land border; leads to an entity but is not asked for.
pub(crate) const NEIGHBOR: &str = "land neighbor";
const ONLY_NEIGHBOR: &str = r"^([^;]+?) [\d,.]+ km(?: \([^;]*\))?$";
const LONGEST_VALUE: usize = 40;
/// What the Factbook writes where there is nothing to tell.
const NOTHING: [&str; 4] = ["none", "unknown", "n/a", "not "];

/// One fact of an entity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fact {
    pub(crate) value: String,
    pub(crate) doc_id: String,
}

/// Facts by entity code and attribute.
pub(crate) type Facts = BTreeMap<(String, &'static str), Fact>;
/// How often each rule refused something.
pub(crate) type Rejections = BTreeMap<String, u64>;

/// All facts of the entities whose value stands in its document.
pub(crate) fn collect(entities: &[Entity], documents: &[Document], rejections: &mut Rejections) -> Facts {
    let texts: HashMap<&str, &str> = documents.iter().map(|d| (d.doc_id.as_str(), d.text.as_str())).collect();
    let attributes = ATTRIBUTES.iter().chain(&[(NEIGHBOR, ONLY_NEIGHBOR)]);
    let attributes: Vec<(&str, Regex)> = attributes
        .map(|(attribute, pattern)| (*attribute, Regex::new(pattern).expect("a constant expression")))
        .collect();
    let mut facts = Facts::new();
    for entity in entities {
        for (attribute, pattern) in &attributes {
            let Some((passage, path)) = place(attribute) else { continue };
            let Some(text) = entity.text(path) else { continue };
            let doc_id = doc_id(entity, passage);
            let document = texts.get(doc_id.as_str()).copied().unwrap_or_default();
            match value(entity, pattern, &text, document) {
                Ok(value) => drop(facts.insert((entity.code.clone(), attribute), Fact { value, doc_id })),
                Err(reason) => *rejections.entry(format!("fact: {reason}")).or_default() += 1,
            }
        }
    }
    facts
}

/// The value in the field's text, or the rule that refuses it.
fn value(entity: &Entity, pattern: &Regex, text: &str, document: &str) -> Result<String, &'static str> {
    let lower = text.to_lowercase();
    if NOTHING.iter().any(|word| lower.starts_with(word)) {
        return Err("nothing to tell");
    }
    let found = pattern.captures(text).ok_or("not of the expected form")?;
    let value = found[1].trim().trim_end_matches(',').to_owned();
    if value.is_empty() || value.chars().count() > LONGEST_VALUE || value.contains([';', '"', '<', '\\', '=']) {
        return Err("too long or with a separator");
    }
    if entity.name.to_lowercase().contains(&value.to_lowercase()) {
        return Err("value in the entity's name");
    }
    if !document.contains(&value) {
        return Err("value not in the document");
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::passages::documents;

    fn facts_of(name: &str, fields: &Value) -> (Facts, Rejections) {
        let mut all = json!({"Government": {
            "Country name": {"conventional short form": {"text": name}}, "Capital": {"name": {"text": "Lima"}},
        }});
        for (section, content) in fields.as_object().unwrap() {
            for (field, text) in content.as_object().unwrap() {
                all[section][field] = text.clone();
            }
        }
        let entity = Entity::new("pe", "test", all).unwrap();
        let mut rejections = Rejections::new();
        let facts = collect(std::slice::from_ref(&entity), &documents(&entity), &mut rejections);
        (facts, rejections)
    }

    #[test]
    fn values_are_cut_out_of_their_fields() {
        let (facts, _) = facts_of(
            "Peru",
            &json!({
                "Economy": {"Exchange rates": {"Currency": {"text": "nuevo sol (PEN) per US dollar -"}}},
                "Geography": {
                    "Elevation": {"highest point": {"text": "Nevado Huascaran 6,746 m"}, "lowest point": {"text": "Pit -3 m"}},
                    "Land boundaries": {"border countries": {"text": "South Africa 1,106 km"}},
                },
                "Transportation": {"Airports": {"text": "174 (2025)"}},
            }),
        );
        let found: Vec<(&str, &str)> = facts.iter().map(|((_, name), fact)| (*name, fact.value.as_str())).collect();
        assert_eq!(
            found,
            [
                ("capital", "Lima"),
                ("currency", "nuevo sol"),
                ("highest point", "Nevado Huascaran"),
                ("land neighbor", "South Africa"),
                ("lowest point", "Pit"),
                ("number of airports", "174"),
            ]
        );
        assert_eq!(facts[&("pe".to_owned(), "currency")].doc_id, "pe/money");
    }

    #[test]
    fn what_cannot_be_asked_is_refused_by_its_rule() {
        let check = |name: &str, fields: Value, reason: &str| {
            let (_, rejections) = facts_of(name, &fields);
            assert_eq!(rejections.get(&format!("fact: {reason}")), Some(&1), "{rejections:?}");
        };
        let borders = |text: &str| json!({"Geography": {"Land boundaries": {"border countries": {"text": text}}}});
        check("Peru", borders("Chile 1 km; Brazil 2 km"), "not of the expected form");
        let symbol = |text: &str| json!({"Government": {"National symbol(s)": {"text": text}}});
        check("Peru", symbol("none"), "nothing to tell");
        check("Peru", symbol("a very long description of a coat of arms and more"), "too long or with a separator");
        check("Peru", symbol("one two three four five six seven 8 9"), "value not in the document");
        check("Lima Land", json!({}), "value in the entity's name");
    }
}
