//! The loops that find what one thread of the machine can do at most: read memory, multiply and add in
//! registers, update scan states in registers. Each is compiled for every instruction set and picked at run
//! time, as the operations that are compared with it.

use std::hint::black_box;

use elapid_ops::simd::{DecayConstants, decay_constants, decay_exp2_in_range, dispatch};
use pulp::{Simd, WithSimd};

/// Reads every value once, with eight independent sums so that additions never wait for each other.
pub fn read(values: &[f32]) {
    black_box(dispatch(Read(values)));
}

struct Read<'a>(&'a [f32]);

impl WithSimd for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (vectors, _) = S::as_simd_f32s(self.0);
        let mut sums = [simd.splat_f32s(0.0); 8];
        let (blocks, _) = vectors.as_chunks::<8>();
        for block in blocks {
            for (sum, &vector) in sums.iter_mut().zip(block) {
                *sum = simd.add_f32s(*sum, vector);
            }
        }
        let total = sums.into_iter().fold(simd.splat_f32s(0.0), |a, b| simd.add_f32s(a, b));
        simd.reduce_sum_f32s(total)
    }
}

/// Floating-point operations (two a fused multiply-add) that `rounds` of the register loop did.
pub fn multiply_add(rounds: usize) -> f64 {
    dispatch(MultiplyAdd(rounds))
}

struct MultiplyAdd(usize);

/// Independent sums: latency times the number of multiply-add units, and no more than fits in registers
/// (16 on x86-64 before AVX-512, 32 on aarch64, where wide cores have four units).
const CHAINS: usize = if cfg!(target_arch = "aarch64") { 24 } else { 12 };

impl WithSimd for MultiplyAdd {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let factor = simd.splat_f32s(black_box(0.5));
        let mut sums = [simd.splat_f32s(black_box(1.0)); CHAINS];
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = simd.mul_add_e_f32s(*sum, factor, factor);
            }
        }
        let total = sums.into_iter().fold(factor, |a, b| simd.add_f32s(a, b));
        black_box(simd.reduce_sum_f32s(total));
        2.0 * (self.0 * CHAINS * S::F32_LANES) as f64
    }
}

/// Scan state updates that `rounds` of the register loop did: h ← exp2(Δ a) h + Δu b, y ← y + c h, that is
/// one exp2, two products and two fused multiply-adds each. `wide` keeps eight states at once, otherwise
/// four: which is faster depends on the number of registers.
pub fn update_states(rounds: usize, wide: bool) -> f64 {
    if wide { dispatch(UpdateStates::<8>(rounds)) } else { dispatch(UpdateStates::<4>(rounds)) }
}

struct UpdateStates<const K: usize>(usize);

/// Steps whose Δ, Δu, B and C lie in the first-level cache.
const STEPS: usize = 64;

impl<const K: usize> WithSimd for UpdateStates<K> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let constants: DecayConstants<S> = decay_constants(simd);
        let constants = black_box(&constants);
        let rates: [S::f32s; K] = std::array::from_fn(
            #[inline(always)]
            |i| simd.splat_f32s(-1.0 - i as f32),
        );
        let rates = black_box(&rates);
        // Δ, Δu, B and C of each step.
        let steps = [simd.splat_f32s(0.01); STEPS];
        let inputs = [simd.splat_f32s(0.005); STEPS];
        let (b, c) = ([[0.5f32; K]; STEPS], [[0.25f32; K]; STEPS]);
        let (steps, inputs) = (black_box(&steps), black_box(&inputs));
        let (b, c) = (black_box(&b), black_box(&c));
        let mut h = [simd.splat_f32s(0.0); K];
        let mut outputs = [simd.splat_f32s(0.0); STEPS];
        for _ in 0..self.0 {
            // Looked at from outside after every round, so that none can be left out.
            let outputs = black_box(&mut outputs).iter_mut();
            let operands = steps.iter().zip(inputs).zip(b.iter().zip(c));
            for (y, ((&step, &input), (b, c))) in outputs.zip(operands) {
                let mut exponents = *rates;
                for exponent in &mut exponents {
                    *exponent = simd.mul_f32s(*exponent, step);
                }
                let decays = decay_exp2_in_range(simd, constants, exponents);
                let mut sum = *y;
                for i in 0..K {
                    let input = simd.mul_f32s(input, simd.splat_f32s(b[i]));
                    h[i] = simd.mul_add_e_f32s(decays[i], h[i], input);
                    sum = simd.mul_add_e_f32s(simd.splat_f32s(c[i]), h[i], sum);
                }
                *y = sum;
            }
        }
        black_box(h);
        (self.0 * STEPS * K * S::F32_LANES) as f64
    }
}
