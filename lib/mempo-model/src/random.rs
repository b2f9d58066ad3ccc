//! Random numbers without a stream: each is a function of a key and a counter, so none depends on the order of work.

/// 64 well-mixed bits of `(key, counter)`: the counter-th output of SplitMix64 (Steele et al. 2014) from a state that is
/// itself mixed out of the key, so that neighbouring keys are as unlike as any.
pub fn counter_hash(key: u64, counter: u64) -> u64 {
    let state = mix(key ^ 0xD1B5_4A32_D192_ED03);
    mix(state.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// A uniform number in `[0, 1)` for `(key, counter)`: a multiple of 2⁻²³, so that times any positive `f32` it stays
/// below that `f32`.
pub fn counter_uniform(key: u64, counter: u64) -> f32 {
    (counter_hash(key, counter) >> 41) as f32 / (1u32 << 23) as f32
}

/// `count` standard normal numbers for `key` (Box-Muller over pairs of counters).
pub(crate) fn normals(key: u64, count: usize) -> Vec<f32> {
    let unit = |counter: u64| (counter_hash(key, counter) >> 11) as f64 / (1u64 << 53) as f64;
    let mut values = Vec::with_capacity(count + 1);
    for counter in (0..count as u64).step_by(2) {
        let radius = (-2.0 * (1.0 - unit(counter)).ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * unit(counter + 1)).sin_cos();
        values.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chi-square of counts over equal bins.
    fn chi_square(values: impl Iterator<Item = f32>, bins: usize) -> f64 {
        let mut counts = vec![0.0f64; bins];
        values.for_each(|value| counts[(value * bins as f32) as usize] += 1.0);
        let expected = counts.iter().sum::<f64>() / bins as f64;
        counts.iter().map(|count| (count - expected).powi(2) / expected).sum()
    }

    #[test]
    fn uniforms_are_even_along_counters_along_keys_and_in_pairs() {
        let bins = 64; // 63 degrees of freedom: 99.9 % of chi-squares lie below 103
        assert!(chi_square((0..64_000).map(|i| counter_uniform(7, i)), bins) < 103.0);
        assert!(chi_square((0..64_000).map(|i| counter_uniform(i, 7)), bins) < 103.0);
        let pair =
            |i: u64| ((counter_uniform(3, i) * 8.0).floor() * 8.0 + (counter_uniform(4, i) * 8.0).floor()) / 64.0;
        assert!(chi_square((0..64_000).map(pair), bins) < 103.0);
    }

    #[test]
    fn uniforms_stay_below_one_and_below_what_they_scale() {
        let largest = ((1u32 << 23) - 1) as f32 / (1u32 << 23) as f32;
        for total in [1.0f32, 0.5, 0.999_999_9, 0.7, 1e-30, 1.000_000_1] {
            assert!(largest * total < total, "{total}");
        }
    }

    #[test]
    fn normals_have_the_moments_of_a_standard_normal() {
        let values = normals(11, 100_001);
        let moment = |power: i32| values.iter().map(|x| f64::from(*x).powi(power)).sum::<f64>() / values.len() as f64;
        assert_eq!(values.len(), 100_001);
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.04 && (moment(4) - 3.0).abs() < 0.12, "{} {}", moment(3), moment(4));
    }

    /// Fresh models and sampled ids rest on these bits: they must never change.
    #[test]
    fn bits_are_frozen() {
        let frozen = [0x1DF5_DF97_578D_90C0, 0xBB0E_8EB9_91D7_D0F7, 0x077C_A237_7640_7269];
        assert_eq!([counter_hash(0, 0), counter_hash(0, 1), counter_hash(1, 0)], frozen);
        assert_eq!(
            mix(0x9E37_79B9_7F4A_7C15),
            0xE220_A839_7B1D_CDAF,
            "SplitMix64's published first output from state 0"
        );
    }
}
