//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) over flat buffers, with clipping by global norm.
//!
//! Gradient and moments are kept in fp32 or in bf16; the arithmetic is fp32 either way. A bf16 moment is rounded up or
//! down at random, with the nearer neighbour the likelier one: rounded to nearest, `v ← 0.999 v` would leave `v` as it is.
//!
//! Takes the gradient that was accumulated in [`AdamW::gradient`], leaves it zero. The arithmetic follows
//! `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_`, whose results the tests hold it to. A gradient
//! that is not finite changes nothing but the gradient itself.

use std::ops::Range;

use mempo_model::counter_hash;
use tch::{Device, Kind, TchError, Tensor, no_grad_guard};

use crate::OptimizerOptions;
use crate::flat::Layout;

/// Elements updated together, so that what bf16 buffers are widened to stays small.
const BLOCK: i64 = 1 << 24;

/// Master weights, gradient and moments: four flat tensors of one layout.
pub(crate) struct AdamW {
    /// The weights, fp32.
    pub(crate) master: Tensor,
    /// Sum of the gradients of the running optimizer step.
    pub(crate) gradient: Tensor,
    /// Running mean of gradients.
    pub(crate) first_moment: Tensor,
    /// Running mean of squared gradients.
    pub(crate) second_moment: Tensor,
    /// Updates made, for the bias correction.
    pub(crate) updates: u64,
    decayed: i64,
}

impl AdamW {
    /// All zeros; `kind` is that of gradient and moments.
    pub(crate) fn new(layout: &Layout, device: Device, kind: Kind) -> Self {
        let zeros = || layout.zeros(kind, device);
        Self {
            master: layout.zeros(Kind::Float, device),
            gradient: zeros(),
            first_moment: zeros(),
            second_moment: zeros(),
            updates: 0,
            decayed: layout.decayed,
        }
    }

    /// One update. Returns the gradient's norm before clipping; nothing was updated if it is not finite.
    pub(crate) fn step(&mut self, options: &OptimizerOptions, learning_rate: f64) -> Result<f64, TchError> {
        let _no_grad = no_grad_guard();
        let norm = norm(&self.gradient);
        if !norm.is_finite() {
            let _ = self.gradient.zero_();
            return Ok(norm);
        }
        self.updates += 1;
        let decayed = mempo_native::AdamW {
            learning_rate,
            beta1: options.beta1,
            beta2: options.beta2,
            weight_decay: options.weight_decay,
            epsilon: options.epsilon,
        };
        let undecayed = mempo_native::AdamW { weight_decay: 0.0, ..decayed };
        let length = self.master.size1()?;
        let device = self.master.device();
        let step = Tensor::from_slice(&[self.updates as f32]).to_device(device);
        let divisor = ((norm + 1e-6) / options.max_grad_norm).max(1.0);
        let divisor = Tensor::from_slice(&[divisor as f32]).to_device(device);
        for (update, part) in [(decayed, 0..self.decayed), (undecayed, self.decayed..length)] {
            for start in part.clone().step_by(BLOCK as usize) {
                self.update_block(&update, start..part.end.min(start + BLOCK), &step, &divisor)?;
            }
        }
        let _ = self.gradient.zero_();
        Ok(norm)
    }

    /// Whether all weights and moments are numbers.
    pub(crate) fn is_finite(&self) -> bool {
        let _no_grad = no_grad_guard();
        [&self.master, &self.first_moment, &self.second_moment].iter().all(|flat| norm(flat).is_finite())
    }

    fn update_block(
        &self,
        update: &mempo_native::AdamW,
        block: Range<i64>,
        step: &Tensor,
        divisor: &Tensor,
    ) -> Result<(), TchError> {
        let part = |flat: &Tensor| flat.narrow(0, block.start, block.end - block.start);
        let (master, stored) = (part(&self.master), [&self.first_moment, &self.second_moment].map(part));
        // In fp32 these are the buffers themselves.
        let [first, second] = stored.each_ref().map(|part| part.to_kind(Kind::Float));
        update.update([&master, &part(&self.gradient).to_kind(Kind::Float), &first, &second], step, divisor)?;
        for (moment, (stored, value)) in (0..).zip(stored.iter().zip([first, second])) {
            if stored.kind() != Kind::Float {
                round_at_random(stored, &value, noise_seed(self.updates, block.start, moment));
            }
        }
        Ok(())
    }
}

/// Of all elements: in fp32 over lines of a fixed length, in f64 over the lines. Reductions so short are not divided
/// between threads, whose number would show in the last bits.
pub(crate) fn norm(flat: &Tensor) -> f64 {
    const LINE: i64 = 4096;
    let of_lines = |lines: &Tensor| {
        let norms = lines.norm_scalaropt_dim_dtype(2, [1_i64], false, Kind::Float);
        norms.to_kind(Kind::Double).norm()
    };
    let blocks = flat.split(BLOCK, 0);
    let norms: Vec<Tensor> = blocks
        .iter()
        .flat_map(|block| {
            let whole = block.size()[0] / LINE * LINE;
            let lines = block.narrow(0, 0, whole).view([-1, LINE]);
            let rest = block.narrow(0, whole, block.size()[0] - whole).view([1, -1]);
            [of_lines(&lines), of_lines(&rest)]
        })
        .collect();
    Tensor::stack(&norms, 0).norm().double_value(&[])
}

fn noise_seed(updates: u64, start: i64, moment: u64) -> i64 {
    // Any 32 bits that differ from update to update.
    i64::from(counter_hash(updates, 2 * start as u64 + moment) as i32)
}

/// Writes fp32 `values` to `target` (bf16), each as one of its two neighbours: up with the probability of its distance
/// from the lower one. The random numbers are a function of `seed` and the place alone.
fn round_at_random(target: &Tensor, values: &Tensor, seed: i64) {
    /// 2³² over the golden ratio: multiples of it are spread evenly (Knuth, TAOCP 6.4).
    const SPREAD: i64 = -1_640_531_527;
    let noise = Tensor::arange(values.numel() as i64, (Kind::Int, values.device())) * SPREAD + seed;
    let bits = values.view_dtype(Kind::Int) + noise.bitwise_and(0xffff);
    let kept = bits.bitwise_and(!0xffff);
    target.shallow_clone().copy_(&kept.view_dtype(Kind::Float));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::optimizer_options;

    fn layout() -> Layout {
        let shapes = [("matrix", vec![2, 3]), ("bias", vec![4])];
        Layout::new(shapes.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())))
    }

    fn set(layout: &Layout, flat: &Tensor, values: &[f32]) {
        layout.slots[0].view(flat).copy_(&Tensor::from_slice(&values[..6]).view([2, 3]));
        layout.slots[1].view(flat).copy_(&Tensor::from_slice(&values[6..]));
    }

    fn get(layout: &Layout, flat: &Tensor) -> Vec<f64> {
        let parts: Vec<Tensor> = layout.slots.iter().map(|slot| slot.view(flat).reshape([-1])).collect();
        Vec::try_from(Tensor::cat(&parts, 0).to_kind(Kind::Double)).unwrap()
    }

    /// A gradient that changes sign and size from step to step.
    fn gradient(step: usize) -> Vec<f32> {
        (0..10).map(|index| ((step * 10 + index) as f32 * 0.7).sin() * (1.0 + step as f32)).collect()
    }

    /// The textbook, one scalar at a time in f64.
    fn brute_force(options: &OptimizerOptions, rate: f64, start: &[f32], steps: usize) -> Vec<f64> {
        let mut weights: Vec<f64> = start.iter().map(|&weight| f64::from(weight)).collect();
        let mut moments = [(0.0, 0.0); 10];
        for step in 0..steps {
            let gradient: Vec<f64> = gradient(step).into_iter().map(f64::from).collect();
            let norm = gradient.iter().map(|value| value * value).sum::<f64>().sqrt();
            let clip = (options.max_grad_norm / (norm + 1e-6)).min(1.0);
            for (index, weight) in weights.iter_mut().enumerate() {
                let value = gradient[index] * clip;
                let (mean, square) = &mut moments[index];
                *mean = options.beta1 * *mean + (1.0 - options.beta1) * value;
                *square = options.beta2 * *square + (1.0 - options.beta2) * value * value;
                let mean_hat = *mean / (1.0 - options.beta1.powi(step as i32 + 1));
                let square_hat: f64 = *square / (1.0 - options.beta2.powi(step as i32 + 1));
                let decay = if index < 6 { options.weight_decay } else { 0.0 };
                *weight -= rate * (mean_hat / (square_hat.sqrt() + options.epsilon) + decay * *weight);
            }
        }
        weights
    }

    fn run(options: &OptimizerOptions, rate: f64, start: &[f32], steps: usize) -> Vec<f64> {
        let layout = layout();
        let mut optimizer = AdamW::new(&layout, Device::Cpu, Kind::Float);
        set(&layout, &optimizer.master, start);
        for step in 0..steps {
            set(&layout, &optimizer.gradient, &gradient(step));
            optimizer.step(options, rate).unwrap();
        }
        get(&layout, &optimizer.master)
    }

    fn close(found: &[f64], expected: &[f64], tolerance: f64) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < tolerance, "{found} is not {expected}");
        }
    }

    #[test]
    fn equals_a_scalar_brute_force() {
        let start: Vec<f32> = (0..10).map(|index| index as f32 / 5.0 - 1.0).collect();
        for max_grad_norm in [0.5, f64::INFINITY] {
            let options = OptimizerOptions { max_grad_norm, weight_decay: 0.1, ..optimizer_options() };
            close(&run(&options, 0.01, &start, 20), &brute_force(&options, 0.01, &start, 20), 2e-6);
        }
    }

    /// Numbers written by `tests/fixtures/adamw.py` with `torch.optim.AdamW`.
    #[test]
    fn equals_pytorch() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../tests/fixtures/adamw.json")).unwrap();
        let numbers = |key: &str| -> Vec<f64> {
            golden[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
        };
        let start: Vec<f32> = numbers("start").iter().map(|&value| value as f32).collect();
        let options = OptimizerOptions {
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            ..optimizer_options()
        };
        close(&run(&options, 0.01, &start, 10), &numbers("end"), 1e-6);
    }

    /// Mean and spread of a moment that changes by a fraction of bf16's last bit each step.
    #[test]
    fn small_changes_of_a_bf16_moment_count_on_average() {
        let layout = Layout::new([("matrix".to_owned(), vec![64, 64])].into_iter());
        let mut optimizer = AdamW::new(&layout, Device::Cpu, Kind::BFloat16);
        let _ = optimizer.second_moment.fill_(1.0);
        let options = OptimizerOptions { max_grad_norm: f64::INFINITY, ..optimizer_options() };
        for _ in 0..500 {
            let _ = optimizer.gradient.fill_(0.5);
            optimizer.step(&options, 0.0).unwrap();
        }
        // v -> 0.25 + 0.75 · 0.999^500, where rounding to nearest would leave it at 1.
        let expected = 0.25 + 0.75 * 0.999_f64.powi(500);
        let second = optimizer.second_moment.to_kind(Kind::Double);
        let mean = second.mean(Kind::Double).double_value(&[]);
        let spread = second.std(true).double_value(&[]);
        assert!((mean / expected - 1.0).abs() < 0.005, "mean {mean}, expected {expected}");
        assert!(spread / expected < 0.06, "spread {spread}");
        assert_eq!(optimizer.gradient.kind(), Kind::BFloat16);
    }

    #[test]
    fn rounding_takes_the_two_neighbours_in_the_right_proportion() {
        let count = 100_000;
        // 1 and 1 + 2^-7 are neighbours in bf16; a quarter of the way up.
        let value = 1.0 + 0.25 / 128.0;
        let values = Tensor::full([count], value, (Kind::Float, Device::Cpu));
        for (sign, seed) in [(1.0, 1), (-1.0, 7)] {
            let target = Tensor::zeros([count], (Kind::BFloat16, Device::Cpu));
            round_at_random(&target, &(&values * sign), seed);
            let found = target.to_kind(Kind::Double) * sign;
            let up = found.gt(1.0).sum(Kind::Double).double_value(&[]) / count as f64;
            assert!((up - 0.25).abs() < 0.01, "{up}");
            assert!((found.mean(Kind::Double).double_value(&[]) - value).abs() < 1e-4);
            let neither = found.ne(1.0).logical_and(&found.ne(1.0 + 1.0 / 128.0));
            assert_eq!(neither.sum(Kind::Int64).int64_value(&[]), 0);
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let layout = layout();
        let mut optimizer = AdamW::new(&layout, Device::Cpu, Kind::Float);
        set(&layout, &optimizer.master, &[1.0; 10]);
        let mut bad = [0.1; 10];
        bad[7] = f32::NAN;
        set(&layout, &optimizer.gradient, &bad);
        assert!(!optimizer.step(&optimizer_options(), 0.1).unwrap().is_finite());
        assert_eq!(get(&layout, &optimizer.master), [1.0; 10]);
        assert_eq!(get(&layout, &optimizer.gradient), [0.0; 10]);
        assert_eq!(optimizer.updates, 0);
    }
}
