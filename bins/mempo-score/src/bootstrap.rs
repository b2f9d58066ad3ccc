//! Percentile bootstrap intervals over clusters and training seeds, the same for the same seed.

use mempo_run::seed_of;
use rayon::prelude::*;
use serde::Serialize;

/// Resamples an interval is made of.
pub(crate) const RESAMPLES: usize = 2000;
/// Share of the resamples inside the interval.
pub(crate) const LEVEL: f64 = 0.95;

/// A figure with its interval; no value where nothing counts, no interval from a single cluster under a single seed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Estimate {
    pub(crate) value: Option<f64>,
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
}

/// Sums of columns: a row a training seed, one such table a cluster.
pub(crate) type Cluster = Vec<Vec<f64>>;

/// Estimates from the column sums over `clusters` and seeds, with intervals from drawing as many seeds and as many clusters
/// again, with replacement, `resamples` times. Seeds and clusters are drawn apart, because all seeds meet the same tasks
/// (Owen's pigeonhole bootstrap, 2007): clusters drawn anew within each seed would count every task once a seed.
pub(crate) fn bootstrap(
    clusters: &[Cluster],
    seed: u64,
    resamples: usize,
    estimate: impl Fn(&[f64]) -> Vec<Option<f64>> + Sync,
) -> Vec<Estimate> {
    let seeds = clusters.first().map_or(0, Vec::len);
    let all: Vec<usize> = (0..seeds).collect();
    let values = estimate(&column_sums(clusters, 0..clusters.len(), &all));
    let draws: Vec<Vec<Option<f64>>> = (0..if clusters.len().max(seeds) < 2 { 0 } else { resamples })
        .into_par_iter()
        .map(|resample| {
            let mut state = seed_of(seed, &["bootstrap", &resample.to_string()]);
            let drawn: Vec<usize> = if seeds > 1 { draws(&mut state, seeds).collect() } else { all.clone() };
            estimate(&column_sums(clusters, draws(&mut state, clusters.len()), &drawn))
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

fn column_sums(clusters: &[Cluster], drawn: impl Iterator<Item = usize>, seeds: &[usize]) -> Vec<f64> {
    let columns = clusters.first().and_then(|seeds| seeds.first()).map_or(0, Vec::len);
    let mut sums = vec![0.0; columns];
    for place in drawn {
        for row in seeds.iter().map(|&seed| &clusters[place][seed]) {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
    }
    sums
}

/// As many uniform numbers below `count`.
fn draws(state: &mut u64, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |_| draw(state, count))
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

    fn covers(clusters: &[Cluster], seed: u64, truth: f64) -> bool {
        let found = bootstrap(clusters, seed, 300, mean)[0];
        found.low.unwrap() <= truth && truth <= found.high.unwrap()
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
            let alone = |row: &Vec<f64>| vec![row.clone()];
            let clusters: Vec<Cluster> = rows
                .iter()
                .map(|rows| vec![column_sums(&rows.iter().map(alone).collect::<Vec<_>>(), 0..5, &[0])])
                .collect();
            by_cluster += u32::from(covers(&clusters, data, 3.0));
            by_row += u32::from(covers(&rows.concat().iter().map(alone).collect::<Vec<_>>(), data, 3.0));
        }
        assert!((133..=149).contains(&by_cluster), "{by_cluster} of 150");
        assert!(by_row < 110, "rows of one cluster are not independent: {by_row} of 150");
    }

    #[test]
    fn what_seeds_share_is_noise_too() {
        let (mut with_seeds, mut pooled) = (0, 0);
        let mut state = 2;
        for data in 0..150 {
            // 30 clusters met by 12 policies that differ more than clusters do.
            let shared: Vec<f64> = (0..12).map(|_| noise(&mut state)).collect();
            let clusters: Vec<Cluster> = (0..30)
                .map(|_| {
                    let own = 0.5 * noise(&mut state);
                    shared.iter().map(|shared| vec![shared + own + 0.5 * noise(&mut state), 1.0]).collect()
                })
                .collect();
            with_seeds += u32::from(covers(&clusters, data, 0.0));
            let sums = clusters.iter().map(|seeds| {
                vec![seeds.iter().fold(vec![0.0, 0.0], |sum, row| vec![sum[0] + row[0], sum[1] + row[1]])]
            });
            pooled += u32::from(covers(&sums.collect::<Vec<_>>(), data, 0.0));
        }
        assert!((130..=150).contains(&with_seeds), "{with_seeds} of 150");
        assert!(pooled < 90, "seeds taken as given: {pooled} of 150");
    }

    #[test]
    fn the_same_seed_gives_the_same_interval() {
        let clusters: Vec<Cluster> = (0..20).map(|value| vec![vec![f64::from(value * value), 1.0]]).collect();
        let found = bootstrap(&clusters, 7, 200, mean);
        assert_eq!(found, bootstrap(&clusters, 7, 200, mean));
        assert_ne!(found, bootstrap(&clusters, 8, 200, mean));
        assert_eq!(found[0].value, Some((0..20).map(|v| f64::from(v * v)).sum::<f64>() / 20.0));
    }

    #[test]
    fn one_cluster_of_one_seed_has_no_interval_and_nothing_has_no_value() {
        let none = Estimate { value: None, low: None, high: None };
        assert_eq!(bootstrap(&[vec![vec![1.0, 2.0]]], 0, 50, mean), [Estimate { value: Some(0.5), ..none }]);
        assert_eq!(bootstrap(&[vec![vec![0.0, 0.0]], vec![vec![0.0, 0.0]]], 0, 50, mean), [none]);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), Some(3.0));
        assert_eq!(quantile(&[5.0], 0.975), Some(5.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
