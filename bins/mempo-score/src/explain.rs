//! How much of the memory reward is explained by what is no merit of the memory: MemPO's stated limitation is that steps
//! of different trajectories differ in what they have seen.

use serde_json::{Value, json};

/// What a memory could not help: its step index, the tool calls before it, the characters of the last observation.
pub(crate) type Circumstances = [f64; 3];

const NAMES: [&str; 3] = ["step_index", "tool_calls", "observation_length"];
/// The circumstances and the reward.
const COLUMNS: usize = NAMES.len() + 1;
/// Of answer probabilities, evenly from 0 to 1.
const BINS: usize = 20;

/// Sums of products of the columns, gathered row by row in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Explained {
    count: f64,
    means: [f64; COLUMNS],
    /// `Σ (x - mean x) (y - mean y)`, updated as the means move (Welford 1962).
    products: [[f64; COLUMNS]; COLUMNS],
    bins: [u64; BINS],
}

impl Explained {
    /// A memory's circumstances and its reward.
    pub(crate) fn add(&mut self, circumstances: Circumstances, reward: f64) {
        let [a, b, c] = circumstances;
        let row = [a, b, c, reward];
        self.count += 1.0;
        let before: [f64; COLUMNS] = std::array::from_fn(|column| row[column] - self.means[column]);
        for (mean, difference) in self.means.iter_mut().zip(before) {
            *mean += difference / self.count;
        }
        for (left, products) in self.products.iter_mut().enumerate() {
            for (right, product) in products.iter_mut().enumerate() {
                *product += before[left] * (row[right] - self.means[right]);
            }
        }
    }

    /// The probability that a memory gives the answer.
    pub(crate) fn add_probability(&mut self, probability: f64) {
        self.bins[((probability * BINS as f64) as usize).min(BINS - 1)] += 1;
    }

    /// The histogram, and the share of the reward's variance that each circumstance explains alone and all together.
    pub(crate) fn summary(&self) -> Value {
        let alone =
            NAMES.iter().enumerate().map(|(column, name)| ((*name).to_owned(), json!(self.explained(&[column]))));
        let alone: serde_json::Map<String, Value> = alone.collect();
        json!({
            "answer_probability_histogram": self.bins,
            "memory_reward_explained_by": alone,
            "memory_reward_explained_by_all": self.explained(&[0, 1, 2]),
        })
    }

    /// R² of a linear regression of the reward on some columns; none where the reward does not vary.
    fn explained(&self, columns: &[usize]) -> Option<f64> {
        let reward = COLUMNS - 1;
        let total = self.products[reward][reward];
        // Least squares by elimination; a column that does not vary, or follows from others, explains nothing more.
        let mut left = self.products;
        let mut explained = 0.0;
        for &column in columns {
            let pivot = left[column][column];
            if pivot <= 1e-9 * self.products[column][column] {
                continue;
            }
            explained += left[column][reward] * left[column][reward] / pivot;
            let row = left[column];
            for line in &mut left {
                let factor = line[column] / pivot;
                line.iter_mut().zip(row).for_each(|(cell, value)| *cell -= factor * value);
            }
        }
        (total > 0.0).then(|| (explained / total).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(index: u64, salt: u64) -> f64 {
        f64::from(mempo_model::counter_uniform(salt, index))
    }

    #[test]
    fn a_reward_made_of_circumstances_is_explained_and_one_of_noise_is_not() {
        let mut made = Explained::default();
        let mut noise = Explained::default();
        for index in 0..2000 {
            let circumstances = [number(index, 1) * 8.0, number(index, 2) * 3.0, number(index, 3) * 500.0];
            made.add(circumstances, 0.3 * circumstances[0] - 0.002 * circumstances[2] + 5.0);
            noise.add(circumstances, number(index, 4));
        }
        assert!((made.explained(&[0, 1, 2]).unwrap() - 1.0).abs() < 1e-9);
        // Variances 0.09 * 64 / 12 and 4e-6 * 250000 / 12.
        let step = 0.09 * 64.0 / (0.09 * 64.0 + 4e-6 * 250_000.0);
        assert!((made.explained(&[0]).unwrap() - step).abs() < 0.03);
        assert!(made.explained(&[1]).unwrap() < 0.01);
        assert!(noise.explained(&[0, 1, 2]).unwrap() < 0.01);
    }

    #[test]
    fn nothing_varies_or_one_follows_from_another() {
        let mut explained = Explained::default();
        explained.add([1.0, 1.0, 0.0], 0.5);
        assert_eq!(explained.explained(&[0]), None);
        explained.add([2.0, 2.0, 0.0], 0.7);
        explained.add([3.0, 3.0, 0.0], 0.9);
        assert!((explained.explained(&[0, 1, 2]).unwrap() - 1.0).abs() < 1e-9);
        for probability in [0.0, 0.04, 0.05, 1.0] {
            explained.add_probability(probability);
        }
        let summary = explained.summary();
        let bins = summary["answer_probability_histogram"].as_array().unwrap();
        assert_eq!((bins.len(), &bins[0], &bins[1], &bins[19]), (20, &json!(2), &json!(1), &json!(1)));
    }
}
