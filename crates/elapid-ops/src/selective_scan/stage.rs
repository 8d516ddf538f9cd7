//! The first pass over a chunk, of forward and backward alike: Δ = softplus(δ + bias) and Δu of a tile into scratch.

use pulp::Simd;

use super::arguments::Arguments;
use super::tile::{Spot, TOGETHER, Tile, largest, load_vectors, raise, steps_stride, store_step};
use crate::simd::{load, softplus_each, softplus_with_derivative_each, store};

/// Δ, Δu and, if `SLOPE` and there is a softplus, its derivative of `steps` steps, as `[vector][step][lane]` that
/// are [`steps_stride`] apart; Δ added to `sum`. Returns the largest |Δ|.
#[inline(always)]
pub(super) fn stage<S: Simd, const SLOPE: bool>(
    simd: S,
    x: &Arguments<'_, f32>,
    tile: &Tile,
    start: usize,
    steps: usize,
    (delta, delta_u, slope): (&mut [f32], &mut [f32], &mut [f32]),
    sum: &mut [f32],
) -> f32 {
    let mut most = simd.splat_u32s(0);
    let stride = steps_stride::<S>(steps);
    // Step by step over the whole tile, so that memory is read in long runs.
    for i in 0..steps {
        tile.prefetch(&x.delta, start + i);
        tile.prefetch(&x.u, start + i);
        let mut v = 0;
        while v < tile.vectors::<S>() {
            let staged = (&mut *delta, &mut *delta_u, &mut *slope);
            let first = v * stride + i * S::F32_LANES;
            let at = Spot { token: start + i, vector: v, start: first, stride };
            if tile.is_full::<S>(v, TOGETHER) {
                stage_vectors::<S, TOGETHER, SLOPE>(simd, x, tile, at, staged, &mut most);
                v += TOGETHER;
            } else {
                stage_vectors::<S, 1, SLOPE>(simd, x, tile, at, staged, &mut most);
                v += 1;
            }
        }
    }
    for (v, sum) in sum.chunks_exact_mut(S::F32_LANES).enumerate() {
        let rows = &delta[v * stride..][..steps * S::F32_LANES];
        let mut total = simd.splat_f32s(0.0);
        for &step in S::as_simd_f32s(rows).0 {
            total = simd.add_f32s(total, step);
        }
        let before = load(simd, sum);
        store(simd, sum, simd.add_f32s(before, total));
    }
    largest(simd, most)
}

/// [`stage`] for K vectors of a token.
#[inline(always)]
fn stage_vectors<S: Simd, const K: usize, const SLOPE: bool>(
    simd: S,
    x: &Arguments<'_, f32>,
    tile: &Tile,
    at: Spot,
    (delta, delta_u, slope): (&mut [f32], &mut [f32], &mut [f32]),
    most: &mut S::u32s,
) {
    let Spot { token: t, vector: v, start: at, stride } = at;
    let mut steps = load_vectors::<S, K>(simd, tile.row(&x.delta, t), v);
    if let Some(bias) = x.delta_bias {
        let bias = load_vectors::<S, K>(simd, tile.part(bias), v);
        for (step, bias) in steps.iter_mut().zip(bias) {
            *step = simd.add_f32s(*step, bias);
        }
    }
    if x.delta_softplus && SLOPE {
        let (value, derivative) = softplus_with_derivative_each(simd, steps);
        store_step(simd, slope, at, stride, derivative);
        steps = value;
    } else if x.delta_softplus {
        steps = softplus_each(simd, steps);
    }
    let mut inputs = load_vectors::<S, K>(simd, tile.row(&x.u, t), v);
    for (input, &step) in inputs.iter_mut().zip(&steps) {
        *most = raise(simd, *most, step);
        *input = simd.mul_f32s(step, *input);
    }
    store_step(simd, delta, at, stride, steps);
    store_step(simd, delta_u, at, stride, inputs);
}
