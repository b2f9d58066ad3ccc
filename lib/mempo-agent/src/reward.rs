//! What trajectories are rewarded for: rules by name and version.

use clap::{Args, ValueEnum};
use mempo_data::Objective;
use mempo_text::answer::{box_is_in_sight, boxed_answer, equal_when_cleaned, exact_match, f1, sub_exact_match};
use serde::{Deserialize, Serialize};

/// A rule for the reward of a trajectory whose format is valid; without a valid format it is 0. A rule that is changed gets
/// another version: manifests name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
pub enum RewardKind {
    /// 1 if every answer equals an accepted one once both are normalised as in SQuAD, else 0
    #[default]
    #[serde(rename = "exact-match.v1")]
    ExactMatch,
    /// 1 if every answer equals an accepted one once both are cleaned as in MATH, else 0; a box that begins before the last
    /// 300 characters is not seen (MemAgent's)
    #[serde(rename = "boxed.v1")]
    Boxed,
    /// 1 if every answer holds an accepted one, or is part of it, once both are normalised, else 0 (RULER-HQA's sub_em)
    #[serde(rename = "sub-exact-match.v1")]
    SubExactMatch,
    /// Mean over objectives of the word-level F1
    #[serde(rename = "f1.v1")]
    F1,
}

impl RewardKind {
    /// Whether it is what rollouts are rewarded for unless told otherwise: their manifests do not name it.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What answers are worth by position, in [0, 1]; a missing one is worth 0, no objectives are worth 0.
    pub(crate) fn earned(self, objectives: &[Objective], answers: &[String]) -> f32 {
        let worth = |(index, objective): (usize, &Objective)| {
            let worth = |given: &String| self.worth(given, &objective.answers);
            answers.get(index).map_or(0.0, worth)
        };
        let worths = objectives.iter().enumerate().map(worth);
        let least = || worths.clone().fold(1.0, f64::min);
        match self {
            _ if objectives.is_empty() => 0.0,
            Self::F1 => (worths.sum::<f64>() / objectives.len() as f64) as f32,
            Self::ExactMatch | Self::Boxed | Self::SubExactMatch => least() as f32,
        }
    }

    /// Whether the rule sees the answer of a completion.
    pub(crate) fn sees(self, completion: &str) -> bool {
        self != Self::Boxed || box_is_in_sight(completion)
    }

    /// What one answer is worth, in [0, 1].
    fn worth(self, given: &str, accepted: &[String]) -> f64 {
        let right = match self {
            Self::ExactMatch => exact_match(given, accepted),
            Self::Boxed => equal_when_cleaned(boxed_answer(given).as_deref().unwrap_or(given), accepted),
            Self::SubExactMatch => sub_exact_match(given, accepted),
            Self::F1 => return f1(given, accepted),
        };
        f64::from(u8::from(right))
    }
}

/// What trajectories are rewarded for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize)]
pub struct RewardOptions {
    /// What a trajectory is rewarded for, if its format is valid
    #[arg(long, value_enum, default_value = "exact-match")]
    #[serde(skip_serializing_if = "RewardKind::is_default")]
    pub reward: RewardKind,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_name_the_rule_with_its_version_unless_it_is_the_default() {
        let json = |reward| serde_json::to_value(RewardOptions { reward }).unwrap();
        assert_eq!(json(RewardKind::ExactMatch), serde_json::json!({}));
        assert_eq!(json(RewardKind::SubExactMatch), serde_json::json!({"reward": "sub-exact-match.v1"}));
        for kind in RewardKind::value_variants() {
            let value = serde_json::to_value(kind).unwrap();
            let name = kind.to_possible_value().unwrap().get_name().to_owned();
            assert_eq!(value, serde_json::json!(format!("{name}.v1")), "the flag's word and a version");
            assert_eq!(serde_json::from_value::<RewardKind>(value).unwrap(), *kind);
        }
    }
}
