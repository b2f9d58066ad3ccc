//! Made-up facts: questions of the training regions with every name and value replaced by invented ones, in the question
//! and in its documents alike. Nothing of them can be known by heart; only reading helps.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::LazyLock;

use anyhow::Context;
use mempo_data::Document;
use regex::{Captures, Regex};

use crate::passages::place;
use crate::questions::Question;
use crate::random::Random;
use crate::work::Search;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// Words that keep a value what it is.
const KEPT: [&str; 10] = ["of", "the", "and", "m", "km", "years", "President", "King", "Prince", "Queen"];
const LONGEST_WORD: usize = 12;
/// Letters that words of one stem share, and that may follow them in the word known first.
const STEM: usize = 4;
const LONGEST_ENDING: usize = 3;
/// Share of names and values that stay as they are, of words that are taken whole, of fields with other words and with
/// other numbers: what is asked for must not stand out as the only invented part of its document.
const SAME: f64 = 0.05;
const WHOLE_WORD: f64 = 0.3;
const OTHER_WORDS: f64 = 0.5;
const OTHER_NUMBERS: f64 = 0.5;

static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\p{Alphabetic}+|[0-9]+").expect("a constant expression"));

/// Invents facts in the manner of the real ones.
pub(crate) struct Inventor<'a> {
    one_hop: Vec<&'a Question>,
    two_hops: Vec<&'a Question>,
    documents: HashMap<&'a str, &'a Document>,
    entities: Vec<RealEntity<'a>>,
    capitalised: Vec<String>,
    lower: Vec<String>,
}

/// All that is told and asked of one entity alone.
#[derive(Default)]
struct RealEntity<'a> {
    questions: Vec<&'a Question>,
    documents: Vec<&'a Document>,
}

/// The entities that something is asked of, by their codes: questions of one hop, and all documents.
fn real_entities<'a>(one_hop: &[&'a Question], documents: &'a [Document]) -> Vec<RealEntity<'a>> {
    let mut entities = BTreeMap::<&str, RealEntity<'a>>::new();
    for question in one_hop {
        if let [code] = question.entities.as_slice() {
            entities.entry(code).or_default().questions.push(question);
        }
    }
    for document in documents {
        let entity = document.doc_id.split_once('/').and_then(|(code, _)| entities.get_mut(code));
        if let Some(entity) = entity {
            entity.documents.push(document);
        }
    }
    entities.into_values().collect()
}

impl<'a> Inventor<'a> {
    /// `questions` and `documents` are those that may be learnt from.
    pub(crate) fn new(questions: &'a [Question], documents: &'a [Document]) -> anyhow::Result<Self> {
        let texts = documents.iter().flat_map(|document| [document.title.as_str(), document.text.as_str()]);
        let words: BTreeSet<&str> = texts.flat_map(|text| WORD.find_iter(text).map(|found| found.as_str())).collect();
        let words = words.into_iter().filter(|word| word.chars().count() > 2 && !word.as_bytes()[0].is_ascii_digit());
        let (capitalised, lower): (Vec<String>, Vec<String>) =
            words.map(str::to_owned).partition(|word| word.chars().next().is_some_and(char::is_uppercase));
        let (one_hop, two_hops): (Vec<_>, Vec<_>) =
            questions.iter().partition(|question| question.metadata.hops.len() == 1);
        let enough = [one_hop.len(), two_hops.len(), capitalised.len(), lower.len()].into_iter().all(|count| count > 0);
        enough
            .then_some(())
            .context("questions of one and of two hops, capitalised and lower-case words are needed")?;
        let entities = real_entities(&one_hop, documents);
        let documents = documents.iter().map(|document| (document.doc_id.as_str(), document)).collect();
        Ok(Self { one_hop, two_hops, documents, entities, capitalised, lower })
    }

    /// A question about invented things, and what a search for each of its hops finds.
    pub(crate) fn question(&self, two_hops: bool, random: &mut Random) -> anyhow::Result<(Question, Found)> {
        let real = *random.pick(if two_hops { &self.two_hops } else { &self.one_hop });
        let mut documents = Vec::new();
        for hop in &real.metadata.hops {
            let document = self.documents.get(hop.doc_id.as_str());
            let document = *document.with_context(|| format!("{}: no document `{}`", real.id, hop.doc_id))?;
            documents.push(document);
        }
        let names = self.names(&[real], &documents, random);
        let question = renamed(real, &names);
        let documents = documents.iter().map(|document| self.invented(document, &names, random));
        let found = question.metadata.hops.iter().map(|hop| hop.query.clone()).zip(documents).collect();
        Ok((question, Found(found)))
    }

    /// An invented entity: questions about it, and its documents.
    pub(crate) fn entity(&self, random: &mut Random) -> (Vec<Question>, Vec<Document>) {
        let real = random.pick(&self.entities);
        let names = self.names(&real.questions, &real.documents, random);
        let questions = real.questions.iter().map(|question| renamed(question, &names)).collect();
        let documents = real.documents.iter().map(|document| self.invented(document, &names, random)).collect();
        (questions, documents)
    }

    /// A document of what these names stand for.
    fn invented(&self, real: &Document, names: &[(String, String)], random: &mut Random) -> Document {
        let text = self.other_fields(&rename(&real.text, names), names, random);
        Document { doc_id: real.doc_id.clone(), title: rename(&real.title, names), text }
    }

    /// What each name and value of these questions is replaced by, the longest first.
    fn names(&self, real: &[&Question], documents: &[&Document], random: &mut Random) -> Vec<(String, String)> {
        let values = real.iter().flat_map(|question| question.metadata.hops.iter().map(|hop| &hop.value));
        // Titles first: what is called after an entity takes its stem.
        let titles = documents.iter().rev().map(|document| &document.title);
        let all = titles.chain(values).chain(real.iter().map(|question| &question.metadata.mention));
        let mut seen = HashSet::new();
        let mut words = Vec::new();
        let mut names: Vec<(String, String)> = Vec::new();
        for name in all.filter(|name| seen.insert(name.as_str())) {
            let invented = if random.chance(SAME) { name.clone() } else { self.invent(name, &mut words, random) };
            names.push((name.clone(), invented));
        }
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        names
    }

    /// A capitalised or lower-case word.
    pub(crate) fn any_word(&self, random: &mut Random) -> String {
        let like = if random.chance(0.5) { "Abc" } else { "abc" };
        self.word(like, random)
    }

    /// Other words and numbers of the same look. `words` holds what was invented for this question so far: a word stays
    /// the same word in it, and words of one stem (Armenia, Armenian) stay of one stem.
    fn invent(&self, text: &str, words: &mut Vec<(String, String)>, random: &mut Random) -> String {
        let replace = |found: &Captures<'_>| match &found[0] {
            word if KEPT.contains(&word) => word.to_owned(),
            word if MONTHS.contains(&word) => (*random.pick(&MONTHS)).to_owned(),
            word => {
                if let Some((_, invented)) = words.iter().find(|(known, _)| known == word) {
                    return invented.clone();
                }
                let derived = words.iter().find_map(|(known, invented)| derived(word, known, invented));
                let invented = derived.unwrap_or_else(|| self.word(word, random));
                words.push((word.to_owned(), invented.clone()));
                invented
            }
        };
        WORD.replace_all(text, replace).into_owned()
    }

    fn word(&self, like: &str, random: &mut Random) -> String {
        let letters: Vec<char> = like.chars().collect();
        let upper = letters.iter().all(|letter| letter.is_uppercase());
        if letters[0].is_ascii_digit() || letters.len() < 3 || (upper && letters.len() < 5) {
            return letters.iter().map(|letter| other_letter(*letter, random)).collect();
        }
        let pool = if letters[0].is_uppercase() { &self.capitalised } else { &self.lower };
        let head: Vec<char> = random.pick(pool).chars().collect();
        let mut word: String = head.iter().collect();
        if !random.chance(WHOLE_WORD) {
            let tail: Vec<char> = random.pick(&self.lower).chars().collect();
            let (kept, left_out) = (1 + random.below(head.len() - 1), random.below(tail.len() - 1));
            word = head[..kept].iter().chain(&tail[left_out..]).take(LONGEST_WORD).collect();
        }
        if upper { word.to_uppercase() } else { word }
    }

    /// The text with other words and numbers in some of its fields, but not in labels or invented names.
    fn other_fields(&self, text: &str, names: &[(String, String)], random: &mut Random) -> String {
        let of_names: Vec<(usize, usize)> = names
            .iter()
            .flat_map(|(_, name)| text.match_indices(name).map(|(at, part)| (at, at + part.len())))
            .collect();
        let (mut other, mut invented, mut start) = (String::new(), Vec::new(), 0);
        for field in text.split_inclusive("; ") {
            let label = field.split_once(": ").map_or(field, |(label, _)| label);
            let content = start + if place(label).is_some() { label.len() } else { 0 };
            let (words, numbers) = (random.chance(OTHER_WORDS), random.chance(OTHER_NUMBERS));
            let replace = |found: &Captures<'_>| {
                let range = found.get_match().range();
                let (from, to) = (start + range.start, start + range.end);
                let fixed = from < content || of_names.iter().any(|name| from < name.1 && name.0 < to);
                let wanted = if found[0].as_bytes()[0].is_ascii_digit() { numbers } else { words };
                if wanted && !fixed { self.invent(&found[0], &mut invented, random) } else { found[0].to_owned() }
            };
            other += &WORD.replace_all(field, replace);
            start += field.len();
        }
        other
    }
}

/// The word that is to `invented` as `word` is to `known`, if they begin alike and `known` ends soon after.
fn derived(word: &str, known: &str, invented: &str) -> Option<String> {
    let alike = word.chars().zip(known.chars()).take_while(|(a, b)| a == b).count();
    let rest = known.chars().count() - alike;
    (alike >= STEM && rest <= LONGEST_ENDING).then(|| {
        let kept = invented.chars().count().saturating_sub(rest).max(2);
        invented.chars().take(kept).chain(word.chars().skip(alike)).collect()
    })
}

fn other_letter(letter: char, random: &mut Random) -> char {
    let alphabet: &[u8] = match letter {
        _ if letter.is_ascii_digit() => b"0123456789",
        _ if letter.is_uppercase() => b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        _ => b"abcdefghijklmnopqrstuvwxyz",
    };
    char::from(*random.pick(alphabet))
}

/// The question with other names and values.
fn renamed(real: &Question, names: &[(String, String)]) -> Question {
    let mut question = real.clone();
    question.question = rename(&question.question, names);
    question.metadata.mention = rename(&question.metadata.mention, names);
    question.golden_answers.iter_mut().for_each(|answer| *answer = rename(answer, names));
    for hop in &mut question.metadata.hops {
        hop.query = rename(&hop.query, names);
        hop.value = rename(&hop.value, names);
    }
    question
}

/// Replaces whole words, all names in one pass.
fn rename(text: &str, names: &[(String, String)]) -> String {
    let mut renamed = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let whole = renamed.is_empty() || !text[..text.len() - rest.len()].ends_with(char::is_alphanumeric);
        let found = names.iter().find(|(name, _)| {
            whole && rest.strip_prefix(name.as_str()).is_some_and(|after| !after.starts_with(char::is_alphanumeric))
        });
        let length = if let Some((name, invented)) = found {
            renamed.push_str(invented);
            name.len()
        } else {
            renamed.push(first);
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    renamed
}

/// Documents by the query that finds them: the only one that is searched for.
#[derive(Debug, Default)]
pub(crate) struct Found(HashMap<String, Document>);

impl Found {
    pub(crate) fn add(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

impl Search for Found {
    fn documents(&mut self, query: &str) -> anyhow::Result<Vec<Document>> {
        Ok(self.0.get(query).cloned().into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::questions::{Hop, Steps};

    fn example() -> (Vec<Question>, Vec<Document>) {
        let document = |doc_id: &str, title: &str, text: &str| Document {
            doc_id: doc_id.into(),
            title: title.into(),
            text: text.into(),
        };
        let documents = vec![
            document("ls/borders", "Lesotho", "coastline: 0 km; land neighbor: South Africa 1,106 km"),
            document("sf/capital", "South Africa", "capital: Pretoria; time: UTC+2 (7 hours ahead)"),
        ];
        let hop = |query: &str, doc_id: &str, value: &str| Hop {
            query: query.into(),
            doc_id: doc_id.into(),
            value: value.into(),
        };
        let question = |text: &str, mention: &str, hops: Vec<Hop>| Question {
            id: text.into(),
            question: text.into(),
            golden_answers: vec!["Pretoria".into()],
            source: "factbook".into(),
            split: "train".into(),
            entities: vec!["sf".into()],
            metadata: Steps { mention: mention.into(), attribute: "capital".into(), hops },
        };
        let last = hop("capital of South Africa", "sf/capital", "Pretoria");
        let first = hop("only land neighbor of Lesotho", "ls/borders", "South Africa");
        let questions = vec![
            question("What is the capital of South Africa?", "South Africa", vec![last.clone()]),
            question("What is the capital of the only land neighbor of Lesotho?", "Lesotho", vec![first, last]),
        ];
        (questions, documents)
    }

    #[test]
    fn invented_questions_hold_together() {
        let (questions, documents) = example();
        let inventor = Inventor::new(&questions, &documents).unwrap();
        let mut random = Random::new(1);
        let (mut distinct, mut other_words) = (HashSet::new(), 0);
        for _ in 0..200 {
            let (question, mut found) = inventor.question(true, &mut random).unwrap();
            let hops = &question.metadata.hops;
            assert!(question.question.contains(&question.metadata.mention));
            assert!(hops[0].query.ends_with(&question.metadata.mention));
            assert_eq!(hops[1].value, question.golden_answers[0]);
            for hop in hops {
                let documents = found.documents(&hop.query).unwrap();
                assert!(documents[0].text.contains(&hop.value), "{documents:?} {hop:?}");
            }
            let last = found.documents(&hops[1].query).unwrap();
            assert_eq!(hops[1].query, format!("capital of {}", last[0].title));
            assert!(last[0].text.contains("; time: "), "{last:?}");
            other_words += usize::from(!last[0].text.contains("hours ahead"));
            distinct.insert(question.golden_answers[0].clone());
        }
        assert!(distinct.len() > 100, "{}", distinct.len());
        assert!((60..140).contains(&other_words), "{other_words}");
    }

    #[test]
    fn an_invented_entity_is_one_in_all_its_documents_and_questions() {
        let (questions, mut documents) = example();
        let code = Document { doc_id: "sf/traffic".into(), text: "internet code: .za".into(), ..documents[1].clone() };
        documents.push(code);
        let inventor = Inventor::new(&questions, &documents).unwrap();
        let mut random = Random::new(1);
        let mut titles = HashSet::new();
        for _ in 0..50 {
            let (questions, documents) = inventor.entity(&mut random);
            let ids: Vec<&str> = documents.iter().map(|document| document.doc_id.as_str()).collect();
            assert_eq!((questions.len(), ids), (1, vec!["sf/capital", "sf/traffic"]));
            assert!(documents.iter().all(|document| document.title == questions[0].metadata.mention));
            assert!(documents[0].text.contains(&format!("capital: {}", questions[0].golden_answers[0])));
            titles.insert(documents[0].title.clone());
        }
        assert!(titles.len() > 40, "{}", titles.len());
    }

    #[test]
    fn words_of_one_stem_stay_of_one_stem() {
        assert_eq!(derived("Armenian", "Armenia", "Olivia").as_deref(), Some("Olivian"));
        assert_eq!(derived("Tajik", "Tajikistan", "Olivia"), None);
        assert_eq!(derived("Saudi", "Sau", "Ol"), None);
    }

    #[test]
    fn only_whole_words_are_renamed_and_only_once() {
        let names = [("South Africa".to_owned(), "Oman".to_owned()), ("Oman".to_owned(), "Mali".to_owned())];
        assert_eq!(rename("South Africa, South African, Oman, Romania", &names), "Oman, South African, Mali, Romania");
    }
}
