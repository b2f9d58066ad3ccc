//! What became of the rows: counted per unit, added up for the summary.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Named counts, in the order of their names.
pub(crate) type Tally = BTreeMap<String, u64>;

/// The books of some rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Rows read, by form.
    pub(crate) rows: Tally,
    /// Rows that could not be used, within `--max-bad`.
    pub(crate) bad_rows: u64,
    /// Examples written.
    pub(crate) examples: u64,
    /// Steps of trajectories among them.
    pub(crate) steps: u64,
    /// Tokens of the examples.
    pub(crate) tokens: u64,
    /// Examples by split, where it is known.
    pub(crate) splits: Tally,
    /// Target tokens, by segment kind.
    pub(crate) targets: Tally,
    /// Examples or whole trajectories left out, by reason.
    pub(crate) dropped: Tally,
    /// What else a reader should know.
    pub(crate) notes: Tally,
}

impl Counts {
    /// Adds what another unit counted.
    pub(crate) fn add(&mut self, other: &Self) {
        self.bad_rows += other.bad_rows;
        self.examples += other.examples;
        self.steps += other.steps;
        self.tokens += other.tokens;
        add_tally(&mut self.rows, &other.rows);
        add_tally(&mut self.splits, &other.splits);
        add_tally(&mut self.targets, &other.targets);
        add_tally(&mut self.dropped, &other.dropped);
        add_tally(&mut self.notes, &other.notes);
    }

    /// Target tokens of every kind.
    pub(crate) fn target_tokens(&self) -> u64 {
        self.targets.values().sum()
    }

    /// The summary as text: one line a heading, one for each reason to leave something out.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("rows      {}", listed(&self.rows)),
            format!("examples  {} ({} steps), {} tokens", self.examples, self.steps, self.tokens),
            format!("targets   {} tokens: {}", self.target_tokens(), listed(&self.targets)),
        ];
        lines.extend((!self.splits.is_empty()).then(|| format!("splits    {}", listed(&self.splits))));
        lines.extend((self.bad_rows > 0).then(|| format!("bad rows  {}", self.bad_rows)));
        lines.extend((!self.dropped.is_empty()).then(|| "left out".to_owned()));
        let width = self.dropped.values().map(|number| number.to_string().len()).max().unwrap_or_default();
        lines.extend(self.dropped.iter().map(|(reason, number)| format!("  {number:>width$}  {reason}")));
        lines.extend((!self.notes.is_empty()).then(|| format!("notes     {}", listed(&self.notes))));
        lines
    }
}

/// Adds `count` to the entry `name`.
pub(crate) fn count(tally: &mut Tally, name: &str, count: u64) {
    match tally.get_mut(name) {
        Some(total) => *total += count,
        None => drop(tally.insert(name.to_owned(), count)),
    }
}

fn add_tally(total: &mut Tally, other: &Tally) {
    for (name, number) in other {
        count(total, name, *number);
    }
}

fn listed(tally: &Tally) -> String {
    let entries: Vec<String> = tally.iter().map(|(name, number)| format!("{name} {number}")).collect();
    if entries.is_empty() { "none".to_owned() } else { entries.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adding_units_adds_every_entry() {
        let mut unit = Counts { bad_rows: 1, examples: 2, steps: 2, tokens: 30, ..Counts::default() };
        count(&mut unit.rows, "chat", 3);
        count(&mut unit.targets, "memory", 4);
        count(&mut unit.targets, "memory", 1);
        count(&mut unit.dropped, "too long", 1);
        count(&mut unit.dropped, "wrong", 5);
        let mut total = unit.clone();
        total.add(&unit);
        assert_eq!((total.bad_rows, total.examples, total.tokens, total.target_tokens()), (2, 4, 60, 10));
        assert_eq!(
            total.lines(),
            [
                "rows      chat 6",
                "examples  4 (4 steps), 60 tokens",
                "targets   10 tokens: memory 10",
                "bad rows  2",
                "left out",
                "   2  too long",
                "  10  wrong",
            ]
        );
    }
}
