//! What an expert writes while it works on a task: at each step its memory, what to find next, and a search; at the end
//! the answers. Every value it uses was in the results of one of its own searches.

use mempo_data::Document;
use mempo_text::Profile;
use serde_json::{Value, json};

use crate::questions::Steps;
use crate::random::Random;

/// What is answered where nothing is known.
pub(crate) const UNKNOWN: &str = "unknown";

/// What is known about one question.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    mention: String,
    value: String,
    /// The value is the answer; until then it is the entity that leads on.
    settled: bool,
}

/// An expert's memory: what it knows, in the order in which it learnt it.
#[derive(Debug, Default)]
pub(crate) struct Memory(Vec<Known>);

impl Memory {
    /// Notes what was just learnt; an entity that led on is replaced by where it led.
    pub(crate) fn learn(&mut self, mention: &str, value: &str, settled: bool) {
        self.0.retain(|known| known.mention != mention);
        self.0.push(Known { mention: mention.to_owned(), value: value.to_owned(), settled });
    }

    /// Drops each of the first `count` facts with this probability; how many it dropped.
    pub(crate) fn forget(&mut self, count: usize, probability: f64, random: &mut Random) -> u64 {
        let before = self.0.len();
        let mut index = 0;
        self.0.retain(|_| {
            index += 1;
            index > count || !random.chance(probability)
        });
        (before - self.0.len()) as u64
    }

    pub(crate) fn answer(&self, mention: &str) -> Option<&str> {
        self.0.iter().find(|known| known.mention == mention && known.settled).map(|known| known.value.as_str())
    }

    pub(crate) fn render(&self) -> String {
        let facts = self.0.iter().map(|known| {
            let sign = if known.settled { "=" } else { "->" };
            format!("{} {sign} {}", known.mention, known.value)
        });
        facts.collect::<Vec<_>>().join("; ")
    }
}

/// Where an expert's search results come from.
pub(crate) trait Search {
    /// The documents for a query, best first.
    fn documents(&mut self, query: &str) -> anyhow::Result<Vec<Document>>;
}

/// One step: what the expert writes with and without a memory, and what comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WorkStep {
    memory: Option<String>,
    action: String,
    results: Option<String>,
    forgot: bool,
}

/// An expert's attempt at a task.
#[derive(Debug)]
pub(crate) struct Attempt {
    question: String,
    /// What stands around a memory.
    memory_tag: String,
    steps: Vec<WorkStep>,
    /// The answers from memory; what was forgotten is `unknown`.
    answers: Vec<String>,
    /// The answers of one who sees the whole history.
    remembered: Vec<String>,
    /// Facts that a memory could have kept, each counted at each rewriting, and how many of them it dropped.
    pub(crate) chances: u64,
    pub(crate) forgotten: u64,
}

/// How an expert works.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Habits {
    /// Probability of dropping a fact that was known before, each time the memory is rewritten.
    pub(crate) forget: f64,
}

/// Lets an expert work on the questions one after another.
pub(crate) fn attempt(
    questions: &[(&str, &Steps)],
    search: &mut impl Search,
    profile: &Profile,
    habits: Habits,
    random: &mut Random,
) -> anyhow::Result<Attempt> {
    let texts: Vec<&str> = questions.iter().map(|(text, _)| *text).collect();
    let mut attempt = Attempt {
        question: texts.join("; "),
        memory_tag: profile.tags.memory.clone(),
        steps: Vec::new(),
        answers: Vec::new(),
        remembered: Vec::new(),
        chances: 0,
        forgotten: 0,
    };
    let mut memory = Memory::default();
    let mut forgot = false;
    for (_, steps) in questions {
        let mut found: Option<String> = None;
        for (index, hop) in steps.hops.iter().enumerate() {
            let target = found.as_ref().unwrap_or(&steps.mention).clone();
            let action = write_call(profile, &target, &hop.query);
            let documents = search.documents(&hop.query)?;
            let results = render(profile, &documents);
            attempt.push(&memory, action, Some(results.clone()), forgot);
            found = results.contains(&hop.value).then(|| hop.value.clone());
            let known = memory.0.iter().filter(|known| known.mention != steps.mention).count();
            if let Some(value) = &found {
                memory.learn(&steps.mention, value, index + 1 == steps.hops.len());
            }
            let dropped = memory.forget(known, habits.forget, random);
            attempt.chances += known as u64;
            attempt.forgotten += dropped;
            forgot = dropped > 0;
            if found.is_none() {
                break;
            }
        }
        attempt.remembered.push(found.unwrap_or_else(|| UNKNOWN.to_owned()));
    }
    attempt.answers =
        questions.iter().map(|(_, steps)| memory.answer(&steps.mention).unwrap_or(UNKNOWN).to_owned()).collect();
    attempt.push(&memory, String::new(), None, forgot);
    Ok(attempt)
}

/// What to find next and the search for it, with the tags of the profile; no thought where thoughts are the memory.
fn write_call(profile: &Profile, target: &str, query: &str) -> String {
    let is_free = profile.tags.memory != "think";
    let think = if is_free { format!("<think>find {target}</think>") } else { String::new() };
    match profile.tags.tool_call.as_str() {
        "search" => format!("{think}<search>{query}</search>"),
        tag => {
            let call = format!("{{\"name\": \"search\", \"arguments\": {{\"query\": \"{query}\"}}}}");
            format!("{think}<{tag}>\n{call}\n</{tag}>")
        }
    }
}

/// Search results as the agent shows them to a policy.
fn render(profile: &Profile, documents: &[Document]) -> String {
    let rendered = documents.iter().enumerate();
    rendered.map(|(index, document)| profile.render_document(index + 1, &document.title, &document.text)).collect()
}

impl Attempt {
    fn push(&mut self, memory: &Memory, action: String, results: Option<String>, forgot: bool) {
        let memory = (!self.steps.is_empty()).then(|| memory.render());
        self.steps.push(WorkStep { memory, action, results, forgot });
    }

    /// The attempt as chat messages of an agent with a memory. With `faultless` the steps at which something was
    /// forgotten are shown but not to be learnt.
    pub(crate) fn with_memory(&self, faultless: bool) -> Value {
        let write = |step: &WorkStep| {
            let tag = &self.memory_tag;
            let memory = step.memory.as_ref().map(|memory| format!("<{tag}>{memory}</{tag}>")).unwrap_or_default();
            (format!("{memory}{}", Self::action(step, &self.answers)), !(faultless && step.forgot))
        };
        self.messages(write)
    }

    /// The same attempt as chat messages of an agent that sees its whole history.
    pub(crate) fn with_history(&self) -> Value {
        self.messages(|step| (Self::action(step, &self.remembered), true))
    }

    fn action(step: &WorkStep, answers: &[String]) -> String {
        match step.results {
            Some(_) => step.action.clone(),
            None => format!("<answer>{}</answer>", answers.join("; ")),
        }
    }

    fn messages(&self, write: impl Fn(&WorkStep) -> (String, bool)) -> Value {
        let mut messages = vec![json!({ "role": "user", "content": self.question })];
        for step in &self.steps {
            let (content, learn) = write(step);
            let mut message = json!({ "role": "assistant", "content": content });
            if !learn {
                message["loss_mask"] = json!(0);
            }
            messages.push(message);
            if let Some(results) = &step.results {
                messages.push(json!({ "role": "user", "content": results }));
            }
        }
        messages.into()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::questions::Hop;

    struct Shelf(HashMap<&'static str, &'static str>);

    impl Search for Shelf {
        fn documents(&mut self, query: &str) -> anyhow::Result<Vec<Document>> {
            let text = self.0.get(query).map(|text| Document {
                doc_id: query.to_owned(),
                title: "T".to_owned(),
                text: (*text).to_owned(),
            });
            Ok(text.into_iter().collect())
        }
    }

    fn steps(mention: &str, hops: &[(&str, &str)]) -> Steps {
        let hop = |(query, value): &(&str, &str)| Hop {
            query: (*query).to_owned(),
            doc_id: String::new(),
            value: (*value).to_owned(),
        };
        let hops = hops.iter().map(hop).collect();
        Steps { mention: mention.to_owned(), attribute: String::new(), hops }
    }

    fn work(forget: f64, seed: u64) -> Attempt {
        work_as("mempo", forget, seed)
    }

    fn work_as(profile: &str, forget: f64, seed: u64) -> Attempt {
        let shelf = [
            ("capital of Peru", "capital: Lima; more"),
            ("country whose capital is Cotonou", "Benin: capital: Cotonou"),
            ("symbol of Benin", "symbol: leopard"),
            ("code of Chad", "nothing of use"),
        ];
        let questions = [
            ("A?", steps("Peru", &[("capital of Peru", "Lima")])),
            ("B?", steps("Cotonou", &[("country whose capital is Cotonou", "Benin"), ("symbol of Benin", "leopard")])),
            ("C?", steps("Chad", &[("code of Chad", ".td")])),
        ];
        let questions: Vec<(&str, &Steps)> = questions.iter().map(|(text, steps)| (*text, steps)).collect();
        let profile = Profile::load(profile).unwrap();
        let mut search = Shelf(HashMap::from(shelf));
        attempt(&questions, &mut search, &profile, Habits { forget }, &mut Random::new(seed)).unwrap()
    }

    fn assistant(messages: &Value) -> Vec<String> {
        let messages = messages.as_array().unwrap();
        let written = messages.iter().filter(|message| message["role"] == "assistant");
        written.map(|message| message["content"].as_str().unwrap().to_owned()).collect()
    }

    fn memories(texts: &[String]) -> Vec<&str> {
        texts.iter().map(|text| text.split_once("</mem>").map_or("", |(memory, _)| &memory["<mem>".len()..])).collect()
    }

    #[test]
    fn a_faultless_expert_knows_what_its_searches_brought() {
        let attempt = work(0.0, 0);
        let texts = assistant(&attempt.with_memory(false));
        let expected = ["", "Peru = Lima", "Peru = Lima; Cotonou -> Benin", "Peru = Lima; Cotonou = leopard"];
        assert_eq!(memories(&texts), [&expected[..], &expected[3..]].concat());
        assert!(texts[2].ends_with(
            "<think>find Benin</think><tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"symbol of Benin\"}}\n</tool_call>"
        ));
        assert!(texts[4].ends_with("<answer>Lima; leopard; unknown</answer>"));
        let history = assistant(&attempt.with_history());
        assert!(history.iter().all(|text| !text.contains("<mem>")));
        assert_eq!(history[4], "<answer>Lima; leopard; unknown</answer>");
        assert_eq!((attempt.chances, attempt.forgotten), (4, 0));
    }

    #[test]
    fn the_same_attempt_is_written_with_the_tags_of_the_profile() {
        let texts = assistant(&work_as("mem1", 0.0, 0).with_memory(false));
        assert_eq!(texts[0], "<search>capital of Peru</search>");
        assert_eq!(texts[2], "<think>Peru = Lima; Cotonou -> Benin</think><search>symbol of Benin</search>");
        assert!(texts[4].ends_with("</think><answer>Lima; leopard; unknown</answer>"));
    }

    #[test]
    fn a_forgetful_expert_never_knows_again_and_says_so() {
        let (mut chances, mut forgotten) = (0, 0);
        for seed in 0..500 {
            let attempt = work(0.3, seed);
            chances += attempt.chances;
            forgotten += attempt.forgotten;
            let texts = assistant(&attempt.with_memory(false));
            let lima: Vec<bool> = memories(&texts).iter().map(|memory| memory.contains("Lima")).collect();
            assert!(lima[1] && lima[1..].is_sorted_by(|before, after| before >= after), "{texts:?}");
            let answer = if lima[4] { "<answer>Lima; " } else { "<answer>unknown; " };
            assert!(texts[4].contains(answer), "{texts:?}");
            assert!(assistant(&attempt.with_history())[4].starts_with("<answer>Lima; leopard"));
            let lessons = attempt.with_memory(true);
            let hidden = lessons.as_array().unwrap().iter().filter(|message| message["loss_mask"] == 0).count() as u64;
            assert!(hidden <= attempt.forgotten && (hidden > 0) == (attempt.forgotten > 0));
        }
        let rate = forgotten as f64 / chances as f64;
        assert!((0.26..0.34).contains(&rate), "{rate}");
    }
}
