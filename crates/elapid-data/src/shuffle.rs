//! A seeded permutation of `0..n` that is computed and not stored: any place of any epoch's order costs
//! the same, so a position in shuffled data is one number. A Feistel network over the smallest even number
//! of bits that holds `n`, with Philox as round function, walked until it lands below `n` (Black and Rogaway, 2002).

use elapid_tensor::rng;

/// Random draws of this module.
const STREAM: u64 = 0x0073_6875_6666_6c65;
const ROUNDS: u64 = 6;

/// One epoch's order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permutation {
    seed: u64,
    epoch: u64,
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// The order of `0..len` in epoch `epoch`.
    pub(crate) fn new(seed: u64, epoch: u64, len: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { seed, epoch, len, half_bits: bits.div_ceil(2).max(1) }
    }

    /// What stands at `place`, which must be below the length.
    pub(crate) fn get(&self, place: u64) -> u64 {
        debug_assert!(place < self.len);
        let mut value = place;
        loop {
            value = self.step(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn step(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            // A half has at most 32 bits, so the round number fits beside it.
            let [a, ..] = rng::draw(self.seed, STREAM, self.epoch, right | round << 40);
            (left, right) = (right, left ^ (u64::from(a) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64, epoch: u64, len: u64) -> Vec<u64> {
        let permutation = Permutation::new(seed, epoch, len);
        (0..len).map(|place| permutation.get(place)).collect()
    }

    #[test]
    fn is_a_permutation() {
        for len in (1..70).chain([255, 256, 257, 1000, 4097]) {
            let mut sorted = order(3, 1, len);
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..len), "{len}");
        }
    }

    #[test]
    fn seed_and_epoch_change_it() {
        assert_eq!(order(1, 2, 100), order(1, 2, 100));
        assert_ne!(order(1, 2, 100), order(1, 3, 100));
        assert_ne!(order(1, 2, 100), order(2, 2, 100));
    }

    #[test]
    fn every_item_may_stand_anywhere() {
        // 5 items, 4000 orders: each of the 25 pairs about 800 times (standard deviation 25).
        let mut counts = [[0u32; 5]; 5];
        for epoch in 0..4000 {
            for (place, item) in order(7, epoch, 5).into_iter().enumerate() {
                counts[place][item as usize] += 1;
            }
        }
        assert!(counts.iter().flatten().all(|&c| (680..920).contains(&c)), "{counts:?}");
    }
}
