//! Llama 2 and 3, SmolLM2 (Touvron et al. 2023): a pre-norm decoder without biases.

use tch::Tensor;

use crate::blocks::{Attend, Attention, Mlp, RmsNorm, embed};
use crate::builder::Builder;
use crate::config::Config;
use crate::model::Decoder;
use crate::rotary::RotaryAt;

/// `LlamaForCausalLM`.
pub(crate) struct Llama {
    embed_tokens: Tensor,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Tensor,
}

impl Llama {
    pub(crate) fn new(builder: &mut Builder, config: &Config) -> Self {
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = builder.parameter("model.embed_tokens.weight".to_owned(), &table);
        let layers = (0..config.num_hidden_layers).map(|layer| DecoderLayer::new(builder, layer, config)).collect();
        let norm = RmsNorm::new(builder, "model.norm", config.hidden_size, config);
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.shallow_clone()
        } else {
            builder.parameter("lm_head.weight".to_owned(), &table)
        };
        Self { embed_tokens, layers, norm, lm_head }
    }
}

impl Decoder for Llama {
    fn embed(&self, ids: &Tensor) -> Tensor {
        embed(&self.embed_tokens, ids)
    }

    fn layer(&self, index: usize, hidden: &Tensor, rotary: &RotaryAt, attend: &mut Attend) -> Tensor {
        self.layers[index].forward(index, hidden, rotary, attend)
    }

    fn norm(&self, hidden: &Tensor) -> Tensor {
        self.norm.forward(hidden)
    }

    fn head_weight(&self) -> &Tensor {
        &self.lm_head
    }
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl DecoderLayer {
    fn new(builder: &mut Builder, layer: usize, config: &Config) -> Self {
        let name = format!("model.layers.{layer}");
        Self {
            input_layernorm: RmsNorm::new(builder, &format!("{name}.input_layernorm"), config.hidden_size, config),
            self_attn: Attention::new(builder, &format!("{name}.self_attn"), config, false, false),
            post_attention_layernorm: RmsNorm::new(
                builder,
                &format!("{name}.post_attention_layernorm"),
                config.hidden_size,
                config,
            ),
            mlp: Mlp::new(builder, &format!("{name}.mlp"), config),
        }
    }

    /// `[B,T,D] -> [B,T,D]`.
    fn forward(&self, index: usize, hidden: &Tensor, rotary: &RotaryAt, attend: &mut Attend) -> Tensor {
        let attended = self.self_attn.forward(index, &self.input_layernorm.forward(hidden), rotary, attend);
        let hidden = hidden + attended;
        let mlp = self.mlp.forward(&self.post_attention_layernorm.forward(&hidden));
        hidden + mlp
    }
}
