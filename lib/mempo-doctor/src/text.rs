//! A model directory's tokenizer and chat template, and the prompts and answers made with them.

use std::path::Path;

use mempo_model::{Config, ScoredSequence};
use mempo_text::{Carried, CarriedStep, Profile, PromptBuilder, Tokenizer, ToolSpec};

use crate::DoctorArguments;
use crate::report::Report;

const QUESTION: &str = "What is the capital of France?";
/// Text that a lossy tokenizer changes.
const HARD_TEXT: &str = "Zürich\t東京  \n\n x==1; 🧭 e\u{301}";

/// Prompt and answer, for the model to score.
pub(crate) fn examine(
    dir: &Path,
    arguments: &DoctorArguments,
    config: Option<&Config>,
    report: &mut Report,
) -> Option<ScoredSequence> {
    let tokenizer = report.value("tokenizer", Tokenizer::load(dir))?;
    examine_tokenizer(&tokenizer, config, report);
    let profile = report.value("profile", Profile::load(&arguments.profile))?;
    let builder = report.value("template", PromptBuilder::load(dir, profile, &[ToolSpec::search()]))?;
    let prompt = examine_template(&builder, report)?;
    let (opening, answer) = examine_boundary(&builder, &arguments.answer, report);
    let start = prompt.len() + opening.len();
    let ids = [prompt, opening, answer].concat();
    Some(ScoredSequence { targets: start..ids.len(), ids })
}

fn examine_tokenizer(tokenizer: &Tokenizer, config: Option<&Config>, report: &mut Report) {
    let ids = tokenizer.vocabulary_size();
    if let Some(rows) = config.map(|config| config.vocab_size).filter(|rows| ids as i64 > *rows) {
        let finding = format!("{ids} ids, but the model has {rows}: they do not belong together");
        report.bad("tokenizer", &finding);
    }
    let ends: Vec<String> = tokenizer.end_of_turn_ids().iter().map(|id| tokenizer.decode(&[*id])).collect();
    let finding =
        format!("{ids} ids, {} control tokens; a turn ends with {}", tokenizer.control_ids().len(), ends.join(" or "));
    if ends.is_empty() {
        let finding = format!("{ids} ids, none of which ends a turn: set eos_token in tokenizer_config.json");
        report.bad("tokenizer", &finding);
    } else {
        report.good("tokenizer", &finding);
    }

    let again = tokenizer.decode(&tokenizer.encode_untrusted(HARD_TEXT));
    if again != HARD_TEXT {
        report.note("tokenizer", &format!("{HARD_TEXT:?} comes back as {again:?}: it normalises text"));
    }
    let pasted: String = tokenizer.control_ids().iter().map(|id| tokenizer.decode(&[*id])).collect();
    if tokenizer.encode_untrusted(&pasted).iter().any(|id| tokenizer.is_control(*id)) {
        report.bad("tokenizer", "control tokens pasted into a document stay control tokens: do not use it");
    }
}

/// The prompt of a first step. Says how a second one would be laid out.
fn examine_template(builder: &PromptBuilder, report: &mut Report) -> Option<Vec<i32>> {
    let prompt = report.value("template", builder.prompt(QUESTION, &Carried::default()))?;
    let call = r#"{"name": "search", "arguments": {"query": "France"}}"#;
    let text = format!("<mem>France</mem><think>search</think><tool_call>\n{call}\n</tool_call>");
    let mut completion_ids = builder.completion_ids_from_text(&text);
    let observation_ids = builder.observation_ids("France: its capital is Paris.", None);
    let carried = CarriedStep::new(&completion_ids, Some(&observation_ids));
    let second = report.value("template", builder.prompt(QUESTION, &vec![carried].into()))?;
    report.good("template", &format!("a first prompt is {} tokens, a second {}", prompt.len(), second.len()));

    completion_ids.extend(builder.end_of_turn_id());
    let history = [prompt.as_slice(), &completion_ids].concat();
    if let Some(place) = first_difference(&second, &history) {
        let name = |ids: &[i32]| ids.get(place).map_or(String::new(), |id| builder.tokenizer().decode(&[*id]));
        let (found, expected) = (name(&second), name(&history));
        let finding = format!(
            "a later prompt does not begin with what was there before (token {place} is {found:?}, was {expected:?}): \
             nothing is lost, but prefix caches save less"
        );
        report.note("template", &finding);
    }
    Some(prompt)
}

/// The first place where `whole` does not go on as `prefix` does.
fn first_difference(whole: &[i32], prefix: &[i32]) -> Option<usize> {
    (0..prefix.len()).find(|place| whole.get(*place) != Some(&prefix[*place]))
}

/// The ids of `<answer>` and of the answer after it, as demonstrations train them and as scoring asks for them.
fn examine_boundary(builder: &PromptBuilder, answer: &str, report: &mut Report) -> (Vec<i32>, Vec<i32>) {
    let (opening, ids) = (builder.answer_opening_ids(), builder.answer_ids(&[answer]).ids);
    let trained = builder.completion_ids_from_text(&format!("<answer>{}</answer>", answer.trim()));
    let spell = |ids: &[i32]| {
        let tokens: Vec<String> = ids.iter().map(|id| format!("{:?}", builder.tokenizer().decode(&[*id]))).collect();
        tokens.join(" ")
    };
    let finding = format!("{} | {}", spell(&opening), spell(&ids));
    if trained.starts_with(&[opening.as_slice(), &ids].concat()) {
        report.good("answer", &finding);
    } else {
        let trained = spell(&trained);
        report.bad(
            "answer",
            &format!("{finding} is scored, but demonstrations train {trained}: choose another answer text"),
        );
    }
    (opening, ids)
}
