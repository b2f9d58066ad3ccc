//! Training of low-rank adapters instead of the weights (LoRA; Hu et al. 2021, arXiv 2106.09685).
//!
//! The adapters are what the optimizer sees: master copies, gradient and moments are theirs, the model's own weights stay
//! as they were loaded. A checkpoint has them merged into its weights, so that everything that reads models reads it;
//! beside it lies `adapter/` in PEFT's form, and the trainer state names the base that training goes on from.

use std::path::{Path, PathBuf};

use clap::Args;
use mempo_model::{Config, Model, Runtime};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::Tensor;

use crate::flat::Layout;
use crate::state::state_adapters;
use crate::tensors::write_tensors;
use crate::{Error, Trainer};

/// PEFT's files.
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before a parameter's name.
const PREFIX: &str = "base_model.model.";

/// Which adapters are trained, if any. Not written down where they are not asked for.
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
pub struct LoraOptions {
    /// Train low-rank adapters of this rank instead of all weights (LoRA): a fraction of the memory, learning rates about ten
    /// times larger. The checkpoint has them merged; beside it lies `adapter/` in PEFT's form
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(i64).range(1..))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<i64>,
    /// The adapters' product counts this much over their rank [default: twice the rank]
    #[arg(long, value_name = "ALPHA", requires = "lora_rank")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Linear layers that get adapters [default: all but the head]
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "lora_rank")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora_targets: Vec<String>,
}

impl LoraOptions {
    /// Train all weights.
    pub const NONE: Self = Self { lora_rank: None, lora_alpha: None, lora_targets: Vec::new() };

    /// Refuses values that make no sense for a model of this config.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        let Some(adapters) = self.adapters(Path::new("")) else { return Ok(()) };
        if !(adapters.alpha > 0.0 && adapters.alpha.is_finite()) {
            let expected = "must be a number above 0";
            return Err(Error::Option { option: "lora-alpha", value: adapters.alpha, expected });
        }
        let is_none = |target: &&String| config.adapter_parameter_count(1, std::slice::from_ref(*target)) == 0;
        adapters.targets.iter().find(is_none).map_or(Ok(()), |target| Err(Error::Adapters { target: target.clone() }))
    }

    /// The adapters that are asked for, of the model at `base`.
    pub(crate) fn adapters(&self, base: &Path) -> Option<Adapters> {
        const ALL: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        let rank = self.lora_rank?;
        let targets =
            if self.lora_targets.is_empty() { ALL.map(str::to_owned).to_vec() } else { self.lora_targets.clone() };
        let alpha = self.lora_alpha.unwrap_or(2.0 * rank as f64);
        Some(Adapters { rank, alpha, targets, base: base.to_owned() })
    }

    /// Trained numbers beside a model of this config, if adapters are trained.
    pub fn parameter_count(&self, config: &Config) -> Option<u64> {
        let adapters = self.adapters(Path::new(""))?;
        Some(config.adapter_parameter_count(adapters.rank, &adapters.targets))
    }
}

/// Adapters in training, as the trainer state has them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Adapters {
    pub(crate) rank: i64,
    alpha: f64,
    pub(crate) targets: Vec<String>,
    /// Directory of the model they are adapters of.
    base: PathBuf,
}

impl Adapters {
    /// Why these are not those of a trainer state, if they aren't; the base may have moved.
    pub(crate) fn difference(&self, state: &Self) -> Option<String> {
        let same = Self { base: self.base.clone(), ..state.clone() } == *self;
        let Self { rank, alpha, targets, .. } = state;
        (!same).then(|| {
            let targets = targets.join(",");
            format!(
                "it was trained with --lora-rank {rank} --lora-alpha {alpha} --lora-targets {targets}; give the same"
            )
        })
    }

    /// What their product is multiplied by.
    pub(crate) fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Writes `dir` as PEFT reads it.
    pub(crate) fn save(&self, dir: &Path, layout: &Layout, master: &Tensor) -> Result<(), Error> {
        fs_err::create_dir_all(dir)?;
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": self.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        fs_err::write(dir.join(CONFIG), format!("{config:#}\n"))?;
        let names: Vec<String> = layout.slots.iter().map(|slot| format!("{PREFIX}{}", slot.name)).collect();
        let tensors = names.iter().zip(&layout.slots).map(|(name, slot)| (name.as_str(), slot.view(master)));
        write_tensors(&dir.join(WEIGHTS), &tensors.collect::<Vec<_>>()).map(drop)
    }
}

/// The model that the adapters of a trainer state are adapters of; none if the state is of all weights.
pub fn base_of(state: &Path) -> Result<Option<PathBuf>, Error> {
    Ok(state_adapters(state)?.map(|adapters| adapters.base))
}

/// Refuses adapters that do not make the weights at `checkpoint` of their base, as when one of the two was replaced.
pub fn verify_merged(trainer: &Trainer, checkpoint: &Path) -> Result<(), Error> {
    let saved = Model::load(checkpoint, &Runtime::cpu(trainer.model().runtime().kind))?;
    trainer.model().first_other_than(&saved).map_or(Ok(()), |name| {
        let problem = format!(
            "{name} is not what the adapters of its trainer state make of their base: one of them was replaced. Start with new \
             optimizer state (mempo-rl train --fresh-optimizer) or restore them"
        );
        Err(Error::State { path: checkpoint.to_owned(), problem })
    })
}
