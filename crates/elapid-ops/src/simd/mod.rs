//! Vector arithmetic on `f32` that picks its instruction set at run time.
//!
//! Everything is generic over [`pulp::Simd`], so one source serves AVX-512, AVX2 with FMA, NEON and plain scalar
//! code; [`dispatch`] chooses among them once per process. Elementary functions are our own, because the
//! compiler does not vectorise calls of the C library, and because a lane must give the same bits wherever it
//! stands: in a full vector, in a tail, alone. Tails therefore go through partial loads of the same vector
//! code and never through a second, scalar version.
//!
//! - [`exp`], [`exp2`], [`decay_exp2`] and [`sin_cos`]: `exponential.rs`, `trigonometric.rs`.
//! - [`sigmoid`], [`silu`], [`softplus`] and their derivatives: `activation.rs`.
//! - The same over slices: `slices.rs`.
//! - Asking for memory ahead: `ahead.rs`.

use std::sync::OnceLock;

use pulp::{Arch, Simd, WithSimd};

mod activation;
mod ahead;
mod exponential;
mod slices;
#[cfg(test)]
mod tests;
mod trigonometric;

pub use activation::{
    SOFTPLUS_THRESHOLD, sigmoid, sigmoid_derivative, sigmoid_each, silu, silu_derivative,
    silu_each, silu_with_derivative, silu_with_derivative_each, softplus, softplus_derivative,
    softplus_each, softplus_with_derivative_each,
};
pub(crate) use ahead::{
    LINE, prefetch, prefetch_line, prefetch_line_to_write, prefetch_outer, prefetch_to_write,
};
pub use exponential::{
    DECAY_RANGE, DecayConstants, decay_constants, decay_exp2, decay_exp2_in_range, exp, exp2,
};
pub use slices::{
    Lanewise, LanewisePair, exp_slice, map, map_in_place, map_pair, sigmoid_slice,
    silu_backward_slice, silu_slice, softplus_slice,
};
pub use trigonometric::sin_cos;

/// The instruction set of this machine, asked once.
pub fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(Arch::new)
}

/// Runs `op` compiled for the best instruction set of this machine.
///
/// Code called from `op` must be `#[inline(always)]` all the way down, or it is compiled for the baseline.
#[inline]
pub fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    arch().dispatch(op)
}

/// Reads `LANES` values from the front of `slice`.
///
/// # Panics
/// If the slice is shorter than a vector.
#[inline(always)]
pub fn load<S: Simd>(_simd: S, slice: &[f32]) -> S::f32s {
    assert!(slice.len() >= S::F32_LANES);
    // SAFETY: the slice holds a whole vector, and the read makes no demand on alignment.
    unsafe { slice.as_ptr().cast::<S::f32s>().read_unaligned() }
}

/// Writes a vector to the front of `slice`.
///
/// # Panics
/// If the slice is shorter than a vector.
#[inline(always)]
pub fn store<S: Simd>(_simd: S, slice: &mut [f32], value: S::f32s) {
    assert!(slice.len() >= S::F32_LANES);
    // SAFETY: the slice holds a whole vector, and the write makes no demand on alignment.
    unsafe { slice.as_mut_ptr().cast::<S::f32s>().write_unaligned(value) }
}

/// `x` where it is at least `low` or NaN, else `low`.
#[inline(always)]
pub(crate) fn clamp_below<S: Simd>(simd: S, x: S::f32s, low: f32) -> S::f32s {
    let low = simd.splat_f32s(low);
    simd.select_f32s(simd.less_than_f32s(x, low), low, x)
}

/// `x` where it is at most `high` or NaN, else `high`.
#[inline(always)]
pub(crate) fn clamp_above<S: Simd>(simd: S, x: S::f32s, high: f32) -> S::f32s {
    let high = simd.splat_f32s(high);
    simd.select_f32s(simd.less_than_f32s(high, x), high, x)
}

/// The polynomial `c[0] + c[1] x + ..` by Horner's rule.
#[inline(always)]
pub(crate) fn polynomial<S: Simd, const C: usize>(simd: S, x: S::f32s, c: [f32; C]) -> S::f32s {
    let [sum] = polynomial_each(simd, [x], c);
    sum
}

/// [`polynomial`] of several vectors, term by term.
#[inline(always)]
pub(crate) fn polynomial_each<S: Simd, const K: usize, const C: usize>(
    simd: S,
    x: [S::f32s; K],
    c: [f32; C],
) -> [S::f32s; K] {
    let mut sums = [simd.splat_f32s(c[C - 1]); K];
    for &c in c[..C - 1].iter().rev() {
        let c = simd.splat_f32s(c);
        for (sum, &x) in sums.iter_mut().zip(&x) {
            *sum = simd.mul_add_e_f32s(*sum, x, c);
        }
    }
    sums
}
