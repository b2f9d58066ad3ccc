//! Times generation and scoring with a fresh model of about two million parameters, as the demo uses them:
//! `model_throughput [f32|bf16] [KV_HEADS] [THREADS]`.

use std::io::{StdoutLock, Write};
use std::time::Instant;

use mempo_model::{
    Config, DeviceOptions, GenerateOptions, GenerateRequest, Model, ScoreOptions, ScoredSequence, counter_hash,
    generate,
};

const ROWS: u64 = 256;
const PROMPTS: u64 = 16;
const PROMPT_TOKENS: usize = 150;
const NEW_TOKENS: usize = 64;

fn main() -> anyhow::Result<()> {
    let argument = |place, default: &str| std::env::args().nth(place).unwrap_or_else(|| default.to_owned());
    let threads = std::env::args().nth(3).map(|threads| threads.parse()).transpose()?;
    let dtype = argument(1, "f32");
    let runtime = DeviceOptions { dtype, threads, ..DeviceOptions::default() }.resolve()?;
    let config: Config = serde_json::from_value(serde_json::json!({
        "model_type": "qwen2", "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": argument(2, "2").parse::<u64>()?,
        "max_position_embeddings": 2048, "tie_word_embeddings": true,
    }))?;
    let model = Model::initialise(config, 1, &runtime)?;
    let parameters: usize = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{parameters} parameters, {runtime:?}, {} threads", tch::get_num_threads())?;
    for (prompts, top_p) in [(PROMPTS, 1.0), (PROMPTS, 0.95), (ROWS, 1.0)] {
        time_generation(&model, prompts, top_p, &mut out)?;
    }
    for tokens_per_batch in [4096, 16_384] {
        time_scoring(&model, tokens_per_batch, &mut out)?;
    }
    Ok(())
}

fn ids(seed: u64, count: usize) -> Vec<i32> {
    (0..count as u64).map(|i| (counter_hash(seed, i) % 4096) as i32).collect()
}

fn time_generation(model: &Model, prompts: u64, top_p: f64, out: &mut StdoutLock) -> anyhow::Result<()> {
    let request = |row| GenerateRequest { prompt_ids: ids(row % prompts, PROMPT_TOKENS), seed: row };
    let requests: Vec<GenerateRequest> = (0..ROWS).map(request).collect();
    let options = GenerateOptions {
        temperature: 1.0,
        top_p,
        max_tokens: NEW_TOKENS,
        banned_ids: vec![0],
        end_ids: Vec::new(),
        vocabulary_limit: 4000,
    };
    let start = Instant::now();
    let generated = generate(model, &requests, &options, &mut |_, _| false)?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = generated.iter().map(|one| one.ids.len()).sum::<usize>();
    let rate = tokens as f64 / seconds;
    writeln!(
        out,
        "generate: {ROWS} rows, {prompts} prompts of {PROMPT_TOKENS}, top_p {top_p}: \
        {tokens} new tokens in {seconds:.2} s, {rate:.0} a second",
    )?;
    Ok(())
}

fn time_scoring(model: &Model, tokens_per_batch: usize, out: &mut StdoutLock) -> anyhow::Result<()> {
    let length = PROMPT_TOKENS + NEW_TOKENS;
    let sequence = |row| ScoredSequence { ids: ids(row, length), targets: PROMPT_TOKENS..length };
    let sequences: Vec<ScoredSequence> = (0..ROWS).map(sequence).collect();
    let start = Instant::now();
    let options = ScoreOptions { temperature: 1.0, tokens_per_batch };
    model.completion_logprobs(&sequences, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = ROWS as usize * length;
    let rate = tokens as f64 / seconds;
    writeln!(
        out,
        "score: {tokens} tokens, {NEW_TOKENS} of {length} scored, {tokens_per_batch} a batch: \
        {seconds:.2} s, {rate:.0} tokens a second",
    )?;
    Ok(())
}
