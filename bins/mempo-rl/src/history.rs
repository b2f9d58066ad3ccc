//! `mempo-rl history`: how the policy came along over all iterations, which one is best, and which ones to keep.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use mempo_data::{Trajectory, read_rows};
use mempo_run::{
    Input, Manifest, ResultExt, blocks, finished, is_under_way, overview, print_data, print_table, thin, verify,
};
use mempo_train::base_of;
use serde_json::{Map, Value, json};
use tracing::{info, warn};

/// Of the policies' own summaries.
const TRAINED: [&str; 8] = [
    "optimizer_steps",
    "global_step",
    "reward_mean",
    "clip_fraction_mean",
    "gradient_norm_mean",
    "last_loss",
    "last_kl",
    "last_entropy",
];
/// Of the answer probabilities of an iteration's memories, evenly from 0 to 1.
pub(crate) const HISTOGRAM: &str = "answer_probability_histogram";
/// Histograms shown, of iterations evenly apart.
const HISTOGRAMS: usize = 12;
/// Shown, where there is any.
const SHOWN: [&str; 9] = [
    "reward_mean",
    "last_kl",
    "last_entropy",
    "clip_fraction_mean",
    "gradient_norm_mean",
    "dev_f1",
    "dev_reward",
    "dev_format_valid",
    "dev_peak_tokens",
];

/// Show how a policy came along over its iterations, name the best, and free the disk that old ones take
///
/// Prints one row a metric with its course over the iterations: means of each update's own rollout, and of rollouts on
/// tasks kept aside (`--dev`), which also say which policy is best.
#[derive(Debug, Args)]
pub(crate) struct HistoryArguments {
    /// Outputs of `mempo-rl train`, one an iteration, in any order
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    policies: Vec<PathBuf>,
    /// Outputs of `mempo-rollout sample` with these policies, on tasks that are not trained on
    #[arg(long, num_args = 1.., value_name = "DIR")]
    dev: Vec<PathBuf>,
    /// What makes a policy the best
    #[arg(long, value_enum, default_value = "f1")]
    by: By,
    /// Make this a symbolic link to the best policy
    #[arg(long, value_name = "LINK", requires = "dev")]
    link_best: Option<PathBuf>,
    /// Free disk: the newest policy keeps everything; the best on --dev, every N-th, and the base of adapters keep their weights
    /// without the optimizer's state; of the others the records stay
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    keep: Option<u64>,
    /// Print one JSON object an iteration instead of a table
    #[arg(long)]
    json: bool,
}

/// A figure of `--dev`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    /// Mean F1
    F1,
    /// Mean reward
    Reward,
}

impl By {
    fn column(self) -> &'static str {
        match self {
            Self::F1 => "dev_f1",
            Self::Reward => "dev_reward",
        }
    }
}

/// A policy that an iteration made.
struct Iteration {
    dir: PathBuf,
    manifest: Manifest,
    global_step: u64,
    figures: Map<String, Value>,
}

/// Reads what the stages recorded; the files themselves only where they are removed or counted.
pub(crate) fn run(arguments: &HistoryArguments) -> anyhow::Result<()> {
    let dev = dev_figures(&arguments.dev)?;
    let mut iterations = Vec::new();
    for dir in &arguments.policies {
        iterations.extend(read_iteration(dir, &dev)?);
    }
    let policies: HashSet<String> = iterations.iter().map(|iteration| iteration.manifest.model_digest()).collect();
    if let Some((_, (dir, _))) = dev.iter().find(|(policy, _)| !policies.contains(*policy)) {
        return Err(anyhow!("{}: sampled from none of the --policies", dir.display())).bad_input();
    }
    let mut seen = HashSet::new();
    if let Some(twice) = iterations.iter().find(|iteration| !seen.insert(&iteration.dir)) {
        return Err(anyhow!("--policies: {} is named twice", twice.dir.display())).usage();
    }
    iterations.sort_by_key(|iteration| iteration.global_step);
    let best = best(&iterations, arguments.by);
    show(&iterations, best, arguments);
    if let (Some(link), Some(best)) = (&arguments.link_best, best) {
        link_to(link, &iterations[best])?;
    }
    arguments.keep.map_or(Ok(()), |every| thin_out(&iterations, best, every))
}

/// What a finished stage recorded; none of one that is still at work.
fn read_iteration(dir: &Path, dev: &HashMap<String, (PathBuf, Value)>) -> anyhow::Result<Option<Iteration>> {
    if is_left_out(dir)? {
        return Ok(None);
    }
    let manifest = finished(dir)?;
    if (manifest.program.as_str(), manifest.stage.as_str()) != ("mempo-rl", "train") {
        let (program, stage) = (&manifest.program, &manifest.stage);
        return Err(anyhow!("{}: made by `{program} {stage}`, expected `mempo-rl train`", dir.display())).bad_input();
    }
    let global_step = manifest.summary["global_step"].as_u64();
    let global_step = global_step.with_context(|| format!("{}: its manifest has no global_step", dir.display()));
    let trained = TRAINED.map(|name| (name.to_owned(), manifest.summary[name].clone()));
    let mut figures = Map::from_iter([("policy".to_owned(), json!(dir))]);
    figures.extend(trained);
    figures.insert(HISTOGRAM.to_owned(), json!(manifest.summary_counts(HISTOGRAM)));
    if let Some((_, Value::Object(found))) = dev.get(&manifest.model_digest()) {
        figures.extend(found.clone());
    }
    let dir = fs_err::canonicalize(dir)?;
    Ok(Some(Iteration { dir, global_step: global_step.bad_input()?, manifest, figures }))
}

/// Says that a stage has begun and not ended, and is left out.
fn is_left_out(dir: &Path) -> anyhow::Result<bool> {
    let is_left_out = is_under_way(dir)?;
    if is_left_out {
        warn!("{}: not finished yet; left out", dir.display());
    }
    Ok(is_left_out)
}

/// Means over the trajectories of each rollout, by the digest of the policy it was sampled from.
fn dev_figures(dirs: &[PathBuf]) -> anyhow::Result<HashMap<String, (PathBuf, Value)>> {
    let mut figures: HashMap<String, (PathBuf, Value)> = HashMap::new();
    let mut first: Option<Input> = None;
    for dir in dirs {
        if is_left_out(dir)? {
            continue;
        }
        let input = Input::stage("dev", dir)?;
        let policy = input.made_from("model").with_context(|| format!("{}: not a rollout", dir.display()));
        let policy = policy.bad_input()?.to_owned();
        if let Some(other) = first.as_ref().filter(|first| first.made_from("tasks") != input.made_from("tasks")) {
            let (dir, other) = (dir.display(), other.dir().display());
            return Err(anyhow!("{dir} and {other} are rollouts on other tasks: they cannot be compared")).bad_input();
        }
        let means = means(&input)?;
        first.get_or_insert(input);
        if let Some((other, _)) = figures.insert(policy, (dir.clone(), means)) {
            let (dir, other) = (dir.display(), other.display());
            return Err(anyhow!("{dir} and {other} were sampled from the same policy; give one of them")).usage();
        }
    }
    Ok(figures)
}

/// Of the trajectories that have a reward.
fn means(rollouts: &Input) -> anyhow::Result<Value> {
    let (mut sums, mut count) = ([0.0; 5], 0.0_f64);
    for row in read_rows::<Trajectory>(&rollouts.table("trajectories")?).bad_input()? {
        let row = row.bad_input()?;
        let Some(reward) = row.reward else { continue };
        let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len().max(1) as f32;
        let valid = f32::from(u8::from(row.format_valid));
        let found = [mean(&row.f1), mean(&row.exact_match), reward, valid, row.peak_tokens as f32];
        sums.iter_mut().zip(found).for_each(|(sum, value)| *sum += f64::from(value));
        count += 1.0;
    }
    let [f1, exact_match, reward, format_valid, peak_tokens] = sums.map(|sum| (count > 0.0).then_some(sum / count));
    Ok(json!({
        "dev_f1": f1, "dev_exact_match": exact_match, "dev_reward": reward, "dev_format_valid": format_valid,
        "dev_peak_tokens": peak_tokens, "dev_trajectories": count,
    }))
}

/// The place of the policy that did best, the newest of equals.
fn best(iterations: &[Iteration], by: By) -> Option<usize> {
    let figure = |iteration: &Iteration| iteration.figures.get(by.column()).and_then(Value::as_f64);
    let known = iterations.iter().enumerate().filter_map(|(place, iteration)| Some((figure(iteration)?, place)));
    known.max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).map(|(_, place)| place)
}

fn show(iterations: &[Iteration], best: Option<usize>, arguments: &HistoryArguments) {
    let lines: Vec<Value> = iterations.iter().map(|iteration| Value::Object(iteration.figures.clone())).collect();
    if arguments.json {
        for line in &lines {
            print_data(&format!("{line}\n"));
        }
    } else {
        let (header, rows) = overview(&lines, &SHOWN);
        print_table(&header, &rows);
        let rows = histograms(&lines);
        if !rows.is_empty() {
            print_table(&["iteration", "memories", "mean", "answer probability from 0 to 1"], &rows);
        }
    }
    if let Some(best) = best {
        let (dir, count, column) = (iterations[best].dir.display(), iterations.len(), arguments.by.column());
        info!("best by {column}: {dir} ({} of {count}), {}", best + 1, lines[best][column]);
    }
}

/// How probable memories made the answer, early and late: the figure of the paper.
fn histograms(lines: &[Value]) -> Vec<Vec<String>> {
    let counts = |line: &Value| line[HISTOGRAM].as_array().map(|bins| bins.iter().filter_map(Value::as_f64).collect());
    let known: Vec<(usize, Vec<f64>)> =
        lines.iter().enumerate().filter_map(|(place, line)| Some((place, counts(line)?))).collect();
    let row = |(place, bins): &(usize, Vec<f64>)| {
        let (mut sum, mut count) = (0.0, 0.0_f64);
        for (bin, memories) in bins.iter().enumerate() {
            sum += memories * (bin as f64 + 0.5) / bins.len() as f64;
            count += memories;
        }
        // Most memories know nothing yet: roots of the shares let the others be seen, too.
        let heights: Vec<f64> = bins.iter().map(|memories| memories.sqrt()).collect();
        vec![(place + 1).to_string(), format!("{count}"), format!("{:.3}", sum / count.max(1.0)), blocks(&heights)]
    };
    let shown = known.len().min(HISTOGRAMS);
    (0..shown).map(|index| row(&known[index * (known.len() - 1) / (shown - 1).max(1)])).collect()
}

/// Makes `link` point to a policy that has weights, at once and whatever it pointed to before.
fn link_to(link: &Path, policy: &Iteration) -> anyhow::Result<()> {
    if let Some(file) = policy.manifest.removed(|path| !path.contains('/')) {
        let dir = policy.dir.display();
        return Err(anyhow!("{dir}: the best policy, but its {file} was removed to free disk")).bad_input();
    }
    if fs_err::symlink_metadata(link).is_ok_and(|metadata| !metadata.is_symlink()) {
        return Err(anyhow!("--link-best {}: is there, and no symbolic link", link.display())).usage();
    }
    let mut temporary = link.as_os_str().to_owned();
    temporary.push(format!(".tmp-{}", std::process::id()));
    fs_err::os::unix::fs::symlink(&policy.dir, &temporary)?;
    Ok(fs_err::rename(temporary, link)?)
}

/// Removes what `--keep` does not keep, once the newest policy is known to be whole.
fn thin_out(iterations: &[Iteration], best: Option<usize>, every: u64) -> anyhow::Result<()> {
    let Some((newest, older)) = iterations.split_last() else { return Ok(()) };
    check_line(iterations)?;
    verify(&newest.dir)?;
    let state = newest.dir.join("trainer");
    let base = base_of(&state).bad_input()?.map(fs_err::canonicalize).transpose()?;
    let mut freed = 0;
    for (place, iteration) in older.iter().enumerate() {
        let is_kept = Some(place) == best
            || (place as u64 + 1).is_multiple_of(every)
            || base.as_ref().is_some_and(|base| *base == iteration.dir);
        let is_tensors = |path: &str| Path::new(path).extension().is_some_and(|extension| extension == "safetensors");
        freed += thin(&iteration.dir, |path| is_tensors(path) && (!is_kept || path.starts_with("trainer/")))?;
    }
    info!("{:.1} MiB freed", freed as f64 / f64::from(1 << 20));
    Ok(())
}

/// Refuses to judge by age where each policy was not made from the one before it: steps count anew with a new optimizer.
fn check_line(iterations: &[Iteration]) -> anyhow::Result<()> {
    for pair in iterations.windows(2) {
        if pair[1].manifest.made_from("model") != Some(pair[0].manifest.model_digest().as_str()) {
            let (older, newer) = (pair[0].dir.display(), pair[1].dir.display());
            return Err(anyhow!(
                "--keep: {newer} was not made from {older}; give policies that were, one after the other"
            ))
            .usage();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;
    use mempo_data::{Status, write_rows};
    use mempo_run::{Stage, StageArgs, exit_code};

    use super::*;

    struct Runs(tempfile::TempDir);

    impl Runs {
        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn stage(&self, name: &str, program: &'static str, stage: &'static str, inputs: &[&Input]) -> Stage {
            let args = StageArgs { out: self.path(name), seed: 0, restart: false, shard: None };
            Stage::open(program, stage, &args, &json!({}), inputs).unwrap().unwrap()
        }

        /// The policy of iteration `number`, and a rollout of it whose trajectories have these F1.
        fn iteration(&self, number: u64, f1: &[f32]) {
            let policy = format!("policy-{number}");
            let before = self.path(&format!("policy-{}", number - 1));
            let before = before.exists().then(|| Input::model("model", &before).unwrap());
            let stage = self.stage(&policy, "mempo-rl", "train", &before.iter().collect::<Vec<_>>());
            let write = |file: &str, text: String| {
                stage.write_file(file, |sink| Ok(std::io::Write::write_all(sink, text.as_bytes())?)).unwrap();
            };
            for file in ["config.json", "model.safetensors", "trainer/master.safetensors", "adapter/a.safetensors"] {
                write(file, format!("{file} {number}"));
            }
            // Adapters of the first policy.
            let adapters = json!({"rank": 1, "alpha": 1.0, "targets": [], "base": self.path("policy-1")});
            let counts = json!({
                "format": 1, "global_step": 0, "skipped_steps": 0, "consecutive_skipped": 0, "updates": 0,
                "adapters": adapters, "sha256": {},
            });
            write("trainer/state.json", counts.to_string());
            stage.finish(&[], json!({"global_step": 2 * number, "reward_mean": 0.1 * number as f64})).unwrap();
            let model = Input::model("model", &self.path(&policy)).unwrap();
            let rows: Vec<Trajectory> = (0..).zip(f1).map(|(index, f1)| trajectory(index, *f1)).collect();
            let stage = self.stage(&format!("dev-{number}"), "mempo-rollout", "sample", &[&model]);
            stage.write_part("trajectories", 0, |file| Ok(write_rows(&rows, file).map(drop)?)).unwrap();
            stage.finish(&[], json!({})).unwrap();
        }

        fn run(&self, numbers: &[u64], more: &str) -> anyhow::Result<()> {
            let paths = |kind: &str| numbers.iter().map(|number| self.path(&format!("{kind}-{number}"))).collect();
            let (policies, dev): (Vec<PathBuf>, Vec<PathBuf>) = (paths("policy"), paths("dev"));
            let mut words: Vec<std::ffi::OsString> = vec!["history".into(), "--policies".into()];
            words.extend(policies.into_iter().map(Into::into));
            words.push("--dev".into());
            words.extend(dev.into_iter().map(Into::into));
            words.extend(
                more.split_whitespace()
                    .map(|word| word.strip_prefix('@').map_or_else(|| word.into(), |name| self.path(name).into())),
            );
            let command = HistoryArguments::augment_args(clap::Command::new("history"));
            run(&HistoryArguments::from_arg_matches(&command.get_matches_from(words)).unwrap())
        }
    }

    fn trajectory(trajectory_index: i32, f1: f32) -> Trajectory {
        Trajectory {
            task_id: "t".to_owned(),
            trajectory_index,
            step_count: 1,
            status: Status::Ok,
            answer: None,
            format_valid: true,
            exact_match: vec![f1.floor()],
            f1: vec![f1],
            reward: Some(f1.floor()),
            generated_tokens: 1,
            processed_tokens: 1,
            unique_tokens: 1,
            peak_tokens: 1,
            tool_calls: 0,
            error: None,
            policy: String::new(),
            seed: 0,
        }
    }

    #[test]
    fn the_best_is_linked_and_the_old_are_thinned_out() {
        let runs = Runs(tempfile::tempdir().unwrap());
        for (number, f1) in [(1, [0.5, 0.5]), (2, [0.9, 0.9]), (3, [0.4, 0.4]), (4, [0.6, 1.0]), (5, [0.1, 0.1])] {
            runs.iteration(number, &f1);
        }
        runs.run(&[5, 2, 1, 4, 3], "--link-best @best").unwrap();
        let linked = |name: &str| fs_err::canonicalize(runs.path("best")).unwrap().ends_with(name);
        assert!(linked("policy-2"));
        runs.run(&[1, 2, 3, 4, 5], "--link-best @best --by reward --keep 3").unwrap();
        assert!(linked("policy-4"));
        let kept = |number: u64| {
            let policy = runs.path(&format!("policy-{number}"));
            let files = ["model.safetensors", "adapter/a.safetensors", "trainer/master.safetensors"];
            files.map(|file| u8::from(policy.join(file).exists()))
        };
        // The base of the adapters, none, every third, the best, the newest.
        assert_eq!([1, 2, 3, 4, 5].map(kept), [[1, 1, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]);
        let error = runs.run(&[1, 2, 3, 4, 5], "--link-best @best").unwrap_err();
        assert!(exit_code(&error) == 4 && format!("{error:#}").contains("model.safetensors was removed"), "{error:#}");
        assert!(linked("policy-4"));
        // What is recorded is enough to look back again.
        runs.run(&[1, 2, 3, 4, 5], "--keep 3").unwrap();
        verify(&runs.path("policy-1")).unwrap();
    }

    #[test]
    fn answer_probabilities_are_shown_early_and_late() {
        let line = |place: usize| json!({HISTOGRAM: [40, place, 0, 0]});
        let mut lines: Vec<Value> = (0..40).map(line).collect();
        lines.insert(0, json!({HISTOGRAM: null}));
        let rows = histograms(&lines);
        assert_eq!(rows.len(), HISTOGRAMS);
        assert_eq!(rows[0], ["2", "40", "0.125", "█▁▁▁"]);
        assert_eq!(rows[HISTOGRAMS - 1], ["41", "79", "0.248", "██▁▁"]);
        assert!(histograms(&lines[..1]).is_empty());
    }

    #[test]
    fn what_cannot_be_judged_is_refused_before_anything_is_removed() {
        let runs = Runs(tempfile::tempdir().unwrap());
        (1..=3).for_each(|number| runs.iteration(number, &[0.5]));
        let refused = |numbers: &[u64], more: &str, code: u8, named: &str| {
            let error = runs.run(numbers, more).unwrap_err();
            assert!(exit_code(&error) == code && format!("{error:#}").contains(named), "{error:#}");
        };
        refused(&[1], "--link-best @policy-1", 2, "no symbolic link");
        refused(&[1, 3], "--keep 5", 2, "was not made from");
        fs_err::write(runs.path("policy-3/model.safetensors"), "something else").unwrap();
        refused(&[1, 2, 3], "--keep 5", 4, "damaged");
        assert!(runs.path("policy-1/trainer/master.safetensors").exists());
        fs_err::os::unix::fs::symlink(runs.path("policy-2"), runs.path("policy-4")).unwrap();
        fs_err::os::unix::fs::symlink(runs.path("dev-2"), runs.path("dev-4")).unwrap();
        refused(&[4, 2], "--keep 5", 2, "sampled from the same policy");
    }

    #[test]
    fn a_policy_that_is_named_twice_is_refused_and_an_unfinished_one_left_out() {
        let runs = Runs(tempfile::tempdir().unwrap());
        (1..=2).for_each(|number| runs.iteration(number, &[0.5]));
        let arguments = |policies: &[&str]| HistoryArguments {
            policies: policies.iter().map(|name| runs.path(name)).collect(),
            dev: Vec::new(),
            by: By::F1,
            link_best: None,
            keep: Some(9),
            json: false,
        };
        fs_err::os::unix::fs::symlink(runs.path("policy-2"), runs.path("link")).unwrap();
        let error = run(&arguments(&["policy-1", "policy-2", "link"])).unwrap_err();
        assert!(exit_code(&error) == 2 && format!("{error:#}").contains("named twice"), "{error:#}");
        drop(runs.stage("begun", "mempo-rl", "train", &[]));
        run(&arguments(&["policy-1", "policy-2", "begun"])).unwrap();
        assert!(!runs.path("policy-1/trainer/master.safetensors").exists());
        assert!(runs.path("policy-2/trainer/master.safetensors").exists());
    }

    #[test]
    fn a_rollout_of_another_policy_is_refused() {
        let runs = Runs(tempfile::tempdir().unwrap());
        (1..=2).for_each(|number| runs.iteration(number, &[0.5]));
        let error = run(&HistoryArguments {
            policies: vec![runs.path("policy-1")],
            dev: vec![runs.path("dev-2")],
            by: By::F1,
            link_best: None,
            keep: None,
            json: false,
        });
        let error = error.unwrap_err();
        assert!(exit_code(&error) == 4 && format!("{error:#}").contains("none of the --policies"), "{error:#}");
    }
}
