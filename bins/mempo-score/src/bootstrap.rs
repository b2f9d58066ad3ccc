//! Percentile bootstrap intervals over clusters, the same for the same seed.

use mempo_run::seed_of;
use rayon::prelude::*;
use serde::Serialize;

/// Resamples an interval is made of.
pub(crate) const RESAMPLES: usize = 2000;
/// Share of the resamples inside the interval.
pub(crate) const LEVEL: f64 = 0.95;

/// A figure with its interval; no value where nothing counts, no interval from a single cluster.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Estimate {
    pub(crate) value: Option<f64>,
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
}

/// Estimates from the column sums over `clusters` (one row of columns a cluster), with intervals from drawing as many
/// clusters again, with replacement, `resamples` times.
pub(crate) fn bootstrap(
    clusters: &[Vec<f64>],
    seed: u64,
    resamples: usize,
    estimate: impl Fn(&[f64]) -> Vec<Option<f64>> + Sync,
) -> Vec<Estimate> {
    let values = estimate(&column_sums(clusters, 0..clusters.len()));
    let draws: Vec<Vec<Option<f64>>> = (0..if clusters.len() < 2 { 0 } else { resamples })
        .into_par_iter()
        .map(|resample| {
            let mut state = seed_of(seed, &["bootstrap", &resample.to_string()]);
            let drawn = (0..clusters.len()).map(|_| draw(&mut state, clusters.len()));
            estimate(&column_sums(clusters, drawn))
        })
        .collect();
    let interval = |(place, value)| {
        let mut sorted: Vec<f64> = draws.iter().filter_map(|draw| draw[place]).collect();
        sorted.sort_by(f64::total_cmp);
        let tail = (1.0 - LEVEL) / 2.0;
        Estimate { value, low: quantile(&sorted, tail), high: quantile(&sorted, 1.0 - tail) }
    };
    values.into_iter().enumerate().map(interval).collect()
}

fn column_sums(clusters: &[Vec<f64>], drawn: impl Iterator<Item = usize>) -> Vec<f64> {
    let mut sums = vec![0.0; clusters.first().map_or(0, Vec::len)];
    for place in drawn {
        for (sum, value) in sums.iter_mut().zip(&clusters[place]) {
            *sum += value;
        }
    }
    sums
}

/// A uniform number below `count` (SplitMix64, then the high half of the product).
fn draw(state: &mut u64, count: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    ((u128::from(bits) * count as u128) >> 64) as usize
}

/// Quantile of sorted values, linear between neighbours.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = share * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(sums: &[f64]) -> Vec<Option<f64>> {
        vec![(sums[1] > 0.0).then(|| sums[0] / sums[1])]
    }

    /// Rough normal noise: twelve uniform numbers.
    fn noise(state: &mut u64) -> f64 {
        (0..12).map(|_| draw(state, 1 << 30) as f64 / f64::from(1 << 30)).sum::<f64>() - 6.0
    }

    #[test]
    fn intervals_cover_the_truth_as_often_as_they_say_only_by_cluster() {
        let (mut by_cluster, mut by_row) = (0, 0);
        let mut state = 1;
        for data in 0..150 {
            // 40 clusters of 5 rows that share most of their deviation from the true mean, 3.
            let rows: Vec<Vec<Vec<f64>>> = (0..40)
                .map(|_| {
                    let shared = noise(&mut state);
                    (0..5).map(|_| vec![3.0 + shared + 0.3 * noise(&mut state), 1.0]).collect()
                })
                .collect();
            let clusters: Vec<Vec<f64>> = rows.iter().map(|rows| column_sums(rows, 0..5)).collect();
            let covers = |rows: &[Vec<f64>]| {
                let found = bootstrap(rows, data, 300, mean)[0];
                found.low.unwrap() <= 3.0 && 3.0 <= found.high.unwrap()
            };
            by_cluster += u32::from(covers(&clusters));
            by_row += u32::from(covers(&rows.concat()));
        }
        assert!((133..=149).contains(&by_cluster), "{by_cluster} of 150");
        assert!(by_row < 110, "rows of one cluster are not independent: {by_row} of 150");
    }

    #[test]
    fn the_same_seed_gives_the_same_interval() {
        let clusters: Vec<Vec<f64>> = (0..20).map(|value| vec![f64::from(value * value), 1.0]).collect();
        let found = bootstrap(&clusters, 7, 200, mean);
        assert_eq!(found, bootstrap(&clusters, 7, 200, mean));
        assert_ne!(found, bootstrap(&clusters, 8, 200, mean));
        assert_eq!(found[0].value, Some((0..20).map(|v| f64::from(v * v)).sum::<f64>() / 20.0));
    }

    #[test]
    fn one_cluster_has_no_interval_and_nothing_has_no_value() {
        let none = Estimate { value: None, low: None, high: None };
        assert_eq!(bootstrap(&[vec![1.0, 2.0]], 0, 50, mean), [Estimate { value: Some(0.5), ..none }]);
        assert_eq!(bootstrap(&[vec![0.0, 0.0], vec![0.0, 0.0]], 0, 50, mean), [none]);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), Some(3.0));
        assert_eq!(quantile(&[5.0], 0.975), Some(5.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
