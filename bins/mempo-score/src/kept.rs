//! Figures by task in a file: what is left of a run when its rollouts are gone, and enough to compare it again.
//!
//! JSON lines, one for the runs of a name. Sums and counts stand in the order of `metrics`, so that a figure that came later
//! is nothing for a run that was measured before, and one that is no longer known is left out.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use mempo_data::{has_extension, text_lines};
use mempo_run::ResultExt;
use serde::{Deserialize, Serialize};

use crate::cost::{Cost, RunCost};
use crate::measure::{METRICS, TaskFigures};
use crate::measured::Measured;

/// Level of compression: small files matter, time does not.
const ZSTD_LEVEL: i32 = 19;

#[derive(Serialize, Deserialize)]
struct Kept {
    /// Among how many trajectories of a task the best was looked for; 0: nowhere.
    best_of: usize,
    metrics: Vec<String>,
    /// Of all runs of the name together, in figures that were kept before these were told apart.
    #[serde(default, skip_serializing)]
    cost: Option<Cost>,
    #[serde(flatten)]
    run: Measured,
}

/// The runs as a file's content, compressed if its name says so.
pub(crate) fn kept(path: &Path, runs: &[Measured], best_of: usize) -> anyhow::Result<Vec<u8>> {
    let mut lines = String::new();
    for run in runs {
        let is_known = |metric: &usize| run.tasks.iter().any(|task| task.columns[2 * metric + 1] > 0.0);
        let known: Vec<usize> = (0..METRICS.len()).filter(is_known).collect();
        let mut run = run.clone();
        for task in &mut run.tasks {
            task.columns = known.iter().flat_map(|metric| task.columns[2 * metric..][..2].to_vec()).collect();
        }
        let metrics = known.iter().map(|metric| METRICS[*metric].name.to_owned()).collect();
        lines += &serde_json::to_string(&Kept { best_of, metrics, cost: None, run })?;
        lines.push('\n');
    }
    Ok(if has_extension(path, ".zst") { zstd::encode_all(lines.as_bytes(), ZSTD_LEVEL)? } else { lines.into_bytes() })
}

/// The runs of such a file; `best_of` is what the report looks for.
pub(crate) fn read_kept(path: &Path, best_of: usize) -> anyhow::Result<Vec<Measured>> {
    let mut runs = Vec::new();
    for row in text_lines(path).bad_input()? {
        let (line, text) = row.bad_input()?;
        let place = || format!("{}:{line}", path.display());
        let kept: Kept = serde_json::from_slice(&text)
            .with_context(|| format!("{}: expected what `evaluate --figures-out` writes", place()))
            .bad_input()?;
        if best_of > 0 && kept.best_of != best_of {
            return Err(anyhow!("--best-of {best_of}: {} was measured with {}", place(), kept.best_of)).usage();
        }
        runs.push(kept.restored(best_of).with_context(place).bad_input()?);
    }
    if runs.is_empty() {
        return Err(anyhow!("{}: no figures", path.display())).bad_input();
    }
    Ok(runs)
}

impl Kept {
    /// The run with its columns in the order of today's metrics.
    fn restored(mut self, best_of: usize) -> anyhow::Result<Measured> {
        let places: HashMap<&str, usize> =
            self.metrics.iter().enumerate().map(|(place, name)| (name.as_str(), place)).collect();
        for TaskFigures { task_id, columns, .. } in &mut self.run.tasks {
            let (found, expected) = (columns.len(), 2 * self.metrics.len());
            if found != expected {
                return Err(anyhow!("task `{task_id}`: {found} sums and counts, expected {expected}: two a metric"));
            }
            let known = METRICS.iter().map(|metric| places.get(metric.name).filter(|_| !metric.best || best_of > 0));
            *columns = known
                .flat_map(|place| place.map_or([0.0; 2], |place| [columns[2 * place], columns[2 * place + 1]]))
                .collect();
        }
        if self.run.costs.is_empty() && self.run.settings.is_some() {
            let cost = self.cost.map(|cost| RunCost::new(cost, &self.run.tasks));
            self.run.costs.extend(cost);
        }
        Ok(self.run)
    }
}

#[cfg(test)]
mod tests {
    use mempo_run::Failure;
    use serde_json::{Value, json};

    use crate::fixture::{Chain, failure};

    #[test]
    fn kept_figures_say_what_their_rollouts_said() {
        let mut chain = Chain::new();
        for row in &mut chain.trajectories {
            row.seed = 1;
        }
        chain.write_rollouts("other");
        let options = "--tasks @tasks --by objectives,source --best-of 2";
        let whole = format!("--rollouts @rollouts @other @rollouts --name a a b --baseline b {options}");
        let found = chain.report(&format!("{whole} --figures-out @kept.jsonl.zst"));
        let text = zstd::decode_all(&*fs_err::read(chain.path("kept.jsonl.zst")).unwrap()).unwrap();
        assert_eq!(String::from_utf8(text).unwrap().lines().count(), 2, "a line a name");
        let alone = "--figures @kept.jsonl.zst --baseline b --by objectives,source --best-of 2";
        assert_eq!(chain.report(alone), found);

        // One seed kept, the other here; each name's figures in a file of its own.
        for (name, rollouts) in [("a", "rollouts"), ("b", "rollouts")] {
            let line = format!("--rollouts @{rollouts} --name {name} --tasks @tasks --best-of 2");
            chain.report(&format!("{line} --figures-out @{name}.jsonl"));
        }
        let added =
            chain.report(&format!("--rollouts @other --name a --figures @a.jsonl @b.jsonl --baseline b {options}"));
        let seeds = |report: &Value| report["runs"][0]["seeds"].clone();
        assert_eq!((seeds(&added), seeds(&found)), (json!([0, 1]), json!([0, 1])));
        let metrics = |report: &Value| report["runs"][0]["groups"][0]["metrics"]["em_best.v1"]["value"].clone();
        assert_eq!(metrics(&added), metrics(&found));
        let without = chain.report("--figures @a.jsonl");
        assert_eq!(without["runs"][0]["groups"].as_array().unwrap().len(), 1);
        assert!(without["runs"][0]["groups"][0]["metrics"].get("em_best.v1").is_none());
    }

    #[test]
    fn kept_figures_that_do_not_fit_are_refused() {
        let mut chain = Chain::new();
        chain.report("--rollouts @rollouts --name a --tasks @tasks --figures-out @a.jsonl");
        let refused = |line: &str| {
            let error = chain.run(&format!("evaluate {line}")).unwrap_err();
            let (kind, text) = failure(&error);
            (matches!(kind, Failure::Usage(..)), text.clone())
        };
        let (usage, text) = refused("--figures @a.jsonl --best-of 2");
        assert!(usage && text.contains("a.jsonl:1 was measured with 0"), "{text}");
        let (usage, text) = refused("--figures @a.jsonl --rollouts @rollouts --name b");
        assert!(!usage && text.contains("task `task-00` was measured with other --tasks in a than in b"), "{text}");
        let (usage, text) = refused("--figures @a.jsonl --rollouts @rollouts --name a --tasks @tasks");
        assert!(!usage && text.contains("a.jsonl: --name a: task `task-00` under seed 0"), "{text}");
        let (usage, text) = refused("--figures @a.jsonl --answers a=@answers.jsonl --tasks @tasks");
        assert!(usage && text.contains("--answers a"), "{text}");

        let kept: Value = serde_json::from_slice(&fs_err::read(chain.path("a.jsonl")).unwrap()).unwrap();
        let mut fewer = kept.clone();
        fewer["tasks"][1]["columns"].as_array_mut().unwrap().pop();
        for (content, expected) in [
            (fewer.to_string(), "task `task-01`: "),
            ("{\"label\": \"a\"}".to_owned(), "broken.jsonl:1: expected what `evaluate --figures-out` writes"),
            ("\n".to_owned(), "broken.jsonl: no figures"),
        ] {
            fs_err::write(chain.path("broken.jsonl"), content).unwrap();
            let (usage, text) = refused("--figures @broken.jsonl");
            assert!(!usage && text.contains(expected), "{text}");
        }

        // Of figures that tell no costs run by run, and a new seed beside them, what a group took is not known by half.
        let mut unsplit = kept.clone();
        let costs = unsplit.as_object_mut().unwrap().remove("costs").unwrap();
        unsplit["cost"] = costs[0]["cost"].clone();
        fs_err::write(chain.path("unsplit.jsonl"), unsplit.to_string()).unwrap();
        chain.trajectories.iter_mut().for_each(|row| row.seed = 1);
        chain.write_rollouts("other");
        let line = "--rollouts @other --name a --tasks @tasks --by source --figures";
        let costs = |report: &Value| -> Vec<bool> {
            report["runs"][0]["groups"].as_array().unwrap().iter().map(|group| group.get("cost").is_some()).collect()
        };
        assert_eq!(costs(&chain.report(&format!("{line} @unsplit.jsonl"))), [true, false, false]);

        // A metric that came later is nothing, one that went is left out.
        let mut older = kept;
        older["metrics"][0] = json!("f1_squad.v0");
        fs_err::write(chain.path("older.jsonl"), older.to_string()).unwrap();
        let metrics = chain.report("--figures @older.jsonl")["runs"][0]["groups"][0]["metrics"].clone();
        assert_eq!(metrics["f1_squad.v1"]["value"], Value::Null);
        assert!(metrics["em.v1"]["value"].as_f64().is_some());
    }
}
