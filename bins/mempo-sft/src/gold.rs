//! Gold answers: where a row's come from, whether they were given, whether a memory knew them too soon.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use mempo_data::{Objective, Task};
use mempo_text::answer::normalize;

/// What is needed of a task.
#[derive(Debug, PartialEq)]
pub(crate) struct TaskFacts {
    /// Its name.
    pub(crate) task_id: String,
    /// Where it is from.
    pub(crate) source: String,
    /// `train`, `dev` or `test`.
    pub(crate) split: String,
    /// What is asked.
    pub(crate) question: String,
    /// Gold answers.
    pub(crate) objectives: Vec<Objective>,
}

/// Tasks by name and by question.
#[derive(Default)]
pub(crate) struct Tasks {
    all: Vec<TaskFacts>,
    by_id: HashMap<String, usize>,
    /// None where several tasks ask the same and accept other answers.
    by_question: HashMap<String, Option<usize>>,
}

impl Tasks {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Adds a task.
    pub(crate) fn push(&mut self, task: Task) {
        let Task { task_id, source, split, question, objectives, .. } = task;
        let index = self.all.len();
        match self.by_question.entry(key(&question)) {
            Entry::Vacant(free) => drop(free.insert(Some(index))),
            Entry::Occupied(mut taken) => {
                let same = taken.get().is_some_and(|other| self.all[other].objectives == objectives);
                if !same {
                    taken.insert(None);
                }
            }
        }
        self.by_id.insert(task_id.clone(), index);
        self.all.push(TaskFacts { task_id, source, split, question, objectives });
    }

    /// The task of that name; without a name, the one that asks this question.
    pub(crate) fn find(&self, task_id: Option<&str>, question: Option<&str>) -> Result<Option<&TaskFacts>, String> {
        if let Some(task_id) = task_id {
            return Ok(self.by_id.get(task_id).map(|index| &self.all[*index]));
        }
        match question.and_then(|question| self.by_question.get(&key(question))) {
            Some(None) => {
                Err("several tasks ask this question and accept other answers; give the row its `task_id`".into())
            }
            found => Ok(found.copied().flatten().map(|index| &self.all[index])),
        }
    }
}

impl FromIterator<Task> for Tasks {
    fn from_iter<I: IntoIterator<Item = Task>>(rows: I) -> Self {
        let mut tasks = Self::default();
        rows.into_iter().for_each(|task| tasks.push(task));
        tasks
    }
}

/// A question without what does not matter: white space, and the question mark that tasks are given.
pub(crate) fn key(question: &str) -> String {
    let words: Vec<&str> = question.split_whitespace().collect();
    let text = words.join(" ");
    text.trim_end_matches(['?', ' ']).to_owned()
}

/// The row's own gold answers as a task has them.
pub(crate) fn objectives(gold: Vec<Vec<String>>) -> Vec<Objective> {
    gold.into_iter().map(|answers| Objective { question: String::new(), answers }).collect()
}

/// Whether a memory holds a gold answer before the agent can have read it.
///
/// `memories[i]` was written when the agent had seen the question and `observations[..i]`. Texts are compared as answers
/// are, word by word, where punctuation is nothing (`U.S.`) or parts words (`capital:Paris`). An objective counts as seen once any of its accepted answers was; answers that say nothing where they
/// stand (`yes`, `no`, one character) are not looked for.
pub(crate) fn leaks(objectives: &[Objective], question: &str, memories: &[&str], observations: &[&str]) -> bool {
    let all = |texts: &[&str]| texts.iter().map(|text| readings(text)).collect::<Vec<_>>();
    let (question, memories, observations) = (readings(question), all(memories), all(observations));
    objectives.iter().any(|objective| {
        let answers = objective.answers.iter().flat_map(|answer| readings(answer));
        let answers: Vec<String> = answers.filter(|answer| tells(answer.trim())).collect();
        let holds = |text: &[String; 2]| answers.iter().any(|answer| text.iter().any(|text| text.contains(answer)));
        let shown = if holds(&question) { Some(0) } else { observations.iter().position(holds).map(|at| at + 1) };
        memories.iter().take(shown.unwrap_or(memories.len())).any(holds)
    })
}

/// Normalised, without punctuation and with spaces in its place; a space on either side, so that words are found whole.
fn readings(text: &str) -> [String; 2] {
    let parted = text.replace(|letter: char| letter.is_ascii_punctuation(), " ");
    [normalize(text), normalize(&parted)].map(|text| format!(" {text} "))
}

/// Whether a normalised answer says something by itself.
fn tells(answer: &str) -> bool {
    answer.chars().nth(1).is_some() && !matches!(answer, "yes" | "no" | "noanswer")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(answers: &[&str]) -> Objective {
        Objective { question: String::new(), answers: answers.iter().map(ToString::to_string).collect() }
    }

    fn task(task_id: &str, question: &str, answer: &str) -> Task {
        Task {
            task_id: task_id.into(),
            source: "s".into(),
            split: "train".into(),
            question: question.into(),
            objectives: vec![objective(&[answer])],
            document: None,
            document_ref: None,
            metadata: None,
        }
    }

    #[test]
    fn tasks_are_found_by_name_or_question() {
        let rows = [
            task("a", "Who?", "Ann"),
            task("b", "When  was\nit?", "1889"),
            task("c", "Who?", "Ann"),
            task("d", "Where?", "x"),
            task("e", "Where?", "y"),
        ];
        let tasks: Tasks = rows.into_iter().collect();
        let found = |id, question| tasks.find(id, question).map(|task| task.map(|task| task.task_id.as_str()));
        assert_eq!(found(Some("b"), Some("Who?")), Ok(Some("b")));
        assert_eq!(found(Some("z"), Some("Who?")), Ok(None));
        assert_eq!(found(None, Some(" When was it ")), Ok(Some("b")));
        assert_eq!(found(None, Some("Who?")), Ok(Some("a")), "both accept the same");
        assert!(found(None, Some("Where?")).unwrap_err().contains("several tasks"));
        assert_eq!(found(None, Some("why")), Ok(None));
        assert_eq!(found(None, None), Ok(None));
    }

    #[test]
    fn a_memory_leaks_what_nothing_has_shown() {
        let check = |question: &str, memories: &[&str], observations: &[&str], expected: bool| {
            let objectives = [objective(&["The Szohôd", "Szohod City"]), objective(&["no"]), objective(&["7"])];
            let found = leaks(&objectives, question, memories, observations);
            assert_eq!(found, expected, "{question:?} {memories:?} {observations:?}");
        };
        check("Capital?", &["", "nothing", "capital: szohôd."], &["Doc 1", "Its capital, Szohôd"], false);
        check("Capital?", &["", "capital: Szohôd", "capital: Szohôd"], &["Doc 1", "Its capital, Szohôd"], true);
        check("Capital?", &["It is Szohod  city!"], &[], true);
        check("Capital?", &["", "Szohôd"], &["called Szohod City here"], false);
        check("Is Szohôd the capital?", &["Szohôd"], &[], false);
        check("Capital?", &["", "Szohôd"], &["(Szohôd,Syldavia)"], false);
        check("Capital?", &["", "Szohôd"], &["<information>Szohôd</information>"], false);
        check("Capital?", &["capital:Szohôd"], &[], true);
        check("Capital?", &["Szohôds", "no 7"], &["no"], false);
    }
}
