//! What a stage's units add to its summary, kept beside the tables so that a resumed run sums up all of them.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;

use anyhow::Context as _;
use mempo_run::{ResultExt, Stage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Named sums.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Sums(BTreeMap<String, f64>);

impl Sums {
    /// Adds to a sum, which starts at 0.
    pub(crate) fn add(&mut self, name: &str, value: f64) {
        *self.0.entry(name.to_owned()).or_default() += value;
    }

    /// Adds `value` to the sum and 1 to the count of what is known.
    pub(crate) fn add_known(&mut self, name: &str, value: Option<f64>) {
        self.add(name, value.unwrap_or(0.0));
        self.add(&format!("{name}_count"), f64::from(u8::from(value.is_some())));
    }

    /// Adds all sums of another.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (name, value) in &other.0 {
            self.add(name, *value);
        }
    }

    /// A sum of whole numbers.
    pub(crate) fn count(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0.0) as u64
    }

    /// Mean of what [`Self::add_known`] was given, if anything.
    pub(crate) fn mean(&self, name: &str) -> Option<f64> {
        let count = self.count(&format!("{name}_count"));
        (count > 0).then(|| self.0[name] / count as f64)
    }
}

fn path(unit: usize) -> String {
    format!("units/part-{unit:05}.json")
}

/// Keeps what a unit adds; before the unit's last table, whose part says that the unit is done.
pub(crate) fn write_unit(stage: &Stage, unit: usize, sums: &impl Serialize) -> anyhow::Result<()> {
    stage.write_file(&path(unit), |file| {
        serde_json::to_writer(&mut *file, sums)?;
        Ok(writeln!(file)?)
    })
}

/// What the units added, in order.
pub(crate) fn read_units<T: DeserializeOwned>(stage: &Stage, units: Range<usize>) -> anyhow::Result<Vec<T>> {
    let read = |unit| {
        let file = stage.dir().join(path(unit));
        let text = fs_err::read_to_string(&file)?;
        serde_json::from_str(&text)
            .with_context(|| format!("{}: not what this program writes; start again with --restart", file.display()))
            .bad_input()
    };
    units.map(read).collect()
}
