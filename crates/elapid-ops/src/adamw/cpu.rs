//! The update in one pass over memory, and the norm of gradients. Both are bound by memory: 28 bytes a
//! parameter for the step, 4 for the norm.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::simd::{dispatch, load, store};

/// Elements of one task.
const BLOCK: usize = 16 << 10;

/// The step's numbers in the form in which they meet an element.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    /// `1 - lr weight_decay`.
    pub(super) keep: f32,
    pub(super) beta1: f32,
    /// `1 - beta1`.
    pub(super) rest1: f32,
    pub(super) beta2: f32,
    /// `1 - beta2`.
    pub(super) rest2: f32,
    /// `lr / (1 - beta1^step)`.
    pub(super) step_size: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    pub(super) root_factor: f32,
    pub(super) epsilon: f32,
    pub(super) grad_scale: f32,
}

struct Step<'a> {
    factors: Factors,
    p: &'a mut [f32],
    g: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

impl Factors {
    /// New `(p, m, v)`.
    #[inline(always)]
    fn apply<S: Simd>(
        &self,
        simd: S,
        p: S::f32s,
        g: S::f32s,
        m: S::f32s,
        v: S::f32s,
    ) -> (S::f32s, S::f32s, S::f32s) {
        let splat = |value| simd.splat_f32s(value);
        let g = simd.mul_f32s(g, splat(self.grad_scale));
        let p = simd.mul_f32s(p, splat(self.keep));
        let m = simd.mul_add_e_f32s(g, splat(self.rest1), simd.mul_f32s(m, splat(self.beta1)));
        let squared = simd.mul_f32s(simd.mul_f32s(g, g), splat(self.rest2));
        let v = simd.mul_add_e_f32s(v, splat(self.beta2), squared);
        let root = simd.sqrt_f32s(v);
        let divisor = simd.mul_add_e_f32s(root, splat(self.root_factor), splat(self.epsilon));
        let update = simd.div_f32s(simd.mul_f32s(m, splat(self.step_size)), divisor);
        (simd.sub_f32s(p, update), m, v)
    }
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { factors, p, g, m, v } = self;
        let mut p = p.chunks_exact_mut(S::F32_LANES);
        let mut g = g.chunks_exact(S::F32_LANES);
        let mut m = m.chunks_exact_mut(S::F32_LANES);
        let mut v = v.chunks_exact_mut(S::F32_LANES);
        for (((p, g), m), v) in p.by_ref().zip(g.by_ref()).zip(m.by_ref()).zip(v.by_ref()) {
            let (new_p, new_m, new_v) =
                factors.apply(simd, load(simd, p), load(simd, g), load(simd, m), load(simd, v));
            store(simd, p, new_p);
            store(simd, m, new_m);
            store(simd, v, new_v);
        }
        let (p, g) = (p.into_remainder(), g.remainder());
        let (m, v) = (m.into_remainder(), v.into_remainder());
        if !g.is_empty() {
            let part = |slice: &[f32]| simd.partial_load_f32s(slice);
            let (new_p, new_m, new_v) = factors.apply(simd, part(p), part(g), part(m), part(v));
            simd.partial_store_f32s(p, new_p);
            simd.partial_store_f32s(m, new_m);
            simd.partial_store_f32s(v, new_v);
        }
    }
}

/// One step over slices of one length.
pub(super) fn step(factors: Factors, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    if p.len() <= BLOCK {
        dispatch(Step { factors, p, g, m, v });
    } else {
        p.par_chunks_mut(BLOCK)
            .zip(g.par_chunks(BLOCK))
            .zip(m.par_chunks_mut(BLOCK))
            .zip(v.par_chunks_mut(BLOCK))
            .for_each(|(((p, g), m), v)| dispatch(Step { factors, p, g, m, v }));
    }
}

/// `Σ x²` in f64, over blocks in order. The squares of f32 values neither overflow nor vanish in f64, so the sum
/// is inf or NaN only if a value is.
pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
    const LANES: usize = 16;
    struct Squares<'a>(&'a [f32]);
    impl WithSimd for Squares<'_> {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _simd: S) -> f64 {
            let mut lanes = [0f64; LANES];
            let blocks = self.0.chunks_exact(LANES);
            let rest = blocks.remainder();
            for block in blocks {
                for (lane, &value) in lanes.iter_mut().zip(block) {
                    *lane += f64::from(value) * f64::from(value);
                }
            }
            for (lane, &value) in lanes.iter_mut().zip(rest) {
                *lane += f64::from(value) * f64::from(value);
            }
            lanes.iter().sum()
        }
    }
    if x.len() <= 2 * BLOCK {
        x.chunks(BLOCK).map(|block| dispatch(Squares(block))).sum()
    } else {
        let parts: Vec<f64> = x.par_chunks(BLOCK).map(|block| dispatch(Squares(block))).collect();
        parts.iter().sum()
    }
}
