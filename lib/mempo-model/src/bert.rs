//! BERT as E5, MiniLM and BGE use it (Devlin et al. 2019): its config, and its layers from ids to hidden states.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use crate::Error;
use crate::blocks::Projections;
use crate::builder::Builder;

/// Hugging Face's `config.json` of an encoder: the keys that shape the computation; the others are in `other`.
#[derive(Debug, Clone, Deserialize)]
pub struct EncoderConfig {
    /// Class names; only BERT's own are accepted.
    #[serde(default)]
    architectures: Vec<String>,
    model_type: String,
    /// `V`, the rows of the embedding.
    pub vocab_size: i64,
    /// `D`, the length of a vector.
    pub hidden_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    num_attention_heads: i64,
    intermediate_size: i64,
    #[serde(default = "gelu")]
    hidden_act: String,
    /// The model's window, in tokens.
    pub max_position_embeddings: usize,
    #[serde(default = "type_vocab_size")]
    type_vocab_size: i64,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
    #[serde(flatten)]
    other: Map<String, Value>,
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn type_vocab_size() -> i64 {
    2
}

fn layer_norm_eps() -> f64 {
    1e-12
}

/// Classes whose hidden states are those of `BertModel`; what stands above these is not needed.
const CLASSES: [&str; 3] = ["BertModel", "BertForMaskedLM", "BertForPreTraining"];

/// Keys that pass only with this value (or null): with any other they change the computation.
const FIXED: [(&str, &str); 3] =
    [("position_embedding_type", "\"absolute\""), ("is_decoder", "false"), ("add_cross_attention", "false")];

/// Sizes that no encoder has: what asks for more is damaged.
const LARGEST_SIZE: i64 = 1 << 20;
const LARGEST_VOCABULARY: i64 = 1 << 24;
const LARGEST_DEPTH: usize = 1 << 12;

impl EncoderConfig {
    /// Reads and checks `DIR/config.json`.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let problem = |problem| Error::Config { path: path.clone(), problem };
        let config: Result<Self, _> = serde_json::from_str(&fs_err::read_to_string(&path)?);
        let config = config.map_err(|error| problem(format!("not an encoder's config: {error}")))?;
        config.check().map_err(problem)?;
        Ok(config)
    }

    /// Refuses, by key, whatever is not computed here.
    fn check(&self) -> Result<(), String> {
        if self.model_type != "bert" {
            return Err(format!("model_type `{}` is not supported; expected `bert` of an encoder", self.model_type));
        }
        if let Some(found) = self.architectures.iter().find(|name| !CLASSES.contains(&name.as_str())) {
            return Err(format!("architectures names `{found}`; expected one of {}", CLASSES.join(", ")));
        }
        if self.hidden_act != "gelu" {
            return Err(format!("hidden_act `{}` is not supported; expected `gelu`", self.hidden_act));
        }
        for (key, expected) in FIXED {
            let value = self.other.get(key).filter(|value| !value.is_null()).map(Value::to_string);
            if let Some(value) = value.filter(|value| value != expected) {
                return Err(format!("{key} = {value} is not supported; expected {expected}"));
            }
        }
        if let Some(value) = self.other.get("quantization_config").filter(|value| !value.is_null()) {
            return Err(format!("quantization_config = {value} is not supported; expected no such key"));
        }
        self.check_shapes()
    }

    fn check_shapes(&self) -> Result<(), String> {
        let positions = i64::try_from(self.max_position_embeddings).unwrap_or(i64::MAX);
        let sizes = [
            ("vocab_size", self.vocab_size, LARGEST_VOCABULARY),
            ("hidden_size", self.hidden_size, LARGEST_SIZE),
            ("num_attention_heads", self.num_attention_heads, LARGEST_SIZE),
            ("intermediate_size", self.intermediate_size, LARGEST_SIZE),
            ("max_position_embeddings", positions, LARGEST_SIZE),
            ("type_vocab_size", self.type_vocab_size, LARGEST_SIZE),
            ("num_hidden_layers", i64::try_from(self.num_hidden_layers).unwrap_or(i64::MAX), LARGEST_DEPTH as i64),
        ];
        if let Some((key, size, largest)) = sizes.into_iter().find(|(_, size, largest)| !(1..=*largest).contains(size))
        {
            return Err(format!("{key} = {size}; expected 1 to {largest}"));
        }
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if hidden % heads != 0 {
            return Err(format!("hidden_size {hidden} is not a multiple of num_attention_heads {heads}"));
        }
        if self.layer_norm_eps.is_nan() || self.layer_norm_eps < 0.0 {
            return Err(format!("layer_norm_eps = {}; expected at least 0", self.layer_norm_eps));
        }
        Ok(())
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl LayerNorm {
    fn new(builder: &mut Builder, name: &str, config: &EncoderConfig) -> Self {
        let mut part = |part: &str| builder.parameter(format!("{name}.LayerNorm.{part}"), &[config.hidden_size]);
        Self { weight: part("weight"), bias: part("bias"), epsilon: config.layer_norm_eps }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.epsilon, true)
    }
}

struct Layer {
    qkv: Projections,
    attention_output: Projections,
    attention_norm: LayerNorm,
    intermediate: Projections,
    output: Projections,
    output_norm: LayerNorm,
    heads: i64,
}

impl Layer {
    fn new(builder: &mut Builder, name: &str, config: &EncoderConfig) -> Self {
        let (outer, inner) = (config.hidden_size, config.intermediate_size);
        let parts = [("query", outer), ("key", outer), ("value", outer)];
        let mut dense = |part: &str, input: i64, parts: &[(&str, i64)]| {
            Projections::new(builder, &format!("{name}.{part}"), input, parts, true)
        };
        let qkv = dense("attention.self", outer, &parts);
        let attention_output = dense("attention.output", outer, &[("dense", outer)]);
        let intermediate = dense("intermediate", outer, &[("dense", inner)]);
        let output = dense("output", inner, &[("dense", outer)]);
        let attention_norm = LayerNorm::new(builder, &format!("{name}.attention.output"), config);
        let output_norm = LayerNorm::new(builder, &format!("{name}.output"), config);
        let heads = config.num_attention_heads;
        Self { qkv, attention_output, attention_norm, intermediate, output, output_norm, heads }
    }

    /// `[B,T,D] -> [B,T,D]`; `mask` is `[B,1,1,T]`, true where there is a token, or nothing if all are.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let qkv = self.qkv.forward(x);
        let heads = |part: &Tensor| part.unflatten(-1, [self.heads, -1]).transpose(1, 2);
        let (q, k, v) = (heads(&qkv[0]), heads(&qkv[1]), heads(&qkv[2]));
        let attended = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, false, None, false);
        let attended = self.attention_output.forward_one(&attended.transpose(1, 2).flatten(2, 3));
        let x = self.attention_norm.forward(&(attended + x));
        let inner = self.intermediate.forward_one(&x).gelu("none");
        self.output_norm.forward(&(self.output.forward_one(&inner) + x))
    }
}

/// The stack from ids to the last layer's hidden states.
pub(crate) struct Bert {
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    pub(crate) fn new(builder: &mut Builder, config: &EncoderConfig) -> Self {
        let size = config.hidden_size;
        let mut table =
            |part: &str, rows: i64| builder.parameter(format!("embeddings.{part}_embeddings.weight"), &[rows, size]);
        let word_embeddings = table("word", config.vocab_size);
        let position_embeddings = table("position", config.max_position_embeddings as i64);
        let token_type_embeddings = table("token_type", config.type_vocab_size);
        let norm = LayerNorm::new(builder, "embeddings", config);
        let layers = 0..config.num_hidden_layers;
        let layers = layers.map(|layer| Layer::new(builder, &format!("encoder.layer.{layer}"), config)).collect();
        Self { word_embeddings, position_embeddings, token_type_embeddings, norm, layers }
    }

    /// Ids `[B,T]`, all of one text (token type 0) at positions from 0 -> `[B,T,D]`.
    pub(crate) fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let words = Tensor::embedding(&self.word_embeddings, ids, -1, false, false);
        let positions = self.position_embeddings.narrow(0, 0, ids.size()[1]).unsqueeze(0);
        let embedded = words + positions + self.token_type_embeddings.narrow(0, 0, 1);
        self.layers.iter().fold(self.norm.forward(&embedded), |x, layer| layer.forward(&x, mask))
    }
}

/// What a tensor of a file is called here: without the prefix that models with a head have; nothing for the heads, the pooler
/// and the positions that older files keep.
pub(crate) fn own_name(name: &str) -> Option<&str> {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    let unneeded = name.starts_with("pooler.") || name.starts_with("cls.") || name == "embeddings.position_ids";
    (!unneeded).then_some(name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(change: &Value) -> Result<(), String> {
        let mut config = json!({
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 32, "hidden_size": 16,
            "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
            "position_embedding_type": "absolute", "classifier_dropout": null,
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        serde_json::from_value::<EncoderConfig>(config).map_err(|error| error.to_string())?.check()
    }

    #[test]
    fn what_changes_the_computation_is_refused_by_name() {
        check(&json!({})).unwrap();
        check(&json!({"architectures": ["BertForMaskedLM"]})).unwrap();
        for (change, name) in [
            (json!({"model_type": "roberta"}), "roberta"),
            (json!({"architectures": ["BertLMHeadModel"]}), "BertLMHeadModel"),
            (json!({"hidden_act": "gelu_new"}), "gelu_new"),
            (json!({"position_embedding_type": "relative_key"}), "position_embedding_type"),
            (json!({"is_decoder": true}), "is_decoder"),
            (json!({"quantization_config": {"bits": 8}}), "quantization_config"),
            (json!({"num_attention_heads": 3}), "num_attention_heads 3"),
            (json!({"hidden_size": 1_i64 << 40}), "hidden_size"),
            (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
            (json!({"layer_norm_eps": -1}), "layer_norm_eps"),
        ] {
            let error = check(&change).unwrap_err();
            assert!(error.contains(name), "{change}: {error}");
        }
    }
}
