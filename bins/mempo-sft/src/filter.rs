//! Which rows become examples, and why others do not.

use mempo_run::ResultExt;
use serde::Serialize;

use crate::condition::{Condition, Facts};

/// Which trajectories become examples, by their answer and form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Keep {
    /// All that can be read
    All,
    /// Those with all tags right, and a memory where one is needed
    WellFormed,
    /// Those with the right answer in the right form
    Correct,
}

/// Which rows count as seen before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Duplicates {
    /// Those that give the same token ids and targets
    Exact,
    /// Also those whose question and completions share most of their five-word sequences
    Near,
}

/// What rows have to be like.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct FilterOptions {
    /// Which trajectories to keep; pairs and text have no form and stay. `correct` needs gold answers: the row's own
    /// (`golden_answers`), or those of --tasks; rollouts hold their reward
    #[arg(long, value_enum, default_value = "all")]
    pub(crate) keep: Keep,
    /// Leave out trajectories one of whose memories holds a gold answer before any document showed it: they teach to guess
    #[arg(long)]
    pub(crate) drop_leaks: bool,
    /// Keep rows of which this SQL condition is true. Columns: trajectory_id, task_id, source, split, form (chat, pair, text,
    /// rollout), question, answer (text); steps, tool_calls, tokens, target_tokens, peak_tokens (of the longest example);
    /// exact_match, f1 (means over objectives, in [0, 1]); format_valid, correct, leaks (true or false). What is not known is
    /// null: write `correct IS NOT FALSE` to keep it
    #[arg(long = "where", value_name = "SQL")]
    pub(crate) condition: Option<String>,
    /// Leave out rows like an earlier one that was kept; all rows are encoded once more, first, to find them
    #[arg(long, value_enum, value_name = "WHICH")]
    pub(crate) drop_duplicates: Option<Duplicates>,
    /// Estimated share of five-word sequences (shared ones over all of both rows) from which rows are near duplicates, from
    /// 0.75 on
    #[arg(long, default_value_t = 0.8, value_name = "SHARE")]
    pub(crate) near_similarity: f64,
}

impl FilterOptions {
    /// Refuses what makes no sense; the condition, where there is one.
    pub(crate) fn check(&self) -> anyhow::Result<Option<Condition>> {
        // Of pairs below, too few are ever compared.
        if !(0.75..=1.0).contains(&self.near_similarity) {
            let found = self.near_similarity;
            return Err(anyhow::anyhow!("--near-similarity {found}, expected a share from 0.75 to 1")).usage();
        }
        let condition = self.condition.as_deref().map(Condition::parse).transpose();
        condition.map_err(anyhow::Error::msg).usage()
    }

    /// Why a row is left out, if it is; an error where that can't be known.
    pub(crate) fn reason(&self, facts: &Facts) -> Result<Option<&'static str>, &'static str> {
        let judged = facts.format_valid.is_some();
        if self.keep != Keep::All && facts.format_valid == Some(false) {
            return Ok(Some("format not valid (trajectories)"));
        }
        if self.keep == Keep::Correct && judged && !facts.correct.ok_or("--keep correct")? {
            return Ok(Some("answer not correct (trajectories)"));
        }
        if self.drop_leaks && judged && facts.leaks.ok_or("--drop-leaks")? {
            return Ok(Some("gold answer in a memory too soon (trajectories)"));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_come_in_order() {
        let options = |keep, drop_leaks| FilterOptions {
            keep,
            drop_leaks,
            condition: None,
            drop_duplicates: None,
            near_similarity: 0.8,
        };
        let facts = |format_valid, correct, leaks| Facts { format_valid, correct, leaks, ..Facts::default() };
        let check = |options: &FilterOptions, facts: &Facts, expected: Result<Option<&str>, &str>| {
            let found = options.reason(facts);
            assert_eq!(found.map(|reason| reason.map(|text| text.split(' ').next().unwrap())), expected, "{facts:?}");
        };
        let (yes, no) = (Some(true), Some(false));
        check(&options(Keep::All, false), &facts(no, no, yes), Ok(None));
        check(&options(Keep::WellFormed, false), &facts(no, no, yes), Ok(Some("format")));
        check(&options(Keep::WellFormed, false), &facts(yes, no, yes), Ok(None));
        check(&options(Keep::Correct, false), &facts(no, None, None), Ok(Some("format")));
        check(&options(Keep::Correct, false), &facts(yes, no, yes), Ok(Some("answer")));
        check(&options(Keep::Correct, false), &facts(yes, None, None), Err("--keep correct"));
        check(&options(Keep::Correct, true), &facts(yes, yes, yes), Ok(Some("gold")));
        check(&options(Keep::Correct, true), &facts(yes, yes, no), Ok(None));
        check(&options(Keep::All, true), &facts(yes, yes, None), Err("--drop-leaks"));
        check(&options(Keep::Correct, true), &facts(None, None, None), Ok(None));
        assert!(options(Keep::All, false).check().unwrap().is_none());
        let error = FilterOptions { near_similarity: 0.3, ..options(Keep::All, false) }.check().err().unwrap();
        assert!(error.to_string().contains("--near-similarity 0.3"), "{error}");
    }
}
