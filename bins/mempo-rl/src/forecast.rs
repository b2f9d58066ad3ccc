//! `mempo-rl forecast`: what an iteration will take of a GPU, its memory and the disk, before anything runs.
//!
//! Times follow from arithmetic and memory traffic, divided by the share of the machine's limit that is reached. Left out:
//! attention (a few percent at some thousand tokens), and what is saved where prompts begin alike.

use std::path::PathBuf;

use clap::Args;
use mempo_model::{Config, DeviceOptions};
use mempo_run::{ResultExt, print_table};
use mempo_train::{MemoryBudget, OptimizerOptions};

/// Say what an iteration of the loop will take: tokens, memory, disk, hours
///
/// A plan on paper: reads nothing but the model's config.json. The limits of the machine are those measured on an H200 unless
/// others are given.
#[derive(Debug, Args)]
pub(crate) struct ForecastArguments {
    /// Model directory; its config.json is enough
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Tasks an iteration
    #[arg(long, value_name = "N", default_value_t = 128.0, value_parser = positive)]
    tasks: f64,
    /// Trajectories a task
    #[arg(long, value_name = "N", default_value_t = 16.0, value_parser = positive)]
    group_size: f64,
    /// Steps of a trajectory, on average
    #[arg(long, value_name = "N", default_value_t = 6.0, value_parser = positive)]
    steps: f64,
    /// Tokens of a step's prompt, on average
    #[arg(long, value_name = "N", default_value_t = 1500.0, value_parser = positive)]
    prompt_tokens: f64,
    /// Tokens of a step's completion, on average
    #[arg(long, value_name = "N", default_value_t = 250.0, value_parser = positive)]
    completion_tokens: f64,
    /// Sessions that decode side by side
    #[arg(long, value_name = "N", default_value_t = 256.0, value_parser = positive)]
    concurrency: f64,
    /// Tokens run through the model at a time in training, padding included
    #[arg(long, value_name = "N", default_value_t = 16384)]
    tokens_per_micro_batch: usize,
    /// Iterations
    #[arg(long, value_name = "N", default_value_t = 100.0, value_parser = positive)]
    iterations: f64,
    /// Dense bf16 arithmetic of the device, in 10^12 operations a second
    #[arg(long, value_name = "TFLOPS", default_value_t = 790.0, value_parser = positive)]
    device_tflops: f64,
    /// Memory bandwidth of the device, in 10^9 bytes a second
    #[arg(long, value_name = "GB", default_value_t = 4300.0, value_parser = positive)]
    device_bandwidth: f64,
    /// Share of the machine's limits that is reached
    #[arg(long, value_name = "SHARE", default_value_t = 0.35, value_parser = positive)]
    achieved: f64,
    #[command(flatten)]
    optimizer: OptimizerOptions,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && number.is_finite());
    number.ok_or_else(|| "expected a number above 0".to_owned())
}

/// Tokens of an iteration.
struct Tokens {
    prompts: f64,
    completions: f64,
}

/// Prints the table.
pub(crate) fn run(arguments: &ForecastArguments) -> anyhow::Result<()> {
    arguments.optimizer.check().usage()?;
    let config = Config::load(&arguments.model).bad_input()?;
    arguments.optimizer.lora.check(&config).usage()?;
    let trajectories = arguments.tasks * arguments.group_size;
    let steps = trajectories * arguments.steps;
    let tokens = Tokens { prompts: steps * arguments.prompt_tokens, completions: steps * arguments.completion_tokens };
    let stages = seconds(arguments, &config, &tokens).map(|(stage, seconds)| (stage, seconds / arguments.achieved));
    let hours = |seconds: f64| format!("{:.2} h", seconds / 3600.0);
    let total: f64 = stages.iter().map(|(_, seconds)| seconds).sum();
    let millions = |tokens: f64| format!("{:.1} M", tokens / 1e6);
    let mut rows = vec![
        ("parameters", millions(config.parameter_count() as f64)),
        ("trajectories", format!("{trajectories:.0}")),
        ("prompt tokens", millions(tokens.prompts)),
        ("completion tokens", millions(tokens.completions)),
        ("memory in training", memory(arguments, &config)?),
        ("disk, newest checkpoint", gib(checkpoint_bytes(&config, &arguments.optimizer, true))),
        ("disk, one that `history --keep` keeps", gib(checkpoint_bytes(&config, &arguments.optimizer, false))),
        // Ids and log-probabilities of four bytes; text and observations, and what compression saves, not counted.
        ("disk, rollout and logprobs", gib(4.0 * tokens.prompts + 16.0 * tokens.completions)),
    ];
    rows.extend(stages.iter().map(|(stage, seconds)| (*stage, hours(*seconds))));
    rows.push(("an iteration", hours(total)));
    rows.push(("all iterations", hours(total * arguments.iterations)));
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(what, much)| vec![what.to_owned(), much]).collect();
    print_table(&["an iteration takes", "about"], &rows);
    Ok(())
}

/// At the limits of the machine, stage by stage.
fn seconds(arguments: &ForecastArguments, config: &Config, tokens: &Tokens) -> [(&'static str, f64); 4] {
    let (arithmetic, bandwidth) = (arguments.device_tflops * 1e12, arguments.device_bandwidth * 1e9);
    let (body, head) = product_parameters(config);
    // The head is run where a token is predicted.
    let forward = |tokens: f64, predicted: f64| 2.0 * (body * tokens + head * predicted) / arithmetic;
    let all = forward(tokens.prompts + tokens.completions, tokens.completions);
    // Every token that is decoded reads its keys and values, and its share of the weights, two bytes each.
    let context = arguments.prompt_tokens + arguments.completion_tokens / 2.0;
    let read = 2.0 * (body + head) / arguments.concurrency + key_value_bytes(config) * context;
    let decode = tokens.completions * (read / bandwidth).max(forward(1.0, 1.0));
    // A frozen weight needs no gradient; recomputing is another forward pass.
    let backward = if arguments.optimizer.lora.lora_rank.is_some() { 1.0 } else { 2.0 };
    let passes = 1.0 + backward + f64::from(u8::from(arguments.optimizer.recompute));
    [
        ("sample", forward(tokens.prompts, 0.0) + decode),
        ("segments (a prompt's length each)", forward(tokens.prompts, 0.0)),
        ("logprobs, with a reference", 2.0 * all),
        ("train", passes * all),
    ]
}

/// Parameters that every token is multiplied with, and those of the head.
fn product_parameters(config: &Config) -> (f64, f64) {
    let table = (config.vocab_size * config.hidden_size) as f64;
    let tables = if config.tie_word_embeddings { 1.0 } else { 2.0 };
    (config.parameter_count() as f64 - tables * table, table)
}

/// Of a token's keys and values in all layers, in bf16.
fn key_value_bytes(config: &Config) -> f64 {
    (4 * config.num_hidden_layers as i64 * config.key_value_heads() * config.head_size()) as f64
}

fn memory(arguments: &ForecastArguments, config: &Config) -> anyhow::Result<String> {
    let device =
        DeviceOptions { device: "cpu".to_owned(), dtype: "bf16".to_owned(), threads: None, deterministic: false };
    let budget = MemoryBudget::new(config, &device.resolve()?, &arguments.optimizer, 0);
    let tokens = arguments.tokens_per_micro_batch;
    Ok(format!("{}, with micro-batches of {tokens} tokens", gib(budget.total(tokens) as f64)))
}

/// Weights in bf16 and, with its trainer state, master copies and moments in fp32 of what is trained.
fn checkpoint_bytes(config: &Config, optimizer: &OptimizerOptions, with_state: bool) -> f64 {
    let parameters = config.parameter_count() as f64;
    let adapters = optimizer.lora.parameter_count(config).map(|count| count as f64);
    let state = 12.0 * adapters.unwrap_or(parameters);
    // Adapters are written once more by themselves, in fp32.
    2.0 * parameters + 4.0 * adapters.unwrap_or(0.0) + if with_state { state } else { 0.0 }
}

fn gib(bytes: f64) -> String {
    format!("{:.1} GiB", bytes / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;

    fn arguments(line: &str) -> ForecastArguments {
        let command = ForecastArguments::augment_args(clap::Command::new("forecast"));
        let words = std::iter::once("forecast").chain(line.split_whitespace());
        ForecastArguments::from_arg_matches(&command.get_matches_from(words)).unwrap()
    }

    fn qwen2_5_7b() -> Config {
        serde_json::from_value(serde_json::json!({
            "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "max_position_embeddings": 32_768, "tie_word_embeddings": false,
        }))
        .unwrap()
    }

    /// By hand: 6.5256 G parameters in the body's products, 0.5450 G in the head's, 57,344 bytes of keys and values a token.
    #[test]
    fn a_7b_iteration_is_what_arithmetic_says() {
        let (config, tokens) = (qwen2_5_7b(), Tokens { prompts: 10e6, completions: 1e6 });
        let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-3, "{found}, {expected}");
        let (body, head) = product_parameters(&config);
        close(body, 6.5256e9);
        close(head, 0.5450e9);
        close(key_value_bytes(&config), 57_344.0);
        let line = "--model m --concurrency 256 --prompt-tokens 1000 --completion-tokens 48";
        let found = seconds(&arguments(line), &config, &tokens).map(|(_, seconds)| seconds);
        // Decoding: 55.2 MB of weights and 58.7 MB of keys and values a token, 26.5 us; the products alone take 17.9.
        close(found[0], 165.21 + 26.50);
        close(found[1], 165.21);
        close(found[2], 2.0 * 183.11);
        close(found[3], 3.0 * 183.11);
        let found = seconds(&arguments(&format!("{line} --recompute --lora-rank 16")), &config, &tokens);
        close(found[3].1, 3.0 * 183.11);
        let full = checkpoint_bytes(&config, &arguments(line).optimizer, true);
        close(full, 14.0 * 7_615_616_512.0);
        let adapters = checkpoint_bytes(&config, &arguments(&format!("{line} --lora-rank 16")).optimizer, true);
        // 16 x (3584 + 3584, 3584 + 512 twice, 3584 + 3584, 3584 + 18944 three times) x 28 = 40.37 M.
        close(adapters, 2.0 * 7_615_616_512.0 + 16.0 * 40_370_176.0);
    }
}
