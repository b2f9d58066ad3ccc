//! Whether a chat template shows a turn later as it was written.

use mempo_text::{CarriedStep, Error, PromptBuilder, Turns};

/// Prompts of two and three turns beside those of one fewer, each followed by what was written then. Where they differ, in
/// words with the first token that does.
///
/// Training stays right, since every prompt is rendered anew here as in rollouts; but the policy sees its own past otherwise
/// than it wrote it.
pub(crate) fn drift(builder: &PromptBuilder, end_of_turn: i32) -> Result<Option<String>, Error> {
    let completion_ids = builder.completion_ids_from_text("A completion.");
    let observation_ids = builder.observation_ids("A result.", None);
    let step = CarriedStep::new(&completion_ids, Some(&observation_ids));
    let closed: &[i32] = if builder.profile().turns == Turns::Separate { &[end_of_turn] } else { &[] };
    for turns in 0..2 {
        let before = builder.prompt("A question?", &vec![step.clone(); turns].into())?;
        let written = [&before[..], &completion_ids, closed].concat();
        let later = builder.prompt("A question?", &vec![step.clone(); turns + 1].into())?;
        let differs = |at: &usize| later.get(*at) != written.get(*at);
        if let Some(at) = (0..written.len()).find(differs) {
            let token = |ids: &[i32]| {
                ids.get(at).map_or("the end".to_owned(), |id| format!("{:?}", builder.tokenizer().decode(&[*id])))
            };
            return Ok(Some(format!(
                "the chat template shows turn {turns} (from 0) in a later prompt otherwise than it was written: token {at} is {}, \
                 was {}; steps are trained as they are sampled, but see their past changed",
                token(&later),
                token(&written)
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use mempo_text::{NewTokenizer, Profile, train_tokenizer};

    use super::*;

    #[test]
    fn a_template_that_rewrites_the_past_is_told_with_the_token() {
        let dir = tempfile::tempdir().unwrap();
        train_tokenizer(std::iter::once("a b".to_owned()), &NewTokenizer::of_size(259), dir.path()).unwrap();
        let found = |template: Option<&str>| {
            if let Some(template) = template {
                fs_err::write(dir.path().join("chat_template.jinja"), template).unwrap();
            }
            let drift_of = |profile| {
                let builder = PromptBuilder::load(dir.path(), Profile::load(profile).unwrap(), &[]).unwrap();
                drift(&builder, builder.end_of_turn_id().unwrap()).unwrap()
            };
            assert_eq!(drift_of("mem1"), None, "a turn that goes on is never rendered again");
            drift_of("mempo")
        };
        assert_eq!(found(None), None);
        let turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
        assert_eq!(
            found(Some(&format!("{turns}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"))),
            None
        );
        let told = found(Some(&format!("{turns}<|im_start|>assistant\n<think>\n"))).unwrap();
        assert!(told.contains("shows turn 0 (from 0)") && told.contains(r#"is "A", was "<""#), "{told}");
        let count = "{{ messages | length }}<|im_start|>assistant\n";
        let told = found(Some(&format!("{turns}{count}"))).unwrap();
        assert!(told.contains(r#"is "<|im_start|>", was "2""#), "{told}");
    }
}
