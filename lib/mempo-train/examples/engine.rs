//! Our side of `./just bench`, `./just bench-gpu` and `./just parity`: a process that does jobs and says what came out and how long each
//! took. `engine MODEL f32|bf16 [deterministic]` reads one job a line on standard input (see `tools/peers`) and answers each with a line of
//! JSON.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::anyhow;
use mempo_model::{
    Branch, DeviceOptions, GenerateOptions, GenerateRequest, Model, Runtime, ScoreOptions, ScoredSequence, Trunk,
    generate_each,
};
use mempo_train::{Beginning, LoraOptions, OptimizerOptions, Schedule, StateDtype, TrainSequence, Trainer};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Cuda, Device, Kind, Tensor};

const LEARNING_RATE: f64 = 1e-4;

fn tokens_per_micro_batch() -> usize {
    4096
}

#[derive(Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
enum Job {
    /// One completion of exactly `new` ids a prompt.
    Generate { prompts: Vec<Vec<i32>>, new: usize, greedy: bool },
    /// The answer after every prefix.
    Score { ids: Vec<i32>, prefixes: Vec<usize>, answer: Vec<i32> },
    /// Optimizer steps over the same sequences, and updates by themselves.
    Train {
        sequences: Vec<Vec<i32>>,
        steps: usize,
        #[serde(default = "tokens_per_micro_batch")]
        tokens_per_micro_batch: usize,
        /// bf16 moments and recomputed layers.
        #[serde(default)]
        small: bool,
    },
    /// One answer after each of many contexts, each for itself.
    Answers { sequences: Vec<Vec<i32>>, answer: usize, tokens_per_batch: usize },
    /// The last ids of many contexts that have much in common.
    Contexts { sequences: Vec<Vec<i32>>, answer: usize },
    /// What the machine can do.
    Limits,
    /// Which kernels attention runs on.
    Kernels,
    /// Logits of the whole vocabulary at some places of a sequence.
    Logits { ids: Vec<i32>, places: Vec<i64> },
    /// Mean loss of a sequence, and its gradient by every parameter in a safetensors file.
    Gradients { ids: Vec<i32>, file: PathBuf },
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, dtype, flags @ ..] = &arguments[..] else {
        anyhow::bail!("usage: engine MODEL f32|bf16 [deterministic]")
    };
    let deterministic = flags == ["deterministic"];
    let runtime = DeviceOptions { dtype: dtype.clone(), deterministic, ..DeviceOptions::default() }.resolve()?;
    let dir = Path::new(model);
    let model = Model::load(dir, &runtime)?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Job::Generate { prompts, new, greedy } => time_generation(&model, prompts, new, greedy)?,
            Job::Score { ids, prefixes, answer } => time_scoring(&model, ids, &prefixes, &answer)?,
            Job::Train { sequences, steps, tokens_per_micro_batch, small } => {
                time_training(dir, &runtime, sequences, steps, tokens_per_micro_batch, small)?
            }
            Job::Answers { sequences, answer, tokens_per_batch } => {
                time_answers(&model, sequences, answer, tokens_per_batch)?
            }
            Job::Contexts { sequences, answer } => time_contexts(&model, sequences, answer)?,
            Job::Limits => limits(&runtime),
            Job::Kernels => attention_kernels(&model),
            Job::Logits { ids, places } => logits(&model, &ids, &places)?,
            Job::Gradients { ids, file } => gradients(dir, &runtime, &ids, &file)?,
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn time_generation(model: &Model, prompts: Vec<Vec<i32>>, new: usize, greedy: bool) -> anyhow::Result<Value> {
    let request = |(seed, prompt_ids)| GenerateRequest { session: 0, prompt_ids, seed };
    let requests: Vec<GenerateRequest> = (0..).zip(prompts).map(request).collect();
    let options = GenerateOptions {
        temperature: if greedy { 0.0 } else { 1.0 },
        top_p: 1.0,
        max_tokens: new,
        banned_ids: Vec::new(),
        end_ids: Vec::new(),
        vocabulary_limit: model.config().vocab_size as usize,
        max_rows: requests.len(),
    };
    let start = Instant::now();
    let generated = generate_each(model, &requests, &options, &mut |_, _| false)?;
    let seconds = start.elapsed().as_secs_f64();
    let ids: Vec<Vec<i32>> = generated.into_iter().map(|one| one.ids).collect();
    Ok(json!({ "seconds": seconds, "ids": ids }))
}

fn time_scoring(model: &Model, ids: Vec<i32>, prefixes: &[usize], answer: &[i32]) -> anyhow::Result<Value> {
    let branch = |at: &usize| Branch { at: *at, ids: answer.to_vec(), targets: 0..answer.len() };
    let trunk = Trunk { ids, branches: prefixes.iter().map(branch).collect() };
    let start = Instant::now();
    let logprobs = model.branch_logprobs(&trunk, 1.0)?;
    Ok(json!({ "seconds": start.elapsed().as_secs_f64(), "logprobs": logprobs }))
}

fn scored(sequences: Vec<Vec<i32>>, answer: usize) -> Vec<ScoredSequence> {
    let scored = |ids: Vec<i32>| ScoredSequence { targets: ids.len() - answer..ids.len(), ids };
    sequences.into_iter().map(scored).collect()
}

fn time_contexts(model: &Model, sequences: Vec<Vec<i32>>, answer: usize) -> anyhow::Result<Value> {
    let asked: usize = sequences.iter().map(Vec::len).sum();
    let scored = scored(sequences, answer);
    let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 16_384 };
    let start = Instant::now();
    let (logprobs, computed) = model.shared_logprobs(&scored, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({ "seconds": seconds, "logprobs": logprobs, "asked": asked, "computed": computed }))
}

fn time_answers(
    model: &Model,
    sequences: Vec<Vec<i32>>,
    answer: usize,
    tokens_per_batch: usize,
) -> anyhow::Result<Value> {
    let scored = scored(sequences, answer);
    let options = ScoreOptions { temperature: 1.0, tokens_per_batch };
    let start = Instant::now();
    let logprobs = model.completion_logprobs(&scored, &options)?;
    Ok(json!({ "seconds": start.elapsed().as_secs_f64(), "logprobs": logprobs }))
}

fn time_training(
    dir: &Path,
    runtime: &Runtime,
    sequences: Vec<Vec<i32>>,
    steps: usize,
    tokens_per_micro_batch: usize,
    small: bool,
) -> anyhow::Result<Value> {
    let options = OptimizerOptions {
        learning_rate: LEARNING_RATE,
        warmup_ratio: 0.0,
        schedule: Schedule::Constant,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
        optimizer_dtype: if small { StateDtype::Bf16 } else { StateDtype::F32 },
        recompute: small,
        lora: LoraOptions::NONE,
    };
    let mut trainer =
        Trainer::new(Model::load(dir, runtime)?, &options, &Beginning { base: Path::new(""), seed: 0, state: None })?;
    let sequence = |ids: Vec<i32>| TrainSequence { targets: (0..ids.len()).map(|place| place > 0).collect(), ids };
    let sequences: Vec<TrainSequence> = sequences.into_iter().map(sequence).collect();
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let start = Instant::now();
        losses.push(trainer.sft_step(&sequences, LEARNING_RATE, tokens_per_micro_batch)?.loss);
        seconds.push(start.elapsed().as_secs_f64());
    }
    let best = seconds.iter().copied().reduce(f64::min).ok_or_else(|| anyhow!("no steps"))?;
    trainer.sft_step(&[], LEARNING_RATE, tokens_per_micro_batch)?;
    let update = best_seconds(runtime, || trainer.sft_step(&[], LEARNING_RATE, tokens_per_micro_batch));
    Ok(json!({ "seconds": best, "losses": losses, "update_seconds": update }))
}

/// Matrix products of a large and a small number of rows in FLOP/s, copying memory in bytes read and written a second.
fn limits(runtime: &Runtime) -> Value {
    let product = |rows: i64| {
        const SIZE: i64 = 2048;
        let of = |shape: [i64; 2]| Tensor::ones(shape, (runtime.kind, runtime.device));
        let (left, right) = (of([rows, SIZE]), of([SIZE, SIZE]));
        let work = 2.0 * rows as f64 * (SIZE * SIZE) as f64;
        work / best_seconds(runtime, || left.linear(&right, None::<Tensor>))
    };
    let source = Tensor::ones([1 << 28], (Kind::Uint8, runtime.device));
    let mut copy = source.zeros_like();
    let bytes = 2.0 * source.numel() as f64 / best_seconds(runtime, || copy.copy_(&source));
    json!({ "product_16384": product(16_384), "product_512": product(512), "product_16": product(16), "bytes": bytes })
}

/// By libtorch's own choice for the shapes that each use has: 0 written out, 1 flash, 2 memory-efficient, 3 cuDNN.
/// Training on a GPU in bf16 calls the flash kernel for sequences of any lengths by name.
fn attention_kernels(model: &Model) -> Value {
    let (config, runtime) = (model.config(), model.runtime());
    let (heads, groups, size) = (config.num_attention_heads, config.key_value_heads(), config.head_size());
    let of = |shape: [i64; 4]| Tensor::ones(shape, (runtime.kind, runtime.device));
    let choice = |q: &Tensor, k: &Tensor, mask: Option<&Tensor>| {
        let grouped = q.size()[1] != k.size()[1];
        let causal = mask.is_none();
        let name = Tensor::internal_fused_sdp_choice(q, k, k, mask, 0.0, causal, None, grouped);
        ["written out", "flash", "memory-efficient", "cuDNN"].get(name as usize).copied().unwrap_or("unknown")
    };
    let decode = of([16, groups, heads / groups, size]);
    let (columns, mask) = (of([16, groups, 1024, size]), of([16, 1, 1, 1024]));
    let chunk_mask = of([16, 1, 128, 1024]);
    let every_head = of([16, heads, 1024, size]);
    json!({
        "prompts": choice(&of([4, heads, 512, size]), &of([4, groups, 512, size]), None),
        "decode": choice(&decode, &columns, Some(&mask)),
        "chunk_on_cache": choice(&of([16, heads, 128, size]), &every_head, Some(&chunk_mask)),
    })
}

fn row(ids: &[i32], runtime: &Runtime) -> Tensor {
    Tensor::from_slice(ids).to_kind(Kind::Int64).unsqueeze(0).to_device(runtime.device)
}

fn logits(model: &Model, ids: &[i32], places: &[i64]) -> anyhow::Result<Value> {
    let _guard = tch::no_grad_guard();
    let hidden = model.hidden(&row(ids, model.runtime())).squeeze_dim(0);
    let hidden = hidden.index_select(0, &Tensor::from_slice(places).to_device(model.runtime().device));
    let logits = model.runtime().logits(&hidden, model.head_weight(), 1.0);
    let rows: Vec<Vec<f32>> = Vec::try_from(logits)?;
    Ok(json!({ "logits": rows }))
}

fn gradients(dir: &Path, runtime: &Runtime, ids: &[i32], file: &Path) -> anyhow::Result<Value> {
    let mut model = Model::load(dir, runtime)?;
    let leaf = |tensor: &Tensor| tensor.detach().copy().set_requires_grad(true);
    let leaves = model.parameters().iter().map(|(_, tensor)| leaf(tensor)).collect();
    model.bind_parameters(leaves);
    let (inputs, targets) = (row(&ids[..ids.len() - 1], runtime), row(&ids[1..], runtime).squeeze_dim(0));
    let logits = model.hidden(&inputs).squeeze_dim(0).linear(model.head_weight(), None::<Tensor>);
    let loss = logits.to_kind(Kind::Float).cross_entropy_for_logits(&targets);
    loss.backward();
    let gradients: Vec<(&str, Tensor)> =
        model.parameters().iter().map(|(name, tensor)| (name.as_str(), tensor.grad())).collect();
    Tensor::write_safetensors(&gradients, file)?;
    Ok(json!({ "loss": loss.double_value(&[]) }))
}

/// The shortest of some runs.
fn best_seconds<T>(runtime: &Runtime, mut run: impl FnMut() -> T) -> f64 {
    let finish = || {
        if let Device::Cuda(index) = runtime.device {
            Cuda::synchronize(index as i64);
        }
    };
    let time = |_| {
        finish();
        let start = Instant::now();
        run();
        finish();
        start.elapsed().as_secs_f64()
    };
    (0..7).map(time).fold(f64::INFINITY, f64::min)
}
