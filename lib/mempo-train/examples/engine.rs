//! Our side of `./just bench` and `./just parity`: a process that does jobs and says what came out and how long each
//! took. `engine MODEL f32|bf16` reads one job a line on standard input (see `tools/peers`) and answers each with a line of
//! JSON.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::anyhow;
use mempo_model::{Branch, DeviceOptions, GenerateOptions, GenerateRequest, Model, Runtime, Trunk, generate_each};
use mempo_train::{OptimizerOptions, Schedule, StateDtype, TrainSequence, Trainer};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

const LEARNING_RATE: f64 = 1e-4;
const TOKENS_PER_MICRO_BATCH: usize = 4096;

#[derive(Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
enum Job {
    /// One completion of exactly `new` ids a prompt.
    Generate { prompts: Vec<Vec<i32>>, new: usize, greedy: bool },
    /// The answer after every prefix.
    Score { ids: Vec<i32>, prefixes: Vec<usize>, answer: Vec<i32> },
    /// Optimizer steps over the same sequences.
    Train { sequences: Vec<Vec<i32>>, steps: usize },
    /// What the machine can do.
    Limits,
    /// Logits of the whole vocabulary at some places of a sequence.
    Logits { ids: Vec<i32>, places: Vec<i64> },
    /// Mean loss of a sequence, and its gradient by every parameter in a safetensors file.
    Gradients { ids: Vec<i32>, file: PathBuf },
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, dtype] = &arguments[..] else { anyhow::bail!("usage: engine MODEL f32|bf16") };
    let runtime = DeviceOptions { dtype: dtype.clone(), ..DeviceOptions::default() }.resolve()?;
    let dir = Path::new(model);
    let model = Model::load(dir, &runtime)?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Job::Generate { prompts, new, greedy } => time_generation(&model, prompts, new, greedy)?,
            Job::Score { ids, prefixes, answer } => time_scoring(&model, ids, &prefixes, &answer)?,
            Job::Train { sequences, steps } => time_training(dir, &runtime, sequences, steps)?,
            Job::Limits => limits(&runtime),
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

fn time_training(dir: &Path, runtime: &Runtime, sequences: Vec<Vec<i32>>, steps: usize) -> anyhow::Result<Value> {
    let options = OptimizerOptions {
        learning_rate: LEARNING_RATE,
        warmup_ratio: 0.0,
        schedule: Schedule::Constant,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
        optimizer_dtype: StateDtype::F32,
        recompute: false,
    };
    let mut trainer = Trainer::new(Model::load(dir, runtime)?, &options, None)?;
    let sequence = |ids: Vec<i32>| TrainSequence { targets: (0..ids.len()).map(|place| place > 0).collect(), ids };
    let sequences: Vec<TrainSequence> = sequences.into_iter().map(sequence).collect();
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let start = Instant::now();
        losses.push(trainer.sft_step(&sequences, LEARNING_RATE, TOKENS_PER_MICRO_BATCH)?.loss);
        seconds.push(start.elapsed().as_secs_f64());
    }
    let best = seconds.iter().copied().reduce(f64::min).ok_or_else(|| anyhow!("no steps"))?;
    Ok(json!({ "seconds": best, "losses": losses }))
}

/// Matrix products of a large and a small number of rows in FLOP/s, copying memory in bytes read and written a second.
fn limits(runtime: &Runtime) -> Value {
    let product = |rows: i64| {
        const SIZE: i64 = 2048;
        let of = |shape: [i64; 2]| Tensor::ones(shape, (runtime.kind, runtime.device));
        let (left, right) = (of([rows, SIZE]), of([SIZE, SIZE]));
        let work = 2.0 * rows as f64 * (SIZE * SIZE) as f64;
        work / best_seconds(|| left.linear(&right, None::<Tensor>))
    };
    let source = Tensor::ones([1 << 28], (Kind::Uint8, runtime.device));
    let mut copy = source.zeros_like();
    let bytes = 2.0 * source.numel() as f64 / best_seconds(|| copy.copy_(&source));
    json!({ "product_512": product(512), "product_16": product(16), "bytes": bytes })
}

fn row(ids: &[i32]) -> Tensor {
    Tensor::from_slice(ids).to_kind(Kind::Int64).unsqueeze(0)
}

fn logits(model: &Model, ids: &[i32], places: &[i64]) -> anyhow::Result<Value> {
    let _guard = tch::no_grad_guard();
    let hidden = model.hidden(&row(ids)).squeeze_dim(0).index_select(0, &Tensor::from_slice(places));
    let logits = hidden.linear(model.head_weight(), None::<Tensor>).to_kind(Kind::Float);
    let rows: Vec<Vec<f32>> = Vec::try_from(logits)?;
    Ok(json!({ "logits": rows }))
}

fn gradients(dir: &Path, runtime: &Runtime, ids: &[i32], file: &Path) -> anyhow::Result<Value> {
    let mut model = Model::load(dir, runtime)?;
    let leaf = |tensor: &Tensor| tensor.detach().copy().set_requires_grad(true);
    let leaves = model.parameters().iter().map(|(_, tensor)| leaf(tensor)).collect();
    model.bind_parameters(leaves);
    let (inputs, targets) = (row(&ids[..ids.len() - 1]), row(&ids[1..]).squeeze_dim(0));
    let logits = model.hidden(&inputs).squeeze_dim(0).linear(model.head_weight(), None::<Tensor>);
    let loss = logits.to_kind(Kind::Float).cross_entropy_for_logits(&targets);
    loss.backward();
    let gradients: Vec<(&str, Tensor)> =
        model.parameters().iter().map(|(name, tensor)| (name.as_str(), tensor.grad())).collect();
    Tensor::write_safetensors(&gradients, file)?;
    Ok(json!({ "loss": loss.double_value(&[]) }))
}

/// The shortest of some runs.
fn best_seconds<T>(mut run: impl FnMut() -> T) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..7).map(time).fold(f64::INFINITY, f64::min)
}
