//! A model's `config.json`: the keys that shape the computation, and the refusal of those that would change it in ways
//! that are not computed here.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;

/// A family of models, by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: no biases, a norm over each head's queries and keys.
    Qwen3,
    /// Llama and SmolLM2: no biases, no such norms.
    Llama,
}

/// Hugging Face's `config.json` of a model, key for key; keys not named here are kept in `other`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// Class names; only the family's `…ForCausalLM` is accepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub architectures: Vec<String>,
    /// `qwen2`, `qwen3` or `llama`.
    pub model_type: String,
    /// `V`, the rows of the embedding (may exceed the tokenizer's highest id).
    pub vocab_size: i64,
    /// `D`.
    pub hidden_size: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// `H`.
    pub num_attention_heads: i64,
    /// `K`; absent or null means `H`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<i64>,
    /// `d`; absent or null means `D / H`, for Qwen3 128.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<i64>,
    /// Must be `silu`.
    #[serde(default = "silu")]
    pub hidden_act: String,
    /// The model's window, in tokens.
    pub max_position_embeddings: usize,
    /// Standard deviation of fresh weights.
    #[serde(default = "initializer_range")]
    pub initializer_range: f64,
    /// Added to the mean square in every norm.
    #[serde(default = "rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies, as older files write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// The same and more, as newer files write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Map<String, Value>>,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Every other key, untouched.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn silu() -> String {
    "silu".to_owned()
}

fn initializer_range() -> f64 {
    0.02
}

fn rms_norm_eps() -> f64 {
    1e-6
}

/// Keys that do not change what is computed here.
const INERT: &[&str] = &[
    "_attn_implementation",
    "_name_or_path",
    "add_cross_attention",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sliding_window",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
];

/// Keys that pass only with these values (or null): with any other they change the computation.
const FIXED: &[(&str, &[&str])] = &[
    ("attention_bias", &["false"]),
    ("attention_dropout", &["0", "0.0"]),
    ("mlp_bias", &["false"]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("quantization_config", &[]),
    ("rope_interleaved", &["false"]),
    ("use_mrope", &["false"]),
];

/// Sizes that no model has: what asks for more is damaged, or wants memory that is not there.
const LARGEST_VOCABULARY: i64 = 1 << 24;
const LARGEST_SIZE: i64 = 1 << 20;
const LARGEST_DEPTH: usize = 1 << 12;
const LARGEST_SPREAD: f64 = 100.0;

impl Config {
    /// Reads and checks `DIR/config.json`.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        Self::read(&dir.join("config.json"))
    }

    /// Reads and checks a config file of any name.
    pub fn read(path: &Path) -> Result<Self, Error> {
        Self::checked(serde_json::from_str(&fs_err::read_to_string(path)?), path)
    }

    /// Checks the content of a config file that was read from `path`.
    pub fn from_value(value: Value, path: &Path) -> Result<Self, Error> {
        Self::checked(serde_json::from_value(value), path)
    }

    fn checked(config: Result<Self, serde_json::Error>, path: &Path) -> Result<Self, Error> {
        let problem = |problem| Error::Config { path: path.to_owned(), problem };
        let config = config.map_err(|error| problem(format!("not a model's config: {error}")))?;
        config.check().map_err(problem)?;
        Ok(config)
    }

    /// Writes `DIR/config.json`.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::from)?;
        Ok(fs_err::write(dir.join("config.json"), text + "\n")?)
    }

    /// The family, by `model_type`.
    pub fn family(&self) -> Option<Family> {
        match self.model_type.as_str() {
            "qwen2" => Some(Family::Qwen2),
            "qwen3" => Some(Family::Qwen3),
            "llama" => Some(Family::Llama),
            _ => None,
        }
    }

    /// Whether queries and keys have biases.
    pub fn has_attention_biases(&self) -> bool {
        self.family() == Some(Family::Qwen2)
    }

    /// `K`.
    pub fn key_value_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// `d`.
    pub fn head_size(&self) -> i64 {
        let default =
            if self.family() == Some(Family::Qwen3) { 128 } else { self.hidden_size / self.num_attention_heads };
        self.head_dim.unwrap_or(default)
    }

    /// Base of the rotary frequencies, from whichever key holds it; 10000 where neither does.
    pub fn rotary_base(&self) -> f64 {
        self.nested_rotary_base().map(|(_, base)| base).or(self.rope_theta).unwrap_or(10_000.0)
    }

    /// The base inside `rope_parameters` or `rope_scaling`, with the key that holds it.
    fn nested_rotary_base(&self) -> Option<(&'static str, f64)> {
        let base = |rope: &Map<String, Value>| rope.get("rope_theta").and_then(Value::as_f64);
        let scaling = || self.other.get("rope_scaling").and_then(Value::as_object).and_then(base);
        let parameters = self.rope_parameters.as_ref().and_then(base);
        parameters.map(|base| ("rope_parameters", base)).or_else(|| scaling().map(|base| ("rope_scaling", base)))
    }

    /// Keys that are unknown here and were ignored, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let known = |key: &str| {
            INERT.contains(&key)
                || FIXED.iter().any(|(fixed, _)| *fixed == key)
                || ["rope_scaling", "use_sliding_window", "layer_types"].contains(&key)
        };
        let unknown = self.other.iter().filter(|(key, _)| !known(key));
        unknown.map(|(key, value)| format!("config key `{key}` ({value}) is unknown and was ignored")).collect()
    }

    /// Refuses, by key, whatever is not computed here.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Some(family) = self.family() else {
            let found = &self.model_type;
            return Err(format!("model_type `{found}` is not supported; expected `qwen2`, `qwen3` or `llama`"));
        };
        let class = match family {
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Llama => "LlamaForCausalLM",
        };
        if let Some(found) = self.architectures.iter().find(|name| *name != class) {
            return Err(format!(
                "architectures names `{found}`; for model_type `{}` only `{class}` is supported",
                self.model_type
            ));
        }
        if self.hidden_act != "silu" {
            return Err(format!("hidden_act `{}` is not supported; expected `silu`", self.hidden_act));
        }
        for (key, allowed) in FIXED {
            let value = self.other.get(*key).filter(|value| !value.is_null()).map(Value::to_string);
            if let Some(value) = value.filter(|value| !allowed.contains(&value.as_str())) {
                let expected = allowed.first().unwrap_or(&"no such key");
                return Err(format!("{key} = {value} is not supported; expected {expected}"));
            }
        }
        self.check_shapes()?;
        self.check_rotary()?;
        self.check_sliding_window()
    }

    fn check_shapes(&self) -> Result<(), String> {
        let (heads, groups) = (self.num_attention_heads, self.key_value_heads());
        let sizes = [self.vocab_size, self.hidden_size, self.intermediate_size, heads, groups];
        if sizes.iter().any(|size| *size < 1) || self.num_hidden_layers < 1 || self.max_position_embeddings < 1 {
            return Err("vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, \
                num_key_value_heads and max_position_embeddings must all be at least 1"
                .to_owned());
        }
        let largest = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", groups),
            ("head_dim", self.head_size()),
            ("num_attention_heads * head_dim", heads.saturating_mul(self.head_size())),
        ];
        if let Some((key, size)) = largest.into_iter().find(|(_, size)| *size > LARGEST_SIZE) {
            return Err(format!("{key} = {size}; expected at most {LARGEST_SIZE}"));
        }
        if self.vocab_size > LARGEST_VOCABULARY {
            return Err(format!("vocab_size = {}; expected at most {LARGEST_VOCABULARY}", self.vocab_size));
        }
        if self.num_hidden_layers > LARGEST_DEPTH {
            return Err(format!("num_hidden_layers = {}; expected at most {LARGEST_DEPTH}", self.num_hidden_layers));
        }
        if heads % groups != 0 {
            return Err(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"));
        }
        if self.head_dim.is_none() && self.family() != Some(Family::Qwen3) && self.hidden_size % heads != 0 {
            return Err(format!("hidden_size {} is not a multiple of num_attention_heads {heads}", self.hidden_size));
        }
        match self.head_size() {
            size if size >= 2 && size % 2 == 0 => Ok(()),
            size => Err(format!("head_dim {size} is odd; rotary positions need an even one")),
        }
    }

    fn check_rotary(&self) -> Result<(), String> {
        self.rotary_scaling()?;
        if self.rms_norm_eps < 0.0 || self.rotary_base() <= 0.0 {
            return Err("rms_norm_eps must be at least 0, rope_theta above 0".to_owned());
        }
        if !(0.0..=LARGEST_SPREAD).contains(&self.initializer_range) {
            return Err(format!("initializer_range = {}; expected 0 to {LARGEST_SPREAD}", self.initializer_range));
        }
        match (self.nested_rotary_base(), self.rope_theta) {
            (Some((key, nested)), Some(top)) if nested.to_bits() != top.to_bits() => {
                Err(format!("{key}.rope_theta {nested} contradicts rope_theta {top}"))
            }
            _ => Ok(()),
        }
    }

    /// A sliding window counts as in use where a layer would have one.
    fn check_sliding_window(&self) -> Result<(), String> {
        if let Some(Value::Array(types)) = self.other.get("layer_types") {
            if let Some(found) = types.iter().find(|kind| *kind != "full_attention") {
                return Err(format!("layer_types holds {found}; only \"full_attention\" is supported"));
            }
            return Ok(());
        }
        let flag = |key: &str| self.other.get(key).filter(|value| !value.is_null());
        // A size that is left out is 4,096 to transformers; only null is none.
        let window = self.other.get("sliding_window").is_none_or(|value| !value.is_null());
        let used = flag("use_sliding_window").is_some_and(|value| value != false) && window;
        let first = flag("max_window_layers").and_then(Value::as_u64).unwrap_or(0);
        if used && first < self.num_hidden_layers as u64 {
            return Err(format!("use_sliding_window is true from layer {first} on; sliding windows are not supported"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(change: &Value) -> Result<Config, String> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
            "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "rope_theta": 5000, "rope_scaling": null, "torch_dtype": "bfloat16",
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let config: Config = serde_json::from_value(config).map_err(|error| error.to_string())?;
        config.check().map(|()| config)
    }

    #[test]
    fn keys_that_change_the_computation_are_refused_by_name() {
        for (change, name) in [
            (json!({"model_type": "mistral"}), "mistral"),
            (json!({"architectures": ["LlamaForSequenceClassification"]}), "LlamaForSequenceClassification"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"attention_dropout": 0.1}), "attention_dropout"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "rope_scaling.low_freq_factor"),
            (
                json!({"rope_scaling": {"rope_type": "default", "attention_factor": 2.0}}),
                "rope_scaling.attention_factor",
            ),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.type"),
            (json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000}}), "rope_parameters.rope_type"),
            (json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}), "contradicts"),
            (json!({"use_sliding_window": true, "sliding_window": 4096, "max_window_layers": 1}), "use_sliding_window"),
            (json!({"use_sliding_window": true, "max_window_layers": 1}), "use_sliding_window"),
            (
                json!({"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}),
                "rope_scaling.rope_theta 1000000 contra",
            ),
            (json!({"num_attention_heads": 1 << 20, "head_dim": 1 << 20}), "num_attention_heads * head_dim"),
            (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"head_dim": 5}), "head_dim"),
        ] {
            let error = check(&change).unwrap_err();
            assert!(error.contains(name), "{change}: {error}");
        }
    }

    #[test]
    fn inert_keys_pass_and_unknown_ones_are_told() {
        let config = check(&json!({
            "use_cache": true, "attention_bias": false, "eos_token_id": [1, 2], "use_sliding_window": false,
            "sliding_window": 4096, "max_window_layers": 2, "pretraining_tp": 1, "attention_dropout": 0.0,
        }));
        assert_eq!(config.unwrap().warnings(), Vec::<String>::new());
        let warnings = check(&json!({"residual_multiplier": 0.5})).unwrap().warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("residual_multiplier"), "{warnings:?}");
    }

    #[test]
    fn rotary_base_is_read_from_either_place() {
        assert!((check(&json!({})).unwrap().rotary_base() - 5000.0).abs() < f64::EPSILON);
        let nested = json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
        assert!((check(&nested).unwrap().rotary_base() - 1e6).abs() < f64::EPSILON);
        let scaling = json!({"rope_theta": null, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}});
        assert!((check(&scaling).unwrap().rotary_base() - 1e6).abs() < f64::EPSILON);
        assert!((check(&json!({"rope_theta": null})).unwrap().rotary_base() - 1e4).abs() < f64::EPSILON);
    }

    #[test]
    fn a_missing_key_is_named() {
        let error = serde_json::from_value::<Config>(json!({"model_type": "llama"})).unwrap_err().to_string();
        assert!(error.contains("vocab_size"), "{error}");
    }
}
