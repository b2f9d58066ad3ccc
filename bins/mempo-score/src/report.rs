//! An evaluation as tables for the terminal and as JSON.

use serde::Serialize;

use crate::bootstrap::Estimate;
use crate::contrast::GroupFigures;
use crate::measure::{Group, METRICS, Metric};
use crate::rollouts::Settings;

/// Everything an evaluation found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) intervals: Intervals,
    /// Among how many trajectories of a task the `_best` figures look for the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) best_of: Option<usize>,
    pub(crate) runs: Vec<Run>,
    pub(crate) differences: Vec<Difference>,
}

/// How intervals were made.
#[derive(Debug, Serialize)]
pub(crate) struct Intervals {
    pub(crate) method: &'static str,
    pub(crate) clusters: &'static str,
    pub(crate) level: f64,
    pub(crate) resamples: usize,
    pub(crate) seed: u64,
}

/// Figures of the runs of one name.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) label: String,
    /// How it was sampled; nothing for answers from a file.
    pub(crate) settings: Option<Settings>,
    /// Digests of the checkpoints that sampled.
    pub(crate) policies: Vec<String>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) groups: Vec<GroupFigures>,
}

/// `label - baseline` over the tasks and seeds that both have.
#[derive(Debug, Serialize)]
pub(crate) struct Difference {
    pub(crate) label: String,
    pub(crate) baseline: String,
    pub(crate) groups: Vec<GroupFigures>,
    /// By how much the difference grows from the fewest objectives to more, or from the shortest documents to longer ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) interactions: Vec<GroupFigures>,
}

/// What can be told of a group of tasks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Figure {
    /// Of these [`METRICS`].
    Metric(usize),
    Seconds,
    PeakMemory,
}

impl Figure {
    fn all() -> impl Iterator<Item = Self> {
        (0..METRICS.len()).map(Self::Metric).chain([Self::Seconds, Self::PeakMemory])
    }

    fn key(self) -> &'static str {
        match self {
            Self::Metric(metric) => METRICS[metric].name,
            Self::Seconds => "seconds",
            Self::PeakMemory => "peak_memory_mib",
        }
    }

    /// That of a name.
    pub(crate) fn of(name: &str) -> Result<Self, String> {
        let names = || Self::all().map(Self::key).collect::<Vec<_>>().join(", ");
        Self::all().find(|figure| figure.key() == name).ok_or_else(|| format!("one of {}", names()))
    }

    fn is_known(self, of: &GroupFigures) -> bool {
        match self {
            Self::Metric(metric) => of.metrics[metric].value.is_some(),
            Self::Seconds => of.cost.is_some(),
            Self::PeakMemory => of.cost.as_ref().is_some_and(|cost| cost.peak_memory_bytes.is_some()),
        }
    }

    /// What a table says of it; of differences that are `signed`.
    fn cell(self, of: &GroupFigures, signed: bool) -> String {
        let cost = of.cost.as_ref();
        let known = match self {
            Self::Metric(metric) => return render_estimate(METRICS[metric].share, of.metrics[metric], signed),
            Self::Seconds => cost.map(|cost| format!("{:.0}", cost.seconds)),
            Self::PeakMemory => cost.and_then(|cost| cost.peak_memory_bytes).map(|bytes| (bytes >> 20).to_string()),
        };
        known.unwrap_or_else(|| "-".to_owned())
    }
}

/// Header and rows.
pub(crate) type Table = (Vec<String>, Vec<Vec<String>>);

impl Report {
    /// How each run was sampled, one column a run.
    pub(crate) fn settings_table(&self) -> Table {
        let row = |name: &str, value: &dyn Fn(&Run) -> Option<String>| {
            let cells = self.runs.iter().map(|run| value(run).unwrap_or_else(|| "-".to_owned()));
            std::iter::once(name.to_owned()).chain(cells).collect()
        };
        let setting = |value: fn(&Settings) -> String| move |run: &Run| run.settings.as_ref().map(value);
        let policies = |run: &Run| match &run.policies[..] {
            [] => None,
            [digest] => Some(digest.chars().take(12).collect()),
            several => Some(format!("{} policies", several.len())),
        };
        let seeds = |run: &Run| {
            let seeds = run.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
            run.settings.as_ref().map(|_| seeds)
        };
        let rows = vec![
            row("profile", &setting(|settings| settings.profile.clone())),
            row("context", &setting(Settings::context)),
            row("temperature", &setting(|settings| settings.temperature.to_string())),
            row("top_p", &setting(|settings| settings.top_p.to_string())),
            row("reward", &setting(Settings::reward)),
            row("group_size", &setting(|settings| settings.group_size.to_string())),
            row("policy", &policies),
            row("seed", &seeds),
        ];
        let labels = self.runs.iter().map(|run| run.label.clone());
        (std::iter::once("setting".to_owned()).chain(labels).collect(), rows)
    }

    /// Every figure of every run with its interval, one column a run.
    pub(crate) fn figures_table(&self) -> Table {
        let columns: Vec<Column> =
            self.runs.iter().map(|run| Column { name: run.label.clone(), groups: &run.groups }).collect();
        self.figures(&columns, false)
    }

    /// One figure of every run, a row a run, a column a group.
    pub(crate) fn figure_table(&self, figure: Figure) -> Table {
        let groups = self.runs.first().map_or(&[][..], |run| &run.groups);
        let name = self.name(figure);
        let header = std::iter::once(name).chain(groups.iter().map(|found| render_group(&found.group)));
        let row = |run: &Run| {
            let cells = run.groups.iter().map(|found| figure.cell(found, false));
            std::iter::once(run.label.clone()).chain(cells).collect()
        };
        (header.collect(), self.runs.iter().map(row).collect())
    }

    fn name(&self, figure: Figure) -> String {
        let Figure::Metric(metric) = figure else { return figure.key().to_owned() };
        let Metric { name, share, best, .. } = &METRICS[metric];
        let best = self.best_of.filter(|_| *best).map(|count| format!(", best of {count}")).unwrap_or_default();
        format!("{name}{}{best}", if *share { ", %" } else { "" })
    }

    /// Every difference with its interval, one column a run other than the baseline.
    pub(crate) fn differences_table(&self) -> Table {
        self.figures(&self.difference_columns(|difference| &difference.groups), true)
    }

    /// By how much the differences grow with the objectives or the documents.
    pub(crate) fn interactions_table(&self) -> Table {
        self.figures(&self.difference_columns(|difference| &difference.interactions), true)
    }

    fn difference_columns<'a>(&'a self, groups: impl Fn(&'a Difference) -> &'a [GroupFigures]) -> Vec<Column<'a>> {
        let column = |difference: &'a Difference| Column {
            name: format!("{} - {}", difference.label, difference.baseline),
            groups: groups(difference),
        };
        self.differences.iter().map(column).collect()
    }

    /// Rows are the figures of each group, but for those that are known of none; `signed` ones are differences.
    fn figures(&self, columns: &[Column<'_>], signed: bool) -> Table {
        let is_known = |figure: &Figure| columns.iter().flat_map(|column| column.groups).any(|of| figure.is_known(of));
        let known: Vec<Figure> = Figure::all().filter(is_known).collect();
        let mut rows = Vec::new();
        for (place, first) in columns.first().map_or(&[][..], |column| column.groups).iter().enumerate() {
            let minus = first.minus.as_ref().map(|minus| format!(" - {}", render_group(minus)));
            let group = render_group(&first.group) + &minus.unwrap_or_default();
            let mut push = |name: &str, cell: &dyn Fn(&GroupFigures) -> String| {
                let cells = columns.iter().map(|column| cell(&column.groups[place]));
                rows.push([group.clone(), name.to_owned()].into_iter().chain(cells).collect());
            };
            push("tasks", &|figures| figures.tasks.to_string());
            push("trajectories", &|figures| figures.trajectories.to_string());
            for figure in &known {
                push(&self.name(*figure), &|figures| figure.cell(figures, signed));
            }
        }
        let names = columns.iter().map(|column| column.name.clone());
        (["group", "metric"].into_iter().map(str::to_owned).chain(names).collect(), rows)
    }
}

/// A column of figures.
struct Column<'a> {
    name: String,
    groups: &'a [GroupFigures],
}

fn render_group(group: &Group) -> String {
    let objectives = group.objectives.map(|count| format!("objectives={count}"));
    let source = group.source.as_ref().map(|source| format!("source={source}"));
    let length = group.document_tokens.map(|length| format!("document_tokens={length}"));
    let parts: Vec<String> = [objectives, source, length].into_iter().flatten().collect();
    if parts.is_empty() { "all".to_owned() } else { parts.join(" ") }
}

/// A figure with its interval, a share in percent, a difference with its sign.
pub(crate) fn render_estimate(share: bool, estimate: Estimate, signed: bool) -> String {
    let scale = if share { 100.0 } else { 1.0 };
    let render = |value: f64| if signed { format!("{:+.1}", value * scale) } else { format!("{:.1}", value * scale) };
    match estimate {
        Estimate { value: None, .. } => "-".to_owned(),
        Estimate { value: Some(value), low: Some(low), high: Some(high) } => {
            format!("{} [{}, {}]", render(value), render(low), render(high))
        }
        Estimate { value: Some(value), .. } => render(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::LEVEL;

    fn figures(group: Group, value: f64) -> GroupFigures {
        let estimate = |metric: &Metric| Estimate { value: (!metric.best).then_some(value), low: None, high: None };
        let metrics = METRICS.iter().map(estimate).collect();
        GroupFigures { group, minus: None, seeds: 1, tasks: 3, trajectories: 6, clusters: 3, metrics, cost: None }
    }

    #[test]
    fn a_metric_is_a_table_of_runs_by_groups() {
        let run = |label: &str, values: [f64; 2]| {
            let long = Group { document_tokens: Some(14_000), ..Group::default() };
            let groups = vec![figures(Group::default(), values[0]), figures(long, values[1])];
            Run { label: label.to_owned(), settings: None, policies: vec![], seeds: vec![], groups }
        };
        let intervals = Intervals { method: "", clusters: "task", level: LEVEL, resamples: 0, seed: 0 };
        let runs = vec![run("before", [0.5, 0.25]), run("after", [0.75, 0.7])];
        let report = Report { intervals, best_of: Some(5), runs, differences: vec![] };
        let table = |name| report.figure_table(Figure::of(name).unwrap());
        let (header, rows) = table("sub_em.v1");
        assert_eq!(header, ["sub_em.v1, %", "all", "document_tokens=14000"]);
        assert_eq!(rows, [["before", "50.0", "25.0"], ["after", "75.0", "70.0"]]);
        let (header, rows) = table("sub_em_best.v1");
        assert_eq!((header[0].as_str(), rows[0][1].as_str()), ("sub_em_best.v1, %, best of 5", "-"));
        let (_, rows) = report.figures_table();
        assert_eq!(
            rows.len(),
            2 * (2 + METRICS.iter().filter(|metric| !metric.best).count()),
            "what is not known is not shown"
        );
    }
}
