//! Rotary positions, plain and stretched.

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::config::Config;

/// Rotary position embedding (Su et al. 2021, eq. 34), in Hugging Face's layout: the two halves of a head are the pairs.
pub(crate) struct Rotary {
    inverse_frequencies: Tensor,
}

/// Cosines and (signed) sines of some positions, `[B or 1, T, 1, d]`.
pub(crate) struct RotaryAt {
    cosines: Tensor,
    sines: Tensor,
}

impl Rotary {
    pub(crate) fn new(config: &Config, device: Device) -> Self {
        let head_size = config.head_size();
        // Computed in f32 step by step as the reference does: at far positions the last bit of a frequency shows.
        let exponents = Tensor::arange_start_step(0, head_size, 2, (Kind::Float, Device::Cpu)) / head_size as f64;
        let plain = Tensor::pow_scalar(config.rotary_base(), &exponents).reciprocal();
        let scaling = config.rotary_scaling().expect("a checked config");
        Self { inverse_frequencies: scaling.apply(&plain).to_device(device) }
    }

    /// For positions `[B or 1, T]`, int64.
    pub(crate) fn at(&self, positions: &Tensor, kind: Kind) -> RotaryAt {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse_frequencies;
        let (cosines, sines) = (angles.cos(), angles.sin());
        RotaryAt {
            cosines: Tensor::cat(&[&cosines, &cosines], -1).to_kind(kind).unsqueeze(2),
            sines: Tensor::cat(&[&sines.neg(), &sines], -1).to_kind(kind).unsqueeze(2),
        }
    }
}

impl RotaryAt {
    /// Turns heads `[B,T,·,d]`.
    pub(crate) fn rotate(&self, x: &Tensor) -> Tensor {
        let swapped = x.roll(x.size()[3] / 2, -1);
        (x * &self.cosines).addcmul(&swapped, &self.sines)
    }
}

/// How the frequencies are changed so that positions reach further than those a model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scaling {
    /// Not at all.
    Plain,
    /// Llama 3.1 and later: long waves are slowed down by `factor`, short ones stay, those between are blended.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_window: f64 },
}

impl Scaling {
    /// Reads `rope_scaling` or `rope_parameters`, whichever stands at `place`.
    pub(crate) fn parse(place: &str, rope: &Map<String, Value>) -> Result<Self, String> {
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        let own: &[&str] = match kind {
            "default" => &[],
            "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            _ => {
                let key = if rope.contains_key("rope_type") { "rope_type" } else { "type" };
                return Err(format!("{place}.{key} = \"{kind}\" is not supported; expected `default` or `llama3`"));
            }
        };
        for (key, value) in rope {
            let fits = match key.as_str() {
                "rope_theta" => value.is_number(),
                "rope_type" | "type" => value == kind,
                "partial_rotary_factor" => value.is_null() || value.as_f64() == Some(1.0),
                key => own.contains(&key),
            };
            if !fits {
                return Err(format!("{place}.{key} = {value} is not supported with rope_type `{kind}`"));
            }
        }
        let number = |key: &str| {
            let found = rope.get(key).and_then(Value::as_f64).filter(|number| *number > 0.0);
            found.ok_or_else(|| format!("{place}.{key} is missing or not above 0; rope_type `{kind}` needs it"))
        };
        if own.is_empty() {
            return Ok(Self::Plain);
        }
        let (low_freq_factor, high_freq_factor) = (number("low_freq_factor")?, number("high_freq_factor")?);
        if low_freq_factor >= high_freq_factor {
            let (low, high) = (low_freq_factor, high_freq_factor);
            return Err(format!("{place}.low_freq_factor {low} must be below high_freq_factor {high}"));
        }
        let (factor, original_window) = (number("factor")?, number("original_max_position_embeddings")?);
        Ok(Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_window })
    }

    /// Frequencies `[d/2]` in radians a position, float32, changed step by step as the reference does.
    fn apply(self, plain: &Tensor) -> Tensor {
        let Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_window } = self else {
            return plain.shallow_clone();
        };
        let wavelengths = plain.reciprocal() * (2.0 * std::f64::consts::PI);
        let (longest, shortest) = (original_window / low_freq_factor, original_window / high_freq_factor);
        let slowed = plain / factor;
        let turns = wavelengths.reciprocal() * original_window;
        let share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
        let blended = (1.0 - &share) * &slowed + &share * plain;
        let kept_or_blended = plain.where_self(&wavelengths.lt(shortest), &blended);
        slowed.where_self(&wavelengths.gt(longest), &kept_or_blended)
    }
}

impl Config {
    /// What the config says of rotary positions, in older files under `rope_scaling`, in newer under `rope_parameters`.
    pub(crate) fn rotary_scaling(&self) -> Result<Scaling, String> {
        let old = match self.other.get("rope_scaling") {
            None | Some(Value::Null) => None,
            Some(Value::Object(rope)) => Some(Scaling::parse("rope_scaling", rope)?),
            Some(value) => return Err(format!("rope_scaling = {value} is not supported; expected an object or null")),
        };
        let new = self.rope_parameters.as_ref().map(|rope| Scaling::parse("rope_parameters", rope)).transpose()?;
        match (old, new) {
            (Some(old), Some(new)) if old != new => Err("rope_parameters contradicts rope_scaling".to_owned()),
            (old, new) => Ok(new.or(old).unwrap_or(Scaling::Plain)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// transformers' `_compute_llama3_parameters` in plain f64.
    fn reference(frequency: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < 64.0 / 4.0 {
            frequency
        } else if wavelength > 64.0 {
            frequency / 8.0
        } else {
            let smooth = (64.0 / wavelength - 1.0) / 3.0;
            (1.0 - smooth) * frequency / 8.0 + smooth * frequency
        }
    }

    #[test]
    fn llama3_slows_long_waves_only() {
        let rope = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 64});
        let scaling = Scaling::parse("rope_scaling", rope.as_object().unwrap()).unwrap();
        let plain: Vec<f32> = (0..16).map(|i| 1e4f32.powf(-f32::from(i as u8) / 16.0)).collect();
        let scaled = Vec::<f32>::try_from(scaling.apply(&Tensor::from_slice(&plain))).unwrap();
        for (plain, scaled) in plain.iter().zip(scaled) {
            let expected = reference(f64::from(*plain));
            assert!((f64::from(scaled) / expected - 1.0).abs() < 1e-5, "{plain}: {scaled}, expected {expected}");
        }
    }
}
