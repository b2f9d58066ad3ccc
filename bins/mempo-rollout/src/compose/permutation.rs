//! A seeded order of the numbers below n that takes no memory: a Feistel network over the next even number of bits, walked on
//! until it falls below n (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

const ROUNDS: u64 = 6;

/// Says which number stands at each place.
pub(crate) struct Permutation {
    seed: u64,
    count: u64,
    half_bits: u32,
}

impl Permutation {
    /// The order of the numbers from 0 to below `count` that `seed` gives.
    pub(crate) fn new(seed: u64, count: usize) -> Self {
        let count = count as u64;
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        Self { seed, count, half_bits: bits.div_ceil(2).max(1) }
    }

    /// All numbers in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.count as usize).map(|place| self.at(place))
    }

    /// The number at a place below the count.
    pub(crate) fn at(&self, place: usize) -> usize {
        debug_assert!((place as u64) < self.count);
        let mut value = self.mixed(place as u64);
        // A bijection of the larger range comes back to a place below the count before it comes round.
        while value >= self.count {
            value = self.mixed(value);
        }
        value as usize
    }

    fn mixed(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let round = |(left, right): (u64, u64), round: u64| (right, left ^ (hash(self.seed, round, right) & mask));
        let (left, right) = (0..ROUNDS).fold((value >> self.half_bits, value & mask), round);
        (left << self.half_bits) | right
    }
}

/// SplitMix64's finaliser over its arguments (Steele, Lea and Flood 2014).
fn hash(seed: u64, round: u64, value: u64) -> u64 {
    let mut mixed = seed ^ (round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ value.wrapping_mul(0xd129_0f4a_1b2d_9e35);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once_in_an_order_of_the_seed() {
        for count in (0..70).chain([255, 256, 257, 5000]) {
            let mut numbers: Vec<usize> = Permutation::new(7, count).iter().collect();
            assert_eq!(numbers, Permutation::new(7, count).iter().collect::<Vec<_>>());
            assert!(count < 20 || numbers != Permutation::new(8, count).iter().collect::<Vec<_>>());
            numbers.sort_unstable();
            assert_eq!(numbers, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_number_comes_first_about_as_often() {
        let mut first = [0; 10];
        (0..10_000).for_each(|seed| first[Permutation::new(seed, 10).at(0)] += 1);
        assert!(first.iter().all(|times| (850..1150).contains(times)), "{first:?}");
    }
}
