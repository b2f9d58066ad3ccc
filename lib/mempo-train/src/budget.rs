//! What training will need of a device's memory, computed before it starts.

use mempo_model::{Config, Runtime};

use crate::{OptimizerOptions, StateDtype};

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBudget {
    /// The model's own weights, where they are not the master weights themselves.
    pub weights: u64,
    /// fp32 master copies of what is trained.
    pub master: u64,
    /// Gradient of the running optimizer step.
    pub gradient: u64,
    /// Both moments.
    pub moments: u64,
    /// What a padded token of a micro-batch leaves behind for the backward pass, about.
    pub activations_per_token: u64,
    /// Tokens of the longest row, which a micro-batch holds whatever its budget.
    pub longest_row: usize,
}

impl MemoryBudget {
    /// Of training a model of this config on rows of at most so many tokens.
    pub fn new(config: &Config, runtime: &Runtime, options: &OptimizerOptions, longest_row: usize) -> Self {
        let parameters = config.parameter_count();
        let state = if options.optimizer_dtype == StateDtype::F32 { 4 } else { 2 };
        let width: u64 = if runtime.is_f32() { 4 } else { 2 };
        let adapters = options.lora.parameter_count(config);
        let trained = adapters.unwrap_or(parameters);
        let is_own_master = runtime.is_f32() && adapters.is_none();
        let weighed = runtime.kept_attention_weights(longest_row);
        Self {
            weights: if is_own_master { 0 } else { width * parameters },
            master: 4 * trained,
            gradient: state * trained,
            moments: 2 * state * trained,
            activations_per_token: kept_bytes(config, width, options.recompute, weighed),
            longest_row,
        }
    }

    /// What stays from step to step.
    pub fn resident(&self) -> u64 {
        self.weights + self.master + self.gradient + self.moments
    }

    /// All of it, with micro-batches of so many padded tokens, or of the longest row.
    pub fn total(&self, tokens: usize) -> u64 {
        self.resident() + self.activations_per_token * tokens.max(self.longest_row) as u64
    }

    /// One line for people.
    pub fn describe(&self, tokens: usize) -> String {
        let Self { weights, master, gradient, moments, activations_per_token, longest_row } = *self;
        let of = if longest_row > tokens { " (the longest row)" } else { "" };
        format!(
            "memory: weights {}, master {}, gradient {}, moments {}; about {} a token, so {} with micro-batches of {} tokens{of}",
            size(weights),
            size(master),
            size(gradient),
            size(moments),
            size(activations_per_token),
            size(self.total(tokens)),
            tokens.max(longest_row),
        )
    }
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["bytes", "KiB", "MiB", "GiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(3);
    format!("{:.1} {}", bytes as f64 / f64::from(1_u32 << (10 * unit)), UNITS[unit as usize])
}

/// Bytes a token leaves behind: in each layer both norms' inputs, in fp32, and in elements of `width` both norms' outputs, queries,
/// keys and values before and after they are turned, what attention gives (twice: by heads and joined), `weighed` of its weights
/// a head, and the four products of the MLP. With recomputation every layer's input, and one layer in full.
fn kept_bytes(config: &Config, width: u64, recompute: bool, weighed: usize) -> u64 {
    let queries = config.num_attention_heads * config.head_size();
    let keys = config.key_value_heads() * config.head_size();
    let input = 4 * config.hidden_size as u64;
    let products = 2 * config.hidden_size
        + (queries + 2 * keys)
        + (queries + keys)
        + 2 * queries
        + config.num_attention_heads * weighed as i64
        + 4 * config.intermediate_size;
    let (layers, layer) = (config.num_hidden_layers as u64, 2 * input + width * products as u64);
    if recompute { layers * input + layer } else { layers * layer }
}

#[cfg(test)]
mod tests {
    use mempo_model::DeviceOptions;

    use super::*;
    use crate::testing::optimizer_options;

    fn budget(dtype: &str, optimizer_dtype: StateDtype, longest_row: usize) -> MemoryBudget {
        let qwen2_5_7b: Config = serde_json::from_value(serde_json::json!({
            "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "max_position_embeddings": 32_768, "tie_word_embeddings": false,
        }))
        .unwrap();
        let device =
            DeviceOptions { device: "cpu".to_owned(), dtype: dtype.to_owned(), threads: Some(1), deterministic: false };
        let options = OptimizerOptions { optimizer_dtype, ..optimizer_options() };
        MemoryBudget::new(&qwen2_5_7b, &device.resolve().unwrap(), &options, longest_row)
    }

    /// The published parameter count is 7,615,616,512.
    #[test]
    fn qwen2_5_7b_fits_one_gpu_of_139_gib_with_bf16_moments() {
        const PARAMETERS: u64 = 7_615_616_512;
        const GPU: u64 = 139 << 30;
        let small = budget("bf16", StateDtype::Bf16, 0);
        assert_eq!((small.master, small.resident()), (4 * PARAMETERS, 12 * PARAMETERS));
        assert!(small.total(8192) < GPU, "{}", small.describe(8192));
        let exact = budget("bf16", StateDtype::F32, 0);
        assert_eq!(exact.resident(), 18 * PARAMETERS);
        assert!(exact.total(1024) < GPU && exact.total(8192) > GPU, "{}", exact.describe(8192));
        assert_eq!(budget("f32", StateDtype::F32, 0).resident(), 16 * PARAMETERS);
        assert!(exact.activations_per_token > 5 << 20, "{}", exact.describe(1));
        assert!(small.describe(8192).contains("weights 14.2 GiB, master 28.4 GiB"), "{}", small.describe(8192));
        assert_eq!([0, 1023, 1024, 3 << 19].map(size), ["0.0 bytes", "1023.0 bytes", "1.0 KiB", "1.5 MiB"]);
    }

    #[test]
    fn a_row_longer_than_the_micro_batch_counts_and_so_do_attention_weights_that_are_kept() {
        let long = budget("bf16", StateDtype::Bf16, 9000);
        assert_eq!(long.total(4096), long.total(9000));
        assert!(long.describe(4096).ends_with("9000 tokens (the longest row)"), "{}", long.describe(4096));
        assert!(!long.describe(9000).contains("longest"));
        // On a CPU 28 layers keep 28 heads' weights over the tokens of a row up to 512; the kernel for longer rows keeps none.
        let [none, short] = [0, 100].map(|longest| budget("bf16", StateDtype::Bf16, longest).activations_per_token);
        assert_eq!(short - none, 2 * 28 * 28 * 100);
        assert_eq!(long.activations_per_token - none, 2 * 28 * 28 * 512);
    }
}
