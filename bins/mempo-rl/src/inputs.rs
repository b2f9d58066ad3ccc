//! What `mempo-rl train` reads, checked to belong together before anything is computed.

use anyhow::anyhow;
use mempo_model::Config;
use mempo_run::{Input, ResultExt};
use mempo_train::{STATE_FILE, base_of};
use tracing::warn;

use crate::load::Source;
use crate::train::TrainArguments;

/// Everything read, checked to belong together.
pub(crate) struct Inputs {
    pub(crate) rollouts: Input,
    pub(crate) advantages: Input,
    pub(crate) logprobs: Option<Input>,
    pub(crate) model: Input,
    /// The optimizer state that is carried on.
    pub(crate) trainer: Option<Input>,
    /// The model that it has adapters of.
    pub(crate) base: Option<Input>,
}

impl Inputs {
    pub(crate) fn open(arguments: &TrainArguments) -> anyhow::Result<Self> {
        let state = arguments.model.join("trainer").join(STATE_FILE);
        let carried = !arguments.fresh_optimizer && state.is_file();
        let base = if carried { base_of(&arguments.model.join("trainer")).bad_input()? } else { None };
        let logprobs = arguments.logprobs.as_deref();
        let inputs = Self {
            rollouts: Input::stage("rollouts", &arguments.rollouts)?,
            advantages: Input::stage("advantages", &arguments.advantages)?,
            logprobs: logprobs.map(|dir| Input::stage("logprobs", dir)).transpose()?,
            model: Input::model("model", &arguments.model)?,
            // It holds the digests of the other files of the state.
            trainer: carried.then(|| Input::files("trainer", &[state])).transpose()?,
            base: base.map(|dir| Input::model("base", &dir)).transpose()?,
        };
        inputs.check(arguments)?;
        arguments.optimizer.lora.check(&Config::load(&arguments.model).bad_input()?).usage()?;
        Ok(inputs)
    }

    pub(crate) fn list(&self) -> Vec<&Input> {
        let required = [&self.rollouts, &self.advantages, &self.model];
        required.into_iter().chain(&self.logprobs).chain(&self.trainer).chain(&self.base).collect()
    }

    /// Refuses tables made from other rollouts; and, unless asked for, rollouts of another checkpoint or of a cut
    /// distribution, whose log-probabilities are not those that were sampled from.
    fn check(&self, arguments: &TrainArguments) -> anyhow::Result<()> {
        self.advantages.check_made_from("rollouts", &self.rollouts, "mempo-score advantages")?;
        if let Some(logprobs) = &self.logprobs {
            logprobs.check_made_from("rollouts", &self.rollouts, "mempo-score logprobs")?;
        }
        let (rollouts, model) = (self.rollouts.dir().display(), self.model.dir().display());
        let removed = self.model.manifest().and_then(|manifest| manifest.removed(|path| path.starts_with("trainer/")));
        if let (Some(file), Some(_), true) = (removed, &self.trainer, arguments.stage.has_work()) {
            return Err(anyhow!(
                "{model}: {file} was removed to free disk; give --fresh-optimizer, or another checkpoint"
            ))
            .usage();
        }
        if !arguments.off_policy && self.rollouts.made_from("model").is_some_and(|digest| digest != self.model.digest())
        {
            return Err(anyhow!(
                "{rollouts}: sampled from another checkpoint than {model}; give that one, or --off-policy (best with \
                 --logprobs of {model} and --importance-cap 2)"
            ))
            .bad_input();
        }
        let top_p = self.rollouts.manifest().and_then(|manifest| manifest.arguments.get("top_p")?.as_f64());
        if !arguments.allow_cut_sampling && top_p.is_some_and(|top_p| top_p < 1.0) {
            return Err(anyhow!(
                "{rollouts}: sampled with --top-p {}: the log-probabilities are those of the whole distribution, so ratios \
                 would be wrong; sample with --top-p 1, or give --allow-cut-sampling",
                top_p.unwrap_or_default(),
            ))
            .bad_input();
        }
        let scored_by = self.logprobs.as_ref().and_then(|input| Some((input, input.made_from("model")?)));
        if let Some((input, digest)) = scored_by
            && digest != self.model.digest()
        {
            let dir = input.dir().display();
            warn!("the log-probs in {dir} are those of another checkpoint than {model}: ratios will not start at 1");
        }
        Ok(())
    }

    /// Whether the reference policy is the model itself, so that the divergence from it starts at 0.
    pub(crate) fn is_own_reference(&self) -> bool {
        let reference = self.logprobs.as_ref().and_then(|input| input.made_from("reference"));
        reference == Some(self.model.digest())
    }

    pub(crate) fn source(&self, arguments: &TrainArguments) -> anyhow::Result<Source> {
        let config = Config::load(&arguments.model).bad_input()?;
        let vocabulary_size = config.vocab_size as i32;
        let source = Source::new(&self.rollouts, &self.advantages, self.logprobs.as_ref(), vocabulary_size)?;
        let coefficient = arguments.policy.kl_coefficient;
        if coefficient > 0.0 && !source.has_reference()? {
            return Err(anyhow!(
                "--kl-coefficient {coefficient} needs reference log-probs: run `mempo-score logprobs --rollouts {} \
                 --model {} --reference DIR --out LOGPROBS` and give --logprobs LOGPROBS, or leave the term out with \
                 --kl-coefficient 0",
                arguments.rollouts.display(),
                arguments.model.display(),
            ))
            .usage();
        }
        Ok(source)
    }
}

/// Temperature of log-probs: what was sampled greedily is scored at 1.
pub(crate) fn temperature(rollouts: &Input) -> anyhow::Result<f64> {
    let recorded = rollouts.manifest().and_then(|manifest| manifest.arguments.get("temperature")?.as_f64());
    let temperature = recorded
        .ok_or_else(|| anyhow!("{}: its manifest records no temperature; is it a rollout?", rollouts.dir().display()))
        .bad_input()?;
    Ok(if temperature > 0.0 { temperature } else { 1.0 })
}
