//! An evaluation as tables for the terminal and as JSON.

use serde::Serialize;

use crate::bootstrap::Estimate;
use crate::contrast::GroupFigures;
use crate::measure::{Group, METRICS};
use crate::rollouts::Settings;

/// Everything an evaluation found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) intervals: Intervals,
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
    /// By how much the difference grows from the fewest objectives to more.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) interactions: Vec<GroupFigures>,
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
        figures(&columns, false)
    }

    /// Every difference with its interval, one column a run other than the baseline.
    pub(crate) fn differences_table(&self) -> Table {
        figures(&self.difference_columns(|difference| &difference.groups), true)
    }

    /// By how much the differences grow with the objectives.
    pub(crate) fn interactions_table(&self) -> Table {
        figures(&self.difference_columns(|difference| &difference.interactions), true)
    }

    fn difference_columns<'a>(&'a self, groups: impl Fn(&'a Difference) -> &'a [GroupFigures]) -> Vec<Column<'a>> {
        let column = |difference: &'a Difference| Column {
            name: format!("{} - {}", difference.label, difference.baseline),
            groups: groups(difference),
        };
        self.differences.iter().map(column).collect()
    }
}

/// A column of figures.
struct Column<'a> {
    name: String,
    groups: &'a [GroupFigures],
}

/// Rows are the metrics of each group; `signed` figures are differences.
fn figures(columns: &[Column<'_>], signed: bool) -> Table {
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
        for (index, metric) in METRICS.iter().enumerate() {
            let name = if metric.share { format!("{}, %", metric.name) } else { metric.name.to_owned() };
            push(&name, &|figures| render_estimate(metric.share, figures.metrics[index], signed));
        }
    }
    let names = columns.iter().map(|column| column.name.clone());
    (["group", "metric"].into_iter().map(str::to_owned).chain(names).collect(), rows)
}

fn render_group(group: &Group) -> String {
    let objectives = group.objectives.map(|count| format!("objectives={count}"));
    let source = group.source.as_ref().map(|source| format!("source={source}"));
    let parts: Vec<String> = objectives.into_iter().chain(source).collect();
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
