//! How a trajectory's advantage is spread over its steps, and which of them are trained.

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::normalise::Estimator;

/// What each step gets of its trajectory's advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TrajectoryCredit {
    /// All of it: longer trajectories weigh more, unless the update's average evens that out.
    Copy,
    /// An equal part: the trained steps of a trajectory have its advantage between them. A memory's own advantage is not
    /// divided, so that --alpha weighs more beside it, as many times as there are steps.
    Divide,
}

/// What becomes of the step that answers: a trajectory's last one, unless it calls a tool or only remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TrainFinal {
    /// It is trained as the others are.
    Keep,
    /// It is left out (loss weight 0), and out of account when dividing.
    Mask,
}

/// How a trajectory's advantage is spread over its steps: what was chosen.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub(crate) struct SpreadOptions {
    /// What each step gets of its trajectory's advantage [default: copy; divide for memagent-slime]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trajectory_credit: Option<TrajectoryCredit>,
    /// The step that answers: a trajectory's last one, unless it calls a tool or only remembers
    /// [default: keep; mask for memagent-slime]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) train_final: Option<TrainFinal>,
}

/// The same, with the estimator's own choice where none was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spread {
    pub(crate) credit: TrajectoryCredit,
    pub(crate) train_final: TrainFinal,
}

impl SpreadOptions {
    /// What holds under an estimator.
    pub(crate) fn of(&self, estimator: Estimator) -> Spread {
        let (credit, train_final) = match estimator {
            Estimator::MemagentSlime => (TrajectoryCredit::Divide, TrainFinal::Mask),
            _ => (TrajectoryCredit::Copy, TrainFinal::Keep),
        };
        Spread {
            credit: self.trajectory_credit.unwrap_or(credit),
            train_final: self.train_final.unwrap_or(train_final),
        }
    }
}

impl Spread {
    /// Whether a step is trained that is the answering one or not.
    pub(crate) fn trains(self, answers: bool) -> bool {
        self.train_final == TrainFinal::Keep || !answers
    }

    /// What each of a trajectory's steps gets of its advantage, `trained` of them being trained.
    pub(crate) fn share(self, advantage: f64, trained: usize) -> f64 {
        match self.credit {
            TrajectoryCredit::Divide if trained > 0 => advantage / trained as f64,
            _ => advantage,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixture::normalise_options;
    use crate::normalise::{NormaliseOptions, Rewarded, group_advantages};

    fn spread(credit: TrajectoryCredit, train_final: TrainFinal) -> Spread {
        Spread { credit, train_final }
    }

    #[test]
    fn what_is_asked_for_comes_before_what_the_estimator_does() {
        let asked = |trajectory_credit, train_final| SpreadOptions { trajectory_credit, train_final };
        let (copy, divide) = (TrajectoryCredit::Copy, TrajectoryCredit::Divide);
        let (keep, mask) = (TrainFinal::Keep, TrainFinal::Mask);
        assert_eq!(asked(None, None).of(Estimator::Memagent), spread(copy, keep));
        assert_eq!(asked(None, None).of(Estimator::MemagentSlime), spread(divide, mask));
        assert_eq!(asked(Some(copy), None).of(Estimator::MemagentSlime), spread(copy, mask));
        assert_eq!(asked(Some(divide), Some(mask)).of(Estimator::Mempo), spread(divide, mask));
        assert_eq!(asked(None, Some(keep)).of(Estimator::MemagentSlime), spread(divide, keep));
    }

    proptest! {
        #[test]
        fn groups_sum_to_zero_and_dividing_conserves_each_trajectory(
            attempts in proptest::collection::vec((0..5_i32, 1..9_usize), 2..17),
            estimator in proptest::sample::select(Estimator::value_variants()),
            mask in any::<bool>(),
        ) {
            let options = NormaliseOptions { estimator, ..normalise_options() };
            let rewarded = |(reward, _): &(i32, usize)| Rewarded {
                reward: f64::from(*reward) / 4.0, format_valid: true, memories: vec![], last_memory: None,
            };
            let rewards: Vec<Rewarded> = attempts.iter().map(rewarded).collect();
            let found = group_advantages(&rewards, &options).trajectory;
            prop_assert!(found.iter().sum::<f64>().abs() < 1e-9);
            let train_final = if mask { TrainFinal::Mask } else { TrainFinal::Keep };
            for (advantage, (_, steps)) in found.into_iter().zip(attempts) {
                let trained = |credit| {
                    let spread = spread(credit, train_final);
                    let count = (1..=steps).filter(|step| spread.trains(*step == steps)).count();
                    vec![spread.share(advantage, count); count]
                };
                let (divided, copied): (Vec<f64>, Vec<f64>) = (trained(TrajectoryCredit::Divide), trained(TrajectoryCredit::Copy));
                prop_assert_eq!(divided.len(), steps - usize::from(mask));
                prop_assert!(divided.is_empty() || (divided.iter().sum::<f64>() - advantage).abs() < 1e-9);
                prop_assert!(copied.iter().all(|share| share.to_bits() == advantage.to_bits()));
            }
        }
    }
}
