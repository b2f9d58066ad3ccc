//! Questions of one and two hops, and the check that a search finds what they need.

use std::collections::{HashMap, HashSet};

use mempo_agent::SearchIndex;
use mempo_data::Document;
use serde::{Deserialize, Serialize};

use crate::factbook::Entity;
use crate::facts::{ATTRIBUTES, Facts, NEIGHBOR, Rejections};

/// Attributes whose value leads to the one entity that has it, and how the entity is then called.
const BRIDGES: [(&str, &str); 5] = [
    ("capital", "country whose capital is "),
    ("internet code", "country whose internet code is "),
    ("highest point", "country whose highest point is "),
    ("aircraft prefix", "country whose aircraft prefix is "),
    (NEIGHBOR, "only land neighbor of "),
];

/// A question with everything that is known of its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::struct_field_names, reason = "the name of the column")]
pub(crate) struct Question {
    pub(crate) id: String,
    pub(crate) question: String,
    pub(crate) golden_answers: Vec<String>,
    pub(crate) source: String,
    pub(crate) split: String,
    /// Codes of the entities it is about: no other question of a task may be about one of them.
    pub(crate) entities: Vec<String>,
    pub(crate) metadata: Steps,
}

/// How a question is worked on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Steps {
    /// What the question names: an entity, or the value that leads to one.
    pub(crate) mention: String,
    pub(crate) attribute: String,
    pub(crate) hops: Vec<Hop>,
}

/// One search.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hop {
    pub(crate) query: String,
    /// The document that tells.
    pub(crate) doc_id: String,
    /// What it tells: the answer, or for the first of two hops the entity.
    pub(crate) value: String,
}

/// Finds documents and remembers what it found.
pub(crate) struct Finder<'a> {
    pub(crate) index: &'a SearchIndex,
    pub(crate) top_k: usize,
}

impl Finder<'_> {
    pub(crate) fn documents(&self, query: &str) -> anyhow::Result<Vec<Document>> {
        Ok(self.index.search(query, self.top_k)?.into_iter().map(|hit| hit.document).collect())
    }

    fn finds(&self, hop: &Hop) -> anyhow::Result<bool> {
        Ok(self.documents(&hop.query)?.iter().any(|document| document.doc_id == hop.doc_id))
    }
}

/// All questions whose documents are found, one-hop ones first; refusals are counted by their rule.
pub(crate) fn compose(
    entities: &[Entity],
    facts: &Facts,
    finder: &Finder<'_>,
    rejections: &mut Rejections,
) -> anyhow::Result<Vec<Question>> {
    let mut questions = Vec::new();
    let mut refuse = |reason: &str| *rejections.entry(format!("question: {reason}")).or_default() += 1;
    for entity in entities {
        for (attribute, _) in ATTRIBUTES {
            let Some(hop) = last_hop(entity, attribute, facts) else { continue };
            if finder.finds(&hop)? {
                questions.push(question(&[entity], attribute, &entity.name, vec![hop]));
            } else {
                refuse(&format!("`{attribute}` not found by its query"));
            }
        }
    }
    let found: HashSet<String> = questions.iter().map(|question| question.metadata.hops[0].query.clone()).collect();
    for (first, mention, target, entities) in bridges(entities, facts, &mut refuse) {
        if !finder.finds(&first)? {
            refuse("bridge not found by its query");
            continue;
        }
        for (attribute, _) in ATTRIBUTES {
            let Some(last) = last_hop(target, attribute, facts).filter(|hop| found.contains(&hop.query)) else {
                continue;
            };
            let question = question(&entities, attribute, &mention, vec![first.clone(), last]);
            let (text, answer) = (question.question.to_lowercase(), question.golden_answers[0].to_lowercase());
            if text.contains(&answer) {
                refuse("value in the question");
            } else {
                questions.push(question);
            }
        }
    }
    Ok(questions)
}

/// The search that gives an attribute of a known entity.
fn last_hop(entity: &Entity, attribute: &'static str, facts: &Facts) -> Option<Hop> {
    let fact = facts.get(&(entity.code.clone(), attribute))?;
    let query = format!("{attribute} of {}", entity.name);
    Some(Hop { query, doc_id: fact.doc_id.clone(), value: fact.value.clone() })
}

type Bridge<'a> = (Hop, String, &'a Entity, Vec<&'a Entity>);

/// First hops that lead to one entity only: the hop, what the question names, the entity, and all entities involved.
fn bridges<'a>(entities: &'a [Entity], facts: &Facts, refuse: &mut impl FnMut(&str)) -> Vec<Bridge<'a>> {
    let mut holders: HashMap<(&str, String), usize> = HashMap::new();
    for ((_, name), fact) in facts {
        *holders.entry((name, fact.value.to_lowercase())).or_default() += 1;
    }
    let mut bridges = Vec::new();
    for entity in entities {
        for (attribute, phrase) in BRIDGES {
            let Some(fact) = facts.get(&(entity.code.clone(), attribute)) else { continue };
            let neighbor = entities.iter().find(|other| other.name == fact.value && other.source == entity.source);
            let (mention, target) = match neighbor {
                Some(neighbor) if attribute == NEIGHBOR => (&entity.name, neighbor),
                None if attribute == NEIGHBOR => {
                    refuse("neighbor unknown or of another source");
                    continue;
                }
                _ if holders[&(attribute, fact.value.to_lowercase())] > 1 => {
                    refuse("bridge not unique");
                    continue;
                }
                _ => (&fact.value, entity),
            };
            let first =
                Hop { query: format!("{phrase}{mention}"), doc_id: fact.doc_id.clone(), value: target.name.clone() };
            let mut both = vec![entity, target];
            both.dedup_by_key(|entity| &entity.code);
            bridges.push((first, mention.clone(), target, both));
        }
    }
    bridges
}

fn question(entities: &[&Entity], attribute: &str, mention: &str, hops: Vec<Hop>) -> Question {
    let last = &hops[hops.len() - 1];
    let about = if hops.len() == 1 { mention.to_owned() } else { format!("the {}", hops[0].query) };
    let verb = if attribute.ends_with("colors") { "are" } else { "is" };
    Question {
        id: format!("{}/{}", hops[0].query, attribute).replace(' ', "-"),
        question: format!("What {verb} the {attribute} of {about}?"),
        golden_answers: vec![last.value.clone()],
        source: entities[0].source.clone(),
        split: entities[0].split.to_owned(),
        entities: entities.iter().map(|entity| entity.code.clone()).collect(),
        metadata: Steps { mention: mention.to_owned(), attribute: attribute.to_owned(), hops },
    }
}

#[cfg(test)]
mod tests {
    use mempo_agent::Bm25Options;
    use serde_json::json;

    use super::*;
    use crate::facts;
    use crate::passages::documents;

    fn entity(code: &str, split: &'static str, name: &str, capital: &str, border: &str) -> Entity {
        let fields = json!({
            "Government": {
                "Country name": {"conventional short form": {"text": name}},
                "Capital": {"name": {"text": capital}},
                "National symbol(s)": {"text": "lion"},
            },
            "Geography": {"Land boundaries": {"border countries": {"text": border}}},
        });
        Entity::new(code, split, fields).unwrap()
    }

    fn composed(entities: &[Entity]) -> (Vec<Question>, Rejections) {
        let corpus: Vec<Document> = entities.iter().flat_map(documents).collect();
        let folder = tempfile::tempdir().unwrap();
        SearchIndex::build(corpus.clone(), folder.path()).unwrap();
        let index = SearchIndex::open(folder.path(), Bm25Options::default()).unwrap();
        let mut rejections = Rejections::new();
        let facts = facts::collect(entities, &corpus, &mut rejections);
        let questions = compose(entities, &facts, &Finder { index: &index, top_k: 1 }, &mut rejections).unwrap();
        (questions, rejections)
    }

    #[test]
    fn one_and_two_hops_with_unique_bridges_within_a_source() {
        let entities = [
            entity("aa", "train", "Arle", "Ayt", "Bolm 5 km"),
            entity("bb", "train", "Bolm", "Bux", "Arle 5 km; Cade 6 km"),
            entity("cc", "test", "Cade", "Cux", "Bolm 6 km"),
            entity("dd", "test", "Dorn", "Cux", ""),
        ];
        let (questions, rejections) = composed(&entities);
        let texts: Vec<&str> = questions.iter().map(|question| question.question.as_str()).collect();
        for expected in [
            "What is the capital of Arle?",
            "What is the national symbol of Dorn?",
            "What is the national symbol of the country whose capital is Ayt?",
            "What is the capital of the only land neighbor of Arle?",
        ] {
            assert!(texts.contains(&expected), "{texts:?}");
        }
        let bridged = questions.iter().find(|q| q.question.ends_with("neighbor of Arle?")).unwrap();
        assert_eq!(bridged.entities, ["aa", "bb"]);
        assert_eq!(bridged.metadata.hops[0].value, "Bolm");
        assert!(!texts.iter().any(|text| text.contains("capital is Cux") || text.contains("neighbor of Cade")));
        assert_eq!(rejections["question: bridge not unique"], 2);
        assert_eq!(rejections["question: neighbor unknown or of another source"], 1);
    }

    #[test]
    fn a_value_that_the_question_gives_away_is_refused() {
        let mut lion = entity("ee", "dev", "Elm", "Lion City", "");
        let (questions, rejections) = composed(std::slice::from_mut(&mut lion));
        // Its symbol and, of course, the capital itself.
        assert_eq!(rejections["question: value in the question"], 2);
        assert_eq!(questions.len(), 2);
    }

    #[test]
    fn what_a_search_does_not_find_first_is_refused() {
        let named = |code, name| entity(code, "dev", name, "Somewhere", "");
        // The capital of `Elm` is asked with words that all stand in another entity's document too, which comes first.
        let (questions, rejections) = composed(&[named("aa", "Capital of Elm"), named("ee", "Elm")]);
        assert!(rejections.keys().any(|rule| rule.contains("not found by its query")), "{rejections:?}");
        assert!(questions.iter().all(|question| question.question != "What is the capital of Elm?"));
    }
}
