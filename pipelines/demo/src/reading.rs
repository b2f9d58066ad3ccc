//! A reader at one document: what it writes down of each chunk, what it forgets, spoils and mends.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, ensure};
use clap::Args;
use mempo_data::{Document, Task};
use serde::Serialize;

use crate::expert::steps_of;
use crate::questions::Steps;
use crate::random::Random;
use crate::spoil::{mend, spoil};
use crate::work::{Memory, UNKNOWN};

/// How a reader works. What is not to be learnt is marked as cut short: `mempo-sft build` leaves such steps out, and shows what
/// they wrote.
#[derive(Debug, Clone, Copy, Args, Serialize)]
pub(crate) struct ReadingHabits {
    /// Probability of dropping each known fact whenever the memory is rewritten
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    forget: f64,
    /// Probability of spoiling the memory of a step, as a small model does: an entry about something else, a garbled name, a
    /// wrong value, repetition, no end. Such a step is not to be learnt; the next one mends what shows
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    spoil: f64,
    /// Share of the steps to be learnt among those that are told nothing and have nothing to mend
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    learn_dull: f64,
}

impl ReadingHabits {
    /// Those of a reader who makes no mistakes.
    pub(crate) fn faultless() -> Self {
        Self { forget: 0.0, spoil: 0.0, learn_dull: 1.0 }
    }

    /// Refuses what is no probability.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        for (name, value) in [("forget", self.forget), ("spoil", self.spoil), ("learn-dull", self.learn_dull)] {
            ensure!((0.0..=1.0).contains(&value), "--{name} {value}: expected a probability");
        }
        Ok(())
    }
}

/// What can be read and known.
pub(crate) struct World {
    /// The passages by id, each as documents show it.
    passages: HashMap<String, String>,
    /// What tasks ask for, each fact once: what it is about, and what is true of it.
    facts: Vec<(String, String)>,
}

impl World {
    /// The corpus of `mempo-demo data`, and the facts that these tasks ask for.
    pub(crate) fn new(corpus: &Path, tasks: &[Task]) -> anyhow::Result<Self> {
        let text = fs_err::read_to_string(corpus)?;
        let rows = text.lines().map(|line| {
            let Document { doc_id, title, text } = serde_json::from_str(line).context("not a row of the corpus")?;
            Ok((doc_id, format!("{title}\n{text}")))
        });
        let passages = rows.collect::<anyhow::Result<_>>()?;
        let mut facts = BTreeSet::new();
        for task in tasks {
            let told = |steps: Steps| steps.hops.into_iter().next_back().map(|hop| (steps.mention, hop.value));
            facts.extend(steps_of(task)?.into_iter().filter_map(told));
        }
        ensure!(!facts.is_empty(), "no task asks for a fact");
        Ok(Self { passages, facts: facts.into_iter().collect() })
    }

    /// A fact about nothing that was asked for, to put where it does not belong: as often as not one that the chunk tells, where it
    /// tells any. Nothing where all facts were asked for.
    fn other(&self, asked: &[&str], chunk: &str, random: &mut Random) -> Option<(&str, &str)> {
        let others: Vec<&(String, String)> =
            self.facts.iter().filter(|(name, _)| !asked.contains(&name.as_str())).collect();
        let is_told = |(name, value): &(String, String)| chunk.contains(name) && chunk.contains(value);
        let told: Vec<&(String, String)> = others.iter().copied().filter(|fact| is_told(fact)).collect();
        let near = !told.is_empty() && random.chance(0.5);
        let from = if near { told } else { others };
        (!from.is_empty()).then(|| random.pick(&from)).map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// A document that is being read.
pub(crate) struct Reading<'d> {
    questions: Vec<Steps>,
    pub(crate) document: &'d [i32],
    memory: Memory,
    /// The memory as it was written last, where it was spoilt.
    spoilt: Option<String>,
    pub(crate) step: usize,
    random: Random,
}

impl<'d> Reading<'d> {
    /// Of a document of which nothing is read yet.
    pub(crate) fn new(questions: Vec<Steps>, document: &'d [i32], random: Random) -> Self {
        Self { questions, document, memory: Memory::default(), spoilt: None, step: 0, random }
    }

    /// What is written about a chunk, and whether it is to be learnt.
    pub(crate) fn read(&mut self, chunk: &str, world: &World, habits: &ReadingHabits) -> (String, bool) {
        let is_mended = self.mend();
        let is_told = self.take_in(chunk, &world.passages, habits.forget);
        let whole = format!("<mem>{}</mem>", self.memory.render());
        if self.random.chance(habits.spoil)
            && let Some(spoilt) = self.spoil(chunk, world).filter(|text| *text != whole)
        {
            self.spoilt = Some(spoilt.clone());
            return (spoilt, false);
        }
        let is_learnt = is_told || is_mended || self.random.chance(habits.learn_dull);
        (whole, is_learnt)
    }

    /// The answers, as far as the memory has them.
    pub(crate) fn answer(&mut self) -> String {
        self.mend();
        let answers = self.questions.iter().map(|question| self.memory.answer(&question.mention).unwrap_or(UNKNOWN));
        format!("<answer>{}</answer>", answers.collect::<Vec<_>>().join("; "))
    }

    /// The memory with something wrong in it, if the world has what does not belong there.
    fn spoil(&mut self, chunk: &str, world: &World) -> Option<String> {
        let asked = asked(&self.questions);
        let other = world.other(&asked, chunk, &mut self.random)?;
        Some(spoil(&self.memory, &asked, other, &mut self.random))
    }

    /// Makes what can be made of a spoilt memory; whether it was one.
    fn mend(&mut self) -> bool {
        let Some(spoilt) = self.spoilt.take() else { return false };
        self.memory = mend(&spoilt, &asked(&self.questions));
        true
    }

    /// Forgets some of what was known and adds what the chunk tells; whether it told anything.
    fn take_in(&mut self, chunk: &str, passages: &HashMap<String, String>, forget: f64) -> bool {
        let told = self.questions.iter().filter_map(|question| {
            let hop = question.hops.last()?;
            let passage = passages.get(&hop.doc_id)?;
            let end = passage.find(&hop.value)? + hop.value.len();
            chunk.contains(&passage[..end]).then(|| (question.mention.clone(), hop.value.clone()))
        });
        let told: Vec<(String, String)> = told.collect();
        self.memory.forget(usize::MAX, forget, &mut self.random);
        for (mention, value) in &told {
            self.memory.learn(mention, value, true);
        }
        !told.is_empty()
    }
}

/// What is asked about.
fn asked(questions: &[Steps]) -> Vec<&str> {
    questions.iter().map(|question| question.mention.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::questions::Hop;

    const PERU: &str = "Peru\ncapital: Lima; named: x";
    const CHAD: &str = "Chad\ninternet code: .td; more";
    const SPOILING: ReadingHabits = ReadingHabits { forget: 0.0, spoil: 1.0, learn_dull: 1.0 };

    fn world() -> World {
        let passages = [("pe", PERU), ("td", CHAD)].map(|(id, text)| (id.to_owned(), text.to_owned()));
        let facts = [("Benin", "leopard"), ("Cuba", "Havana"), ("Peru", "Callao")]
            .map(|(of, is)| (of.to_owned(), is.to_owned()));
        World { passages: HashMap::from(passages), facts: facts.to_vec() }
    }

    /// Two questions, one of Peru and one of Chad.
    fn reading(seed: u64) -> Reading<'static> {
        let question = |(mention, doc_id, value): (&str, &str, &str)| Steps {
            mention: mention.to_owned(),
            attribute: String::new(),
            hops: vec![Hop { query: String::new(), doc_id: doc_id.to_owned(), value: value.to_owned() }],
        };
        let questions = [("Peru", "pe", "Lima"), ("Chad", "td", ".td")].map(question);
        Reading::new(questions.to_vec(), &[], Random::new(seed))
    }

    #[test]
    fn what_is_spoilt_is_shown_and_not_learnt_and_mended_by_the_next_step() {
        let world = world();
        let (mut kept, mut wrong, mut lost) = (0, 0, 0);
        for seed in 0..1_000 {
            let mut reading = reading(seed);
            reading.read(PERU, &world, &ReadingHabits::faultless());
            let (spoilt, is_learnt) = reading.read("Cuba\ncapital: Havana", &world, &SPOILING);
            assert!(!is_learnt && spoilt != "<mem>Peru = Lima</mem>", "{spoilt}");
            let (mended, is_learnt) =
                reading.read("nothing", &world, &ReadingHabits { learn_dull: 0.0, ..ReadingHabits::faultless() });
            assert!(is_learnt, "{mended}");
            let values = ["Peru = Lima", "Peru = leopard", "Peru = Havana", "Chad = leopard", "Chad = Havana"];
            let text = mended.strip_prefix("<mem>").unwrap().strip_suffix("</mem>").unwrap();
            let entries: Vec<&str> = text.split("; ").filter(|entry| !entry.is_empty()).collect();
            assert!(entries.iter().all(|entry| values.contains(entry)), "{spoilt} -> {mended}");
            assert!(entries.iter().filter(|entry| entry.starts_with("Peru")).count() < 2, "{spoilt} -> {mended}");
            let is_known = entries.contains(&"Peru = Lima");
            let is_readable = ["Peru = Lima; ", "Peru = Lima</mem>"].iter().any(|entry| spoilt.contains(entry));
            assert!(is_known == is_readable, "{spoilt} -> {mended}");
            kept += u32::from(is_known);
            wrong += u32::from(!is_known && text.contains("Peru"));
            lost += u32::from(!text.contains("Peru"));
            let kept = entries.iter().find_map(|entry| entry.strip_prefix("Peru = ")).unwrap_or(UNKNOWN);
            assert!(reading.answer().starts_with(&format!("<answer>{kept}; ")), "{mended}");
        }
        assert!(kept > 500 && wrong > 30 && lost > 30, "{kept} {wrong} {lost}");
    }

    #[test]
    fn a_wrong_value_gives_way_to_the_passage_and_a_right_one_to_nothing() {
        let world = world();
        let mut corrected = 0;
        for seed in 0..300 {
            let mut reading = reading(seed);
            let (spoilt, _) = reading.read("nothing", &world, &SPOILING);
            let (text, _) = reading.read(PERU, &world, &ReadingHabits::faultless());
            assert!(text.contains("Peru = Lima") && !text.contains("Peru = leopard"), "{spoilt} -> {text}");
            corrected += u32::from(spoilt.contains("Peru = leopard</mem>"));
            let (text, _) = reading.read("Peru\ncapital: Havana", &world, &ReadingHabits::faultless());
            assert!(text.contains("Peru = Lima"), "{text}");
        }
        assert!(corrected > 5, "{corrected}");
    }

    #[test]
    fn of_dull_steps_some_are_learnt_of_others_all() {
        let world = world();
        let habits = ReadingHabits { learn_dull: 0.2, ..ReadingHabits::faultless() };
        let learnt = |chunk: &str| (0..1_000).filter(|seed| reading(*seed).read(chunk, &world, &habits).1).count();
        assert_eq!(learnt(CHAD), 1_000);
        assert!((150..250).contains(&learnt("nothing")));
    }
}
