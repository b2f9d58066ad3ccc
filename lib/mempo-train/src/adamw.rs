//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) over flat fp32 buffers, with clipping by
//! global norm.
//!
//! Takes the gradient that was accumulated in [`AdamW::gradient`], leaves it zero. The arithmetic follows
//! `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_`, whose results the tests hold it to. A gradient
//! that is not finite changes nothing but the gradient itself.

use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::OptimizerOptions;
use crate::flat::Layout;

/// Elements updated together: on the CPU the block's buffers stay in the cache over the ten operations, on a GPU
/// temporaries stay small.
const CPU_BLOCK: i64 = 1 << 16;
const GPU_BLOCK: i64 = 1 << 26;

/// Master weights, gradient and moments: four flat fp32 tensors of one layout.
pub(crate) struct AdamW {
    /// The weights.
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

/// The numbers of one update.
struct Update {
    clip: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    root_correction2: f64,
    step_size: f64,
}

impl AdamW {
    /// All zeros.
    pub(crate) fn new(layout: &Layout, device: Device) -> Self {
        let zeros = || layout.zeros(Kind::Float, device);
        Self {
            master: zeros(),
            gradient: zeros(),
            first_moment: zeros(),
            second_moment: zeros(),
            updates: 0,
            decayed: layout.decayed,
        }
    }

    /// One update. Returns the gradient's norm before clipping; nothing was updated if it is not finite.
    pub(crate) fn step(&mut self, options: &OptimizerOptions, learning_rate: f64) -> f64 {
        let _no_grad = no_grad_guard();
        let norm = self.gradient.norm_scalaropt_dtype(2, Kind::Double).double_value(&[]);
        if !norm.is_finite() {
            let _ = self.gradient.zero_();
            return norm;
        }
        self.updates += 1;
        let updates = self.updates as f64;
        let update = Update {
            clip: (options.max_grad_norm / (norm + 1e-6)).min(1.0),
            beta1: options.beta1,
            beta2: options.beta2,
            epsilon: options.epsilon,
            root_correction2: (1.0 - options.beta2.powf(updates)).sqrt(),
            step_size: learning_rate / (1.0 - options.beta1.powf(updates)),
        };
        let decay = 1.0 - learning_rate * options.weight_decay;
        let _ = self.master.narrow(0, 0, self.decayed).g_mul_scalar_(decay);
        self.update_blocks(&update);
        norm
    }

    fn update_blocks(&self, update: &Update) {
        let block = if self.master.device() == Device::Cpu { CPU_BLOCK } else { GPU_BLOCK };
        let length = self.master.size1().expect("flat buffers have one dimension");
        for start in (0..length).step_by(block as usize) {
            let part = |flat: &Tensor| flat.narrow(0, start, block.min(length - start));
            let (mut gradient, mut first, mut second) =
                (part(&self.gradient), part(&self.first_moment), part(&self.second_moment));
            if update.clip < 1.0 {
                let _ = gradient.g_mul_scalar_(update.clip);
            }
            let _ = first.lerp_(&gradient, 1.0 - update.beta1);
            let _ = gradient.square_();
            let _ = second.lerp_(&gradient, 1.0 - update.beta2);
            // From here on the gradient's memory holds the denominator, then the change.
            let _ = second.sqrt_out(&gradient);
            let _ = gradient.g_div_scalar_(update.root_correction2).g_add_scalar_(update.epsilon);
            let _ = first.divide_out(&gradient, &gradient).g_mul_scalar_(update.step_size);
            let _ = part(&self.master).g_sub_(&gradient);
            let _ = gradient.zero_();
        }
    }
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
        let mut optimizer = AdamW::new(&layout, Device::Cpu);
        set(&layout, &optimizer.master, start);
        for step in 0..steps {
            set(&layout, &optimizer.gradient, &gradient(step));
            optimizer.step(options, rate);
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

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let layout = layout();
        let mut optimizer = AdamW::new(&layout, Device::Cpu);
        set(&layout, &optimizer.master, &[1.0; 10]);
        let mut bad = [0.1; 10];
        bad[7] = f32::NAN;
        set(&layout, &optimizer.gradient, &bad);
        assert!(!optimizer.step(&optimizer_options(), 0.1).is_finite());
        assert_eq!(get(&layout, &optimizer.master), [1.0; 10]);
        assert_eq!(get(&layout, &optimizer.gradient), [0.0; 10]);
        assert_eq!(optimizer.updates, 0);
    }
}
