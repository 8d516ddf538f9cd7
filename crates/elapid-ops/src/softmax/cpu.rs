//! Rows of f32: maximum, exponentials and their sum. Sums go to f64 every few vectors, so that a vocabulary of
//! any size costs no precision.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::simd::{dispatch, exp, load, store};

/// Vectors that are added in f32 before the sum goes to f64.
const VECTORS: usize = 16;
/// Elements of one task.
const TASK: usize = 8 << 10;

/// The largest value; -inf of an empty row. A NaN may or may not win: it shows in the exponentials.
#[inline(always)]
pub(crate) fn row_max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let blocks = row.chunks_exact(S::F32_LANES);
    let rest = blocks.remainder();
    let mut max = simd.splat_f32s(f32::NEG_INFINITY);
    for block in blocks {
        max = simd.max_f32s(load(simd, block), max);
    }
    rest.iter().copied().fold(simd.reduce_max_f32s(max), f32::max)
}

/// `row = e^(row - shift)`; returns the sum.
#[inline(always)]
pub(crate) fn exp_and_sum<S: Simd>(simd: S, row: &mut [f32], shift: f32) -> f64 {
    let minus = simd.splat_f32s(shift);
    let mut total = 0.0;
    for group in row.chunks_mut(S::F32_LANES * VECTORS) {
        let mut sum = simd.splat_f32s(0.0);
        let mut blocks = group.chunks_exact_mut(S::F32_LANES);
        for block in blocks.by_ref() {
            let value = exp(simd, simd.sub_f32s(load(simd, block), minus));
            store(simd, block, value);
            sum = simd.add_f32s(sum, value);
        }
        let rest = blocks.into_remainder();
        if !rest.is_empty() {
            let value = exp(simd, simd.sub_f32s(simd.partial_load_f32s(rest), minus));
            simd.partial_store_f32s(rest, value);
            // Read back: lanes beyond the row are 0 then, and not e^(0 - shift).
            sum = simd.add_f32s(sum, simd.partial_load_f32s(rest));
        }
        total += f64::from(simd.reduce_sum_f32s(sum));
    }
    total
}

/// `row = factor row`.
#[inline(always)]
pub(crate) fn scale_row<S: Simd>(simd: S, row: &mut [f32], factor: f32) {
    let factor = simd.splat_f32s(factor);
    let mut blocks = row.chunks_exact_mut(S::F32_LANES);
    for block in blocks.by_ref() {
        let value = simd.mul_f32s(load(simd, block), factor);
        store(simd, block, value);
    }
    let rest = blocks.into_remainder();
    if !rest.is_empty() {
        let value = simd.mul_f32s(simd.partial_load_f32s(rest), factor);
        simd.partial_store_f32s(rest, value);
    }
}

/// Calls `f(rows of x, rows of out)` for tasks of whole rows.
fn for_rows(x: &[f32], out: &mut [f32], width: usize, f: impl Fn(&[f32], &mut [f32]) + Sync) {
    if out.len() <= TASK {
        f(x, out);
    } else {
        let each = (TASK / width).max(1) * width;
        out.par_chunks_mut(each).zip(x.par_chunks(each)).for_each(|(out, x)| f(x, out));
    }
}

/// `e^x / Σ e^x` of each row of `width`.
pub(super) fn softmax(x: &[f32], out: &mut [f32], width: usize) {
    struct Rows<'a>(&'a mut [f32], usize);
    impl WithSimd for Rows<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for row in self.0.chunks_exact_mut(self.1) {
                let max = row_max(simd, row);
                let sum = exp_and_sum(simd, row, max);
                scale_row(simd, row, (1.0 / sum) as f32);
            }
        }
    }
    for_rows(x, out, width, |x, out| {
        out.copy_from_slice(x);
        dispatch(Rows(out, width));
    });
}

/// `x - ln Σ e^x` of each row of `width`.
pub(super) fn log_softmax(x: &[f32], out: &mut [f32], width: usize) {
    struct Rows<'a>(&'a [f32], &'a mut [f32], usize);
    impl WithSimd for Rows<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(x, out, width) = self;
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                let max = row_max(simd, x);
                out.copy_from_slice(x);
                let ln = exp_and_sum(simd, out, max).ln();
                for (out, x) in out.iter_mut().zip(x) {
                    // x - max is exact or harmless; the sum's logarithm is small beside it.
                    *out = (f64::from(x - max) - ln) as f32;
                }
            }
        }
    }
    for_rows(x, out, width, |x, out| dispatch(Rows(x, out, width)));
}

/// `dx = y (dy - Σ y dy)`, written over `y`'s copy in `dx`.
pub(super) fn softmax_backward(dy: &[f32], dx: &mut [f32], width: usize) {
    for_rows(dy, dx, width, |dy, dx| {
        for (dy, dx) in dy.chunks_exact(width).zip(dx.chunks_exact_mut(width)) {
            let dot: f64 = dy.iter().zip(&*dx).map(|(dy, y)| f64::from(*dy) * f64::from(*y)).sum();
            let dot = dot as f32;
            for (dy, dx) in dy.iter().zip(dx) {
                *dx *= dy - dot;
            }
        }
    });
}

/// `dx = dy - e^y Σ dy`, written over `y`'s copy in `dx`.
pub(super) fn log_softmax_backward(dy: &[f32], dx: &mut [f32], width: usize) {
    for_rows(dy, dx, width, |dy, dx| {
        for (dy, dx) in dy.chunks_exact(width).zip(dx.chunks_exact_mut(width)) {
            let sum = dy.iter().map(|dy| f64::from(*dy)).sum::<f64>() as f32;
            crate::simd::map_in_place(Exp, dx);
            for (dy, dx) in dy.iter().zip(dx) {
                *dx = dy - *dx * sum;
            }
        }
    });
}

#[derive(Clone, Copy)]
struct Exp;

impl crate::simd::Lanewise for Exp {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        exp(simd, x)
    }
}
