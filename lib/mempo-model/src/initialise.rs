//! Fresh weights.

use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::{Config, Error, Model, Runtime, random};

/// How much of the first layer's random query and key weights is left beside what makes it look one token back.
const RANDOM_SHARE: f64 = 0.1;

impl Model {
    /// A fresh model: matrices normal with `initializer_range`, norms one, biases zero, as Hugging Face does it. The
    /// numbers are a function of `seed` and each tensor's name alone.
    pub fn initialise(config: Config, seed: u64, runtime: &Runtime) -> Result<Self, Error> {
        config.check().map_err(|problem| Error::Config { path: "config".into(), problem })?;
        let mut model = Self::allocate(config, runtime)?;
        let scale = model.config.initializer_range as f32;
        let _guard = tch::no_grad_guard();
        for (name, tensor) in &mut model.parameters {
            if name.ends_with("norm.weight") {
                let _ = tensor.fill_(1.0);
            } else if name.contains(".bias") {
                let _ = tensor.fill_(0.0);
            } else {
                let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name.as_bytes()).finalize();
                let key = u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
                let values: Vec<f32> = random::normals(key, tensor.numel()).iter().map(|value| value * scale).collect();
                tensor.copy_(&Tensor::from_slice(&values).view_as(tensor));
            }
        }
        Ok(model)
    }

    /// Makes the first query head of every group of the first layer begin as one that attends to the token before, by
    /// query and key biases alone: with rotary positions a query `(s, 0)` in each rotated pair meets the key
    /// `s (cos f, sin f)` best at distance 1, `f` being the pair's frequency. All keys of the layer carry that bias;
    /// the other query heads are left as they are. Copying from the prompt (an induction head is such a head and one
    /// above it) is then found within some million tokens of training instead of some hundred million.
    pub fn attend_to_previous_token(&mut self, strength: f64) -> Result<(), Error> {
        let _guard = tch::no_grad_guard();
        let (head_size, groups) = (self.config.head_size(), self.config.key_value_heads());
        let half = head_size / 2;
        let frequencies: Vec<f64> =
            (0..half).map(|pair| self.config.rotary_base().powf(-(pair as f64) / half as f64)).collect();
        let query: Vec<f64> = (0..head_size).map(|index| if index < half { strength } else { 0.0 }).collect();
        let sines = frequencies.iter().map(|frequency| strength * frequency.sin());
        let key: Vec<f64> = frequencies.iter().map(|frequency| strength * frequency.cos()).chain(sines).collect();
        for (projection, head) in [("q_proj", query), ("k_proj", key)] {
            // The first head of each group, as a view `[groups, head_size, ..]`.
            let first_heads = |kind: &str| -> Result<Tensor, Error> {
                let tensor = self.named(&format!("model.layers.0.self_attn.{projection}.{kind}"))?;
                Ok(tensor.unflatten(0, [groups, -1, head_size]).select(1, 0))
            };
            first_heads("bias")?.copy_(&Tensor::from_slice(&head).to_kind(Kind::Float));
            let _ = first_heads("weight")?.g_mul_scalar_(RANDOM_SHARE);
        }
        Ok(())
    }

    fn named(&self, name: &str) -> Result<&Tensor, Error> {
        let found = self.parameters.iter().find(|(other, _)| other == name);
        found.map(|(_, tensor)| tensor).ok_or_else(|| Error::Config {
            path: "config".into(),
            problem: format!("no parameter `{name}`: attention to the previous token needs a family with these biases"),
        })
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn config() -> Config {
        serde_json::from_value(serde_json::json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
            "max_position_embeddings": 128, "rope_theta": 100.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "tie_word_embeddings": true, "initializer_range": 0.05
        }))
        .unwrap()
    }

    #[test]
    fn other_query_heads_stay_as_they_are() {
        let runtime = Runtime::cpu(Kind::Float);
        let of = |model: &Model, name: &str| {
            let tensor = model.named(&format!("model.layers.0.self_attn.q_proj.{name}")).unwrap();
            tensor.unflatten(0, [2, 16]).copy()
        };
        let mut model = Model::initialise(config(), 3, &runtime).unwrap();
        let before = [of(&model, "weight"), of(&model, "bias")];
        model.attend_to_previous_token(6.0).unwrap();
        for (before, name) in before.iter().zip(["weight", "bias"]) {
            let after = of(&model, name);
            assert_ne!(before.get(0), after.get(0), "{name}");
            assert_eq!(before.get(1), after.get(1), "{name}");
        }
    }

    /// Changing a token changes what is computed one position later more than anywhere further on.
    #[test]
    fn first_layer_looks_one_token_back() {
        let runtime = Runtime::cpu(Kind::Float);
        let mut model = Model::initialise(config(), 3, &runtime).unwrap();
        model.attend_to_previous_token(6.0).unwrap();
        let ids: Vec<i64> = (0..40).map(|index| (index * 7) % 50).collect();
        let mut changed = ids.clone();
        changed[20] = 49;
        let hidden = |ids: &[i64]| model.hidden(&Tensor::from_slice(ids).unsqueeze(0));
        let difference =
            (hidden(&changed) - hidden(&ids)).abs().sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
        let at = |position: i64| difference.double_value(&[0, position]);
        for later in 22..40 {
            assert!(at(21) > 5.0 * at(later), "position {later}: {} against {}", at(later), at(21));
        }
    }
}
