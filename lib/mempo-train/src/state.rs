//! Trainer state on disk: fp32 master weights, moments and counters, from which training continues bit for bit.
//!
//! A folder of three safetensors files (parameters under their Hugging Face names) and [`STATE_FILE`], which is
//! written last and holds the counters and the digest of each other file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use mempo_model::Model;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::Error;
use crate::adamw::AdamW;
use crate::flat::Layout;
use crate::lora::Adapters;
use crate::tensors::{read_tensors, write_tensors};

/// Name of the file that holds the counters and the digests of the others: its content stands for the whole state.
pub const STATE_FILE: &str = "state.json";
const MASTER_FILE: &str = "master.safetensors";
const FORMAT: u32 = 1;

/// Steps taken, over all stages that handed the state on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Counters {
    /// Optimizer steps, left-out ones included.
    pub(crate) global_step: u64,
    /// Steps left out because the gradient was not finite.
    pub(crate) skipped_steps: u64,
    /// Those of them since the last good one.
    pub(crate) consecutive_skipped: u64,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    #[serde(flatten)]
    counters: Counters,
    updates: u64,
    /// If the parameters are those of adapters, which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adapters: Option<Adapters>,
    sha256: BTreeMap<String, String>,
}

fn buffers(optimizer: &AdamW) -> [(&'static str, &Tensor); 3] {
    [
        (MASTER_FILE, &optimizer.master),
        ("first_moment.safetensors", &optimizer.first_moment),
        ("second_moment.safetensors", &optimizer.second_moment),
    ]
}

/// Writes the state into `dir`, which is made if need be; refuses weights that are not finite.
pub(crate) fn save(
    dir: &Path,
    layout: &Layout,
    optimizer: &AdamW,
    counters: Counters,
    adapters: Option<&Adapters>,
) -> Result<(), Error> {
    if !optimizer.is_finite() {
        return Err(Error::Weights { global_step: counters.global_step });
    }
    fs_err::create_dir_all(dir)?;
    let mut sha256 = BTreeMap::new();
    for (name, flat) in buffers(optimizer) {
        let tensors: Vec<(&str, Tensor)> =
            layout.slots.iter().map(|slot| (slot.name.as_str(), slot.view(flat))).collect();
        sha256.insert(name.to_owned(), write_tensors(&dir.join(name), &tensors)?);
    }
    let adapters = adapters.cloned();
    let state = StateFile { format: FORMAT, counters, updates: optimizer.updates, adapters, sha256 };
    let path = dir.join(STATE_FILE);
    let mut text = serde_json::to_vec_pretty(&state)
        .map_err(|error| Error::State { path: path.clone(), problem: error.to_string() })?;
    text.push(b'\n');
    fs_err::write(&path, text)?;
    fs_err::File::open(&path)?.sync_all()?;
    Ok(())
}

/// Reads the state in `dir`, of `adapters` or of all weights, into the buffers, checking names, shapes and digests.
pub(crate) fn load(
    dir: &Path,
    layout: &Layout,
    optimizer: &mut AdamW,
    adapters: Option<&Adapters>,
) -> Result<Counters, Error> {
    let state = read_state_file(dir)?;
    let problem = match (&state.adapters, adapters) {
        (None, None) => None,
        (Some(state), Some(asked)) => asked.difference(state),
        (None, Some(_)) => Some("all of the model's weights were trained; leave --lora-rank out".to_owned()),
        (Some(_), None) => Some("adapters were trained; give the same --lora-rank".to_owned()),
    };
    if let Some(problem) = problem {
        let advice = "or start with new optimizer state (mempo-rl train --fresh-optimizer)";
        return Err(Error::State { path: dir.join(STATE_FILE), problem: format!("{problem}, {advice}") });
    }
    for (name, flat) in buffers(optimizer) {
        let path = dir.join(name);
        let mut missing: BTreeSet<&str> = layout.slots.iter().map(|slot| slot.name.as_str()).collect();
        let digest = read_tensors(&path, &mut |name, tensor| {
            let slot = layout
                .slots
                .iter()
                .find(|slot| slot.name == name)
                .ok_or_else(|| format!("tensor {name} is not a parameter of the model"))?;
            if slot.shape != tensor.size() {
                return Err(format!("tensor {name} is {:?}, the model's is {:?}", tensor.size(), slot.shape));
            }
            slot.view(flat).copy_(&tensor);
            missing.remove(name);
            Ok(())
        })?;
        if let Some(name) = missing.first() {
            return Err(Error::State { path, problem: format!("tensor {name} is missing") });
        }
        check_digest(&path, &state, name, &digest)?;
    }
    optimizer.updates = state.updates;
    Ok(state.counters)
}

/// The adapters whose state this is, if it is one of adapters.
pub(crate) fn state_adapters(dir: &Path) -> Result<Option<Adapters>, Error> {
    Ok(read_state_file(dir)?.adapters)
}

/// Refuses a state in `dir` that was not saved together with the weights of `model`, as when the weights of a
/// checkpoint were replaced: training would go on from the state's. Compares in bf16, to which the weights may
/// have been rounded.
pub fn verify_state(model: &Model, dir: &Path) -> Result<(), Error> {
    let state = read_state_file(dir)?;
    let path = dir.join(MASTER_FILE);
    let digest = read_tensors(&path, &mut |name, tensor| {
        let weight = model.parameters().iter().find(|(other, _)| other == name).map(|(_, weight)| weight);
        let same = weight.is_some_and(|weight| {
            let weight = weight.detach().to_device(tch::Device::Cpu).to_kind(Kind::BFloat16);
            weight.size() == tensor.size() && weight.equal(&tensor.to_kind(Kind::BFloat16))
        });
        if same {
            return Ok(());
        }
        Err(format!(
            "tensor {name} is not the model's: this trainer state belongs to other weights. \
             Start with new optimizer state (mempo-rl train --fresh-optimizer) or restore the folder"
        ))
    })?;
    check_digest(&path, &state, MASTER_FILE, &digest)
}

fn read_state_file(dir: &Path) -> Result<StateFile, Error> {
    let path = dir.join(STATE_FILE);
    let text = fs_err::read(&path)?;
    let unusable = |problem: String| Error::State { path: path.clone(), problem };
    let state: StateFile =
        serde_json::from_slice(&text).map_err(|error| unusable(format!("not a trainer state: {error}")))?;
    if state.format != FORMAT {
        return Err(unusable(format!("format {}, this program reads format {FORMAT}", state.format)));
    }
    Ok(state)
}

fn check_digest(path: &Path, state: &StateFile, name: &str, digest: &str) -> Result<(), Error> {
    if state.sha256.get(name).is_some_and(|expected| expected == digest) {
        return Ok(());
    }
    let problem =
        format!("its SHA-256 is {digest}, not the one in {STATE_FILE} beside it: the file was changed or damaged");
    Err(Error::State { path: path.to_owned(), problem })
}
