//! Questions that a policy answers without what a task would give it: they teach nothing about reading or searching.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use mempo_data::{Objective, Row, Task, Trajectory, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_text::answer::{split_answers, sub_exact_match};

/// A table of tasks, and rollouts on them.
pub(crate) struct Answered {
    tasks: Input,
    rollouts: Input,
}

impl Answered {
    /// Of two directories.
    pub(crate) fn open(dirs: &[PathBuf]) -> anyhow::Result<Option<Self>> {
        let [tasks, rollouts] = dirs else { return Ok(None) };
        let (tasks, rollouts) =
            (Input::stage("unless-answered-tasks", tasks)?, Input::stage("unless-answered", rollouts)?);
        rollouts.check_made_from("tasks", &tasks, "mempo-rollout sample")?;
        Ok(Some(Self { tasks, rollouts }))
    }

    /// Both, as inputs of a stage.
    pub(crate) fn inputs(&self) -> [&Input; 2] {
        [&self.tasks, &self.rollouts]
    }

    /// Each question that some trajectory answered: a gold answer stands in its own, or its own in a gold one.
    pub(crate) fn questions(&self) -> anyhow::Result<HashSet<String>> {
        let mut objectives: HashMap<String, Vec<Objective>> = HashMap::new();
        for row in read_rows::<Task>(&self.tasks.table(Task::TABLE)?).bad_input()? {
            let row = row.bad_input()?;
            objectives.insert(row.task_id, row.objectives);
        }
        let mut questions = HashSet::new();
        for row in read_rows::<Trajectory>(&self.rollouts.table(Trajectory::TABLE)?).bad_input()? {
            let row = row.bad_input()?;
            let answers = row.answer.as_deref().map(split_answers).unwrap_or_default();
            let asked = objectives.get(&row.task_id).into_iter().flatten();
            let answered = asked.zip(&answers).filter(|(asked, given)| sub_exact_match(given, &asked.answers));
            questions.extend(answered.map(|(asked, _)| asked.question.clone()));
        }
        Ok(questions)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use mempo_data::write_rows;
    use mempo_run::{Stage, StageArgs};

    use super::super::{ComposeArguments, run};
    use super::*;
    use crate::testing::trajectory;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: ComposeArguments,
    }

    fn compose(directory: &Path, words: &str) -> anyhow::Result<()> {
        let at = |word: &str| word.replace('@', &format!("{}/", directory.display()));
        run(&Line::parse_from(std::iter::once("compose".to_owned()).chain(words.split_whitespace().map(at))).arguments)
    }

    fn tasks(directory: &Path, name: &str) -> Vec<Task> {
        read_rows(&[directory.join(name).join("tasks/part-00000.parquet")]).unwrap().map(Result::unwrap).collect()
    }

    /// Rollouts on the tasks in `known`, two trajectories a task.
    fn write_rollouts(directory: &Path, answers: &[[Option<&str>; 2]]) {
        let tasks = Input::stage("tasks", &directory.join("known")).unwrap();
        let stage = StageArgs { out: directory.join("rollouts"), seed: 0, restart: false, shard: None };
        let stage = Stage::open("mempo-rollout", "sample", &stage, &(), &[&tasks]).unwrap().unwrap();
        let row = |task: usize, index: usize| Trajectory {
            answer: answers[task][index].map(str::to_owned),
            ..trajectory(&format!("task-{task:07}"), index as i32)
        };
        let rows: Vec<Trajectory> = (0..answers.len()).flat_map(|task| [row(task, 0), row(task, 1)]).collect();
        stage.write_part("trajectories", 0, |file| Ok(write_rows(&rows, file).map(drop)?)).unwrap();
        stage.finish(&[("trajectories", rows.len() as u64)], serde_json::json!({})).unwrap();
    }

    #[test]
    fn questions_that_were_answered_are_left_out_wherever_they_are_asked() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let row = |i: usize| format!("{{\"question\": \"Q{i}\", \"golden_answers\": [\"gold {i}\"]}}\n");
        fs_err::write(at.join("q.jsonl"), (0..6).map(row).collect::<String>()).unwrap();
        compose(at, "--questions @q.jsonl --objectives 1 --out @known").unwrap();
        let no = [None, Some("silver")];
        write_rollouts(at, &[no, [None, Some("It is Gold 1.")], no, [Some("gold 3"), None], no, no]);
        compose(at, "--questions @q.jsonl --objectives 2 --unless-answered @known @rollouts --out @rest").unwrap();
        let questions: Vec<String> = tasks(at, "rest").into_iter().map(|task| task.question).collect();
        assert_eq!(questions, ["Q0?; Q2?", "Q4?; Q5?"]);
        let summary = Input::stage("rest", &at.join("rest")).unwrap().manifest().unwrap().summary.clone();
        assert_eq!((&summary["answered_questions"], &summary["questions"]), (&2.into(), &6.into()));

        compose(at, "--questions @q.jsonl --objectives 1 --max-tasks 3 --out @other").unwrap();
        let error = compose(at, "--questions @q.jsonl --unless-answered @other @rollouts --out @none").unwrap_err();
        assert!(error.to_string().contains("rollouts: not made from"), "{error}");
        assert!(!at.join("none").exists());
    }
}
