//! Options of sampling and of the agent's limits: flags, API and manifest entry in one.

use clap::{Args, ValueEnum};
use serde::Serialize;

/// How completions are drawn.
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
pub struct SamplingOptions {
    /// Sampling temperature; 0 takes the most probable token
    #[arg(long, default_value_t = 1.0, value_parser = temperature)]
    pub temperature: f64,
    /// Sample from the smallest set of tokens with this much probability (training needs 1)
    #[arg(long, default_value_t = 1.0, value_parser = top_p)]
    pub top_p: f64,
    /// Longest completion of one step, in tokens [memagent: 1024, which is a memory's limit, too]
    #[arg(long, default_value_if("context", "memagent", "1024"), default_value_t = 512, value_parser = at_least_one)]
    pub max_completion_tokens: usize,
}

/// Where a trajectory ends at the latest.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize)]
pub struct LimitOptions {
    /// Most steps (model calls) of a trajectory that searches; one that reads takes one for each chunk of its document, and one more
    #[arg(long, default_value_t = 16, value_parser = at_least_one)]
    pub max_steps: usize,
    /// Longest prompt of one step, in tokens; a longer one ends the trajectory as truncated [full-document: what the model's window
    /// leaves]
    #[arg(long, default_value_if("context", "full-document", "1000000000"), default_value_t = 8192, value_parser = at_least_one)]
    pub max_prompt_tokens: usize,
    /// Longest observation, in tokens; a longer one is cut and marked
    #[arg(long, default_value_t = 1024, value_parser = at_least_one)]
    pub max_observation_tokens: usize,
    /// Most tool calls of a trajectory, malformed ones among them; more are not made, and the policy is told
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tool_calls: Option<usize>,
    /// What becomes of a trajectory whose tool fails through no fault of the policy: it ends as tool_error, or reads `Error: …` as
    /// the result and goes on; its status is tool_error and its reward null in either case
    #[arg(long, value_enum, default_value_t)]
    #[serde(skip_serializing_if = "OnToolFailure::is_default")]
    pub on_tool_failure: OnToolFailure,
    /// Documents a search returns
    #[arg(long, default_value_t = 3, value_parser = at_least_one)]
    pub top_k: usize,
}

/// What becomes of a trajectory whose tool fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnToolFailure {
    /// It ends there.
    #[default]
    Stop,
    /// The policy is told, and the trajectory goes on.
    Observe,
}

impl OnToolFailure {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference to the field")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    number(text).and_then(|value| if value >= 0.0 { Ok(value) } else { Err("must be 0 or more".to_owned()) })
}

fn top_p(text: &str) -> Result<f64, String> {
    let within =
        |value| if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("must be above 0, at most 1".to_owned()) };
    number(text).and_then(within)
}

fn number(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err("not a number".to_owned()),
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("not a whole number: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingOptions,
        #[command(flatten)]
        limits: LimitOptions,
    }

    #[test]
    fn values_without_a_meaning_are_refused() {
        let parse = |words: &str| Line::try_parse_from(std::iter::once("agent").chain(words.split_whitespace()));
        let defaults = parse("").ok().unwrap();
        assert_eq!((defaults.sampling.temperature, defaults.limits.top_k), (1.0, 3));
        assert_eq!(parse("--temperature 0 --top-p 0.5 --max-steps 1").ok().unwrap().limits.max_steps, 1);
        for words in
            ["--temperature=-1", "--temperature nan", "--top-p 0", "--top-p 1.1", "--max-steps 0", "--top-k=-1"]
        {
            assert!(parse(words).is_err(), "{words}");
        }
    }

    #[test]
    fn what_fits_a_context_is_its_default() {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            context: crate::ContextOptions,
            #[command(flatten)]
            sampling: SamplingOptions,
            #[command(flatten)]
            limits: LimitOptions,
        }
        for (context, completion, prompt) in
            [("mempo", 512, 8192), ("memagent", 1024, 8192), ("full-document", 512, 1_000_000_000)]
        {
            let line = Line::try_parse_from(["agent", "--context", context]).ok().unwrap();
            assert_eq!(line.context.context, context);
            let found = (line.sampling.max_completion_tokens, line.limits.max_prompt_tokens);
            assert_eq!(found, (completion, prompt), "{context}");
        }
    }
}
