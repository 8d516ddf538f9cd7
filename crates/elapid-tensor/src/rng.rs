//! Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
//!
//! A draw is a pure function of (seed, stream, id, position): it does not depend on the order in which
//! draws are made, on the batch that a sequence is in, or on the thread that makes it. [`Rng`] walks
//! through such draws in order and can be saved and restored as three numbers.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten Philox rounds on a 128-bit counter under a 64-bit key.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(c2);
        (c0, c1, c2, c3) =
            ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// The key of the draws of (seed, stream).
pub fn key(seed: u64, stream: u64) -> u64 {
    mix(seed ^ mix(stream))
}

/// The 128 random bits that belong to (seed, stream, id, position).
pub fn draw(seed: u64, stream: u64, id: u64, position: u64) -> [u32; 4] {
    let key = key(seed, stream);
    philox4x32(
        [position as u32, (position >> 32) as u32, id as u32, (id >> 32) as u32],
        [key as u32, (key >> 32) as u32],
    )
}

/// The finaliser of SplitMix64: every output bit depends on every input bit.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// 24 random bits as a float in [0, 1).
pub fn unit_f32(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// 53 random bits as a float in [0, 1).
pub fn unit_f64(high: u32, low: u32) -> f64 {
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 * (1.0 / 9_007_199_254_740_992.0)
}

/// A stream of random numbers; its three public numbers are its whole state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    /// The run's seed.
    pub seed: u64,
    /// The purpose: initialisation, shuffling, sampling, ... each has its own.
    pub stream: u64,
    /// Number of 128-bit blocks drawn so far.
    pub counter: u64,
}

impl Rng {
    /// The stream's beginning.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, counter: 0 }
    }

    fn block(&mut self) -> [u32; 4] {
        let block = draw(self.seed, self.stream, 0, self.counter);
        self.counter += 1;
        block
    }

    /// Uniform 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, ..] = self.block();
        u64::from(a) << 32 | u64::from(b)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        let [a, b, ..] = self.block();
        unit_f64(a, b)
    }

    /// Uniform in `0..bound` without bias; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        // Lemire's method: the low half of the product tells whether the draw falls in the biased part.
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= bound.wrapping_neg() % bound {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let [a, b, c, d] = self.block();
        let radius = (-2.0 * (1.0 - unit_f64(a, b)).ln()).sqrt();
        radius * (std::f64::consts::TAU * unit_f64(c, d)).cos()
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn a_saved_stream_goes_on_where_it_was() {
        let mut rng = Rng::new(3, 1);
        for _ in 0..10 {
            rng.normal();
        }
        let mut restored = Rng { ..rng.clone() };
        assert_eq!(rng.next_u64(), restored.next_u64());
        assert_ne!(Rng::new(3, 1).next_u64(), Rng::new(3, 2).next_u64());
        assert_ne!(Rng::new(3, 1).next_u64(), Rng::new(4, 1).next_u64());
    }

    #[test]
    fn moments() {
        let mut rng = Rng::new(0, 0);
        let n = 40_000;
        let draws: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let mut counts = [0u32; 7];
        for _ in 0..7000 {
            counts[rng.below(7) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (850..1150).contains(&c)), "{counts:?}");
    }
}
