//! What every row can do: name its table, its place in it, and about how large it is.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Advantage, AnsweredQuery, Context, Document, Logprobs, Score, SftExample, Step, Task, Trajectory};

/// A row's place in its table. Tables are sorted by it; text compares byte by byte.
///
/// Tables without steps or trajectories leave those parts 0; `sft_examples` and `corpus` put their own id in `task_id`; `queries` puts
/// the query there and `top_k` in the place of the trajectory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The task, or the row's own id.
    pub task_id: String,
    /// Position in the task's group, from 0.
    pub trajectory_index: i32,
    /// Position in the trajectory, from 0.
    pub step_index: i32,
}

impl Key {
    /// The key of a row that stands for itself.
    pub fn of_id(id: &str) -> Self {
        Self::of_step(id, 0, 0)
    }

    /// The key of a step.
    pub fn of_step(task_id: &str, trajectory_index: i32, step_index: i32) -> Self {
        Self { task_id: task_id.to_owned(), trajectory_index, step_index }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/trajectory {}/step {}", self.task_id, self.trajectory_index, self.step_index)
    }
}

/// A row of one of the tables.
pub trait Row: Serialize + DeserializeOwned + Clone + Send + 'static {
    /// The table's name, one of [`crate::TABLES`].
    const TABLE: &'static str;

    /// Whether a key may come more than once (`contexts` has a row for the memory and one for the bias).
    const REPEATS: bool = false;

    /// Where the row stands in its table.
    fn key(&self) -> Key;

    /// About how many bytes the row's lists and long texts take; batches are cut by it.
    fn size(&self) -> usize;
}

impl Row for Task {
    const TABLE: &'static str = "tasks";

    fn key(&self) -> Key {
        Key::of_id(&self.task_id)
    }

    fn size(&self) -> usize {
        let texts = [&self.document, &self.metadata];
        let answers = self.objectives.iter().flat_map(|objective| &objective.answers);
        self.question.len() * 2
            + texts.into_iter().flatten().map(String::len).sum::<usize>()
            + answers.map(String::len).sum::<usize>()
    }
}

impl Row for Trajectory {
    const TABLE: &'static str = "trajectories";

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, 0)
    }

    fn size(&self) -> usize {
        let texts = [&self.answer, &self.error];
        texts.into_iter().flatten().map(String::len).sum::<usize>() + 8 * self.f1.len()
    }
}

impl Row for Step {
    const TABLE: &'static str = "steps";

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index)
    }

    fn size(&self) -> usize {
        let observation = self.observation.as_ref().map_or(0, String::len);
        let observation_ids = self.observation_ids.as_ref().map_or(0, Vec::len);
        let numbers = self.prompt_ids.len() + 2 * self.completion_ids.len() + observation_ids;
        4 * numbers + self.completion.len() + observation
    }
}

impl Row for AnsweredQuery {
    const TABLE: &'static str = "queries";

    fn key(&self) -> Key {
        Key::of_step(&self.query, self.top_k, 0)
    }

    fn size(&self) -> usize {
        self.query.len() + self.documents.iter().map(Row::size).sum::<usize>()
    }
}

impl Row for Score {
    const TABLE: &'static str = "scores";

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index)
    }

    fn size(&self) -> usize {
        8 * self.objective_logprobs.as_ref().map_or(0, Vec::len)
    }
}

impl Row for Context {
    const TABLE: &'static str = "contexts";
    const REPEATS: bool = true;

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index)
    }

    fn size(&self) -> usize {
        4 * (self.context_ids.len() + self.answer_ids.len())
    }
}

impl Row for Logprobs {
    const TABLE: &'static str = "logprobs";

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index)
    }

    fn size(&self) -> usize {
        8 * self.policy_logprobs.len()
    }
}

impl Row for Advantage {
    const TABLE: &'static str = "advantages";

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index)
    }

    fn size(&self) -> usize {
        0
    }
}

impl Row for SftExample {
    const TABLE: &'static str = "sft_examples";

    fn key(&self) -> Key {
        Key::of_id(&self.example_id)
    }

    fn size(&self) -> usize {
        5 * self.input_ids.len()
    }
}

impl Row for Document {
    const TABLE: &'static str = "corpus";

    fn key(&self) -> Key {
        Key::of_id(&self.doc_id)
    }

    fn size(&self) -> usize {
        self.title.len() + self.text.len()
    }
}
