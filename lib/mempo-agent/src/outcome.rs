//! What an answer is worth, and whether a completion kept the format.

use mempo_data::{Objective, Segment, SegmentKind, Status};
use mempo_text::answer::{exact_match, f1, split_answers};
use mempo_text::{MemoryRule, ParsedCompletion};

use crate::RewardKind;

/// Judgement of a finished trajectory.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// One per objective, 0 or 1.
    pub exact_match: Vec<f32>,
    /// One per objective, word-level F1 in [0, 1].
    pub f1: Vec<f32>,
    /// Tags right in every step and no more answers than objectives.
    pub format_valid: bool,
    /// What the rule says in [0, 1], 0 unless the format is valid; `None` if something other than the policy failed.
    pub reward: Option<f32>,
}

/// Judges `answer`, split at `;`, objective by objective in order. A missing answer is worth 0; surplus answers make the
/// format invalid. `tags_valid` says whether [`format_problem`] found nothing in any step, `reward` what is rewarded.
pub fn outcome(
    objectives: &[Objective],
    answer: Option<&str>,
    tags_valid: bool,
    status: Status,
    reward: RewardKind,
) -> Outcome {
    let answers = answer.map(split_answers).unwrap_or_default();
    let judged = objectives.iter().enumerate().map(|(index, objective)| match answers.get(index) {
        Some(given) => (exact_match(given, &objective.answers), f1(given, &objective.answers) as f32),
        None => (false, 0.0),
    });
    let (right, f1): (Vec<bool>, Vec<f32>) = judged.unzip();
    let format_valid = tags_valid && answers.len() <= objectives.len();
    let well_formed = status == Status::Ok && format_valid;
    let reward = status.is_policy().then(|| if well_formed { reward.earned(objectives, &answers) } else { 0.0 });
    let exact_match = right.into_iter().map(f32::from).collect();
    Outcome { exact_match, f1, format_valid, reward }
}

/// What is wrong with the tags of one step, if anything: the parser's findings, then the memory rule. With
/// [`MemoryRule::Required`] every step from the second on holds exactly one memory, the first at most one.
pub fn format_problem(rule: MemoryRule, step_index: usize, parsed: &ParsedCompletion) -> Option<String> {
    if let Some(problem) = parsed.problems.first() {
        return Some(problem.clone());
    }
    let least = usize::from(step_index > 0);
    let count = parsed.memory_count;
    let wrong = rule == MemoryRule::Required && !(least..=1).contains(&count);
    wrong.then(|| {
        format!("{count} memory segments where {} is expected", if least == 1 { "exactly one" } else { "at most one" })
    })
}

/// The segments of a completion as a row holds them.
pub fn row_segments(parsed: &ParsedCompletion) -> Vec<Segment> {
    let kind = |kind: mempo_text::SegmentKind| match kind {
        mempo_text::SegmentKind::Memory => SegmentKind::Memory,
        mempo_text::SegmentKind::Think => SegmentKind::Think,
        mempo_text::SegmentKind::ToolCall => SegmentKind::ToolCall,
        mempo_text::SegmentKind::Answer => SegmentKind::Answer,
    };
    let segments = parsed.segments.iter();
    segments
        .map(|segment| Segment {
            kind: kind(segment.kind),
            start: segment.range.start as i32,
            end: segment.range.end as i32,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(answers: &[&str]) -> Objective {
        Objective { question: "?".to_owned(), answers: answers.iter().map(ToString::to_string).collect() }
    }

    #[track_caller]
    fn check(answer: Option<&str>, status: Status, exact: [f32; 2], valid: bool, reward: Option<f32>) {
        let objectives = [objective(&["Paris", "City of Light"]), objective(&["blue whale"])];
        let outcome = outcome(&objectives, answer, true, status, RewardKind::ExactMatch);
        assert_eq!(outcome.exact_match, exact, "{answer:?}");
        assert_eq!(outcome.format_valid, valid, "{answer:?}");
        assert_eq!(outcome.reward, reward, "{answer:?}");
    }

    #[test]
    fn answers_are_judged_by_position() {
        check(Some("paris; The blue whale."), Status::Ok, [1.0, 1.0], true, Some(1.0));
        check(Some("City of Light;blue whale"), Status::Ok, [1.0, 1.0], true, Some(1.0));
        check(Some("blue whale; Paris"), Status::Ok, [0.0, 0.0], true, Some(0.0));
        check(Some("Paris"), Status::Ok, [1.0, 0.0], true, Some(0.0));
        check(Some("Paris; blue whale; Rome"), Status::Ok, [1.0, 1.0], false, Some(0.0));
        check(None, Status::MaxSteps, [0.0, 0.0], true, Some(0.0));
        check(None, Status::ToolError, [0.0, 0.0], true, None);
        check(None, Status::EngineError, [0.0, 0.0], true, None);
    }

    #[test]
    fn f1_counts_shared_words_and_a_broken_format_earns_nothing() {
        let objectives = [objective(&["blue whale"])];
        let outcome = |answer, valid| outcome(&objectives, Some(answer), valid, Status::Ok, RewardKind::ExactMatch);
        let grey = outcome("grey whale", true);
        assert!((grey.f1[0] - 0.5).abs() < 1e-6, "one of two words each way");
        let broken = outcome("blue whale", false);
        assert_eq!((broken.exact_match[0], broken.reward), (1.0, Some(0.0)));
    }

    #[test]
    #[expect(clippy::float_cmp, reason = "halves and quarters are exact")]
    fn a_reward_is_what_its_rule_says_of_all_objectives() {
        use RewardKind::{Boxed, ExactMatch, F1, SubExactMatch};
        let objectives = [objective(&["Paris", "City of Light"]), objective(&[r"\frac{1}{2}"])];
        let rewards = |answer, valid, status| {
            [ExactMatch, Boxed, SubExactMatch, F1]
                .map(|kind| outcome(&objectives, answer, valid, status, kind).reward.unwrap())
        };
        let ok = |answer| rewards(Some(answer), true, Status::Ok);
        assert_eq!(ok(r"the paris; \frac{1}{2}."), [1.0, 0.0, 1.0, 1.0], "articles and full stops count in a box");
        assert_eq!(ok(r"paris; \dfrac{1} {2}"), [0.0, 1.0, 0.0, 0.5]);
        assert_eq!(ok(r"paris; \boxed{\frac{1}{2}}"), [0.0, 1.0, 1.0, 0.5], "still in its box");
        assert_eq!(ok(r"it is Paris; \frac{1}{2}"), [0.0, 0.0, 1.0, 0.75], "F1 of 1/2 and 1");
        assert_eq!(ok("paris"), [0.0, 0.0, 0.0, 0.5]);
        let right = Some(r"paris; \frac{1}{2}");
        assert_eq!(rewards(right, true, Status::Ok), [1.0; 4]);
        assert_eq!(rewards(right, false, Status::Ok), [0.0; 4]);
        assert_eq!(rewards(Some(r"paris; \frac{1}{2}; x"), true, Status::Ok), [0.0; 4]);
        assert_eq!(rewards(None, true, Status::MaxSteps), [0.0; 4]);
        let far = format!("\\boxed{{paris}}{}", " and so on".repeat(30));
        assert_eq!([ExactMatch, Boxed, SubExactMatch, F1].map(|kind| kind.sees(&far)), [true, false, true, true]);
        assert!(Boxed.sees(&far[10..]) && Boxed.sees(r"\boxed{paris}"), "no box, or one near the end");
        for kind in [ExactMatch, Boxed, SubExactMatch, F1] {
            assert_eq!(outcome(&objectives, right, true, Status::ToolError, kind).reward, None);
            assert_eq!(outcome(&[], Some("anything"), true, Status::Ok, kind).reward, Some(0.0));
        }
    }
}
