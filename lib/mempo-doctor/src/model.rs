//! A model directory's config and weights.

use std::path::Path;

use mempo_model::{Config, Model, Runtime, ScoreOptions, ScoredSequence};

use crate::report::Report;

/// The config, if it can be computed here.
pub(crate) fn examine_config(dir: &Path, report: &mut Report) -> Option<Config> {
    let config = report.value("config", Config::load(dir))?;
    let finding = format!(
        "{}: {} layers of width {}, {} heads over {} key-value heads, vocabulary {}, window {}",
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.key_value_heads(),
        config.vocab_size,
        config.max_position_embeddings,
    );
    report.good("config", &finding);
    for warning in config.warnings() {
        report.note("config", &warning);
    }
    Some(config)
}

/// The weights: whether they are all there, and whether numbers come out.
pub(crate) fn examine_weights(
    dir: &Path,
    runtime: &Runtime,
    probe: Option<&ScoredSequence>,
    report: &mut Report,
) -> Option<()> {
    let model = report.value("weights", Model::load(dir, runtime))?;
    report.good("weights", &format!("{:.1} M parameters", model.config().parameter_count() as f64 / 1e6));
    let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 1 };
    let logprobs = report.value("forward", model.completion_logprobs(&[probe?.clone()], &options))?.concat();
    if logprobs.iter().all(|logprob| logprob.is_finite()) {
        let mean = logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>() / logprobs.len() as f64;
        report.good("forward", &format!("mean log-probability of the answer with no memory: {mean:.3}"));
    } else {
        let finding = format!("log-probabilities of the answer are {logprobs:?}: the weights hold NaN or infinities");
        report.bad("forward", &finding);
    }
    Some(())
}
