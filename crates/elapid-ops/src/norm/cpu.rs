//! Rows on the CPU: vectors along the row, threads over blocks of rows.
//!
//! A row's sums have an order that only its width and the vector width decide. Sums over rows (gradients of
//! weight and bias) run within blocks of [`BLOCK`] rows and then over the blocks in order, whatever the threads.

use elapid_tensor::{Buffer, RowView};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::simd::{dispatch, load, store};

/// Rows that one thread takes, and over which parameter gradients are first summed.
const BLOCK: usize = 64;
/// Elements below which a second thread costs more than it brings.
const SERIAL: usize = 1 << 14;

/// Which normalisation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// Subtract the mean.
    pub center: bool,
    /// Added to the mean square or variance.
    pub eps: f32,
}

/// Scale and bias of the width C, where there are any.
#[derive(Debug, Clone, Copy)]
pub(super) struct Affine<'a> {
    pub weight: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
}

/// y [T, C] and, if `residual` is given, x + residual [T, C].
pub(super) fn forward(
    kind: Kind,
    x: RowView<'_, f32>,
    residual: Option<RowView<'_, f32>>,
    affine: Affine<'_>,
) -> (Buffer<f32>, Option<Buffer<f32>>) {
    let (t, c) = (x.rows, x.width);
    let mut y = Buffer::<f32>::scratch(t * c);
    if t * c == 0 {
        return (y, residual.map(|_| Buffer::scratch(0)));
    }
    let Some(residual) = residual else {
        by_blocks(&mut y, c, |first, y| {
            for (i, y) in y.chunks_exact_mut(c).enumerate() {
                dispatch(Normalize { kind, row: x.row(first + i), affine, y });
            }
        });
        return (y, None);
    };
    let mut sum = Buffer::<f32>::scratch(t * c);
    let work = |first: usize, y: &mut [f32], sum: &mut [f32]| {
        for (i, (y, sum)) in y.chunks_exact_mut(c).zip(sum.chunks_exact_mut(c)).enumerate() {
            for ((sum, a), b) in sum.iter_mut().zip(x.row(first + i)).zip(residual.row(first + i)) {
                *sum = a + b;
            }
            dispatch(Normalize { kind, row: sum, affine, y });
        }
    };
    if t * c <= SERIAL {
        work(0, &mut y, &mut sum);
    } else {
        let blocks = y.par_chunks_mut(BLOCK * c).zip(sum.par_chunks_mut(BLOCK * c));
        blocks
            .with_max_len(1)
            .enumerate()
            .for_each(|(block, (y, sum))| work(block * BLOCK, y, sum));
    }
    (y, Some(sum))
}

/// Gradients by r [T, C], weight [C] and bias [C]; `dr` starts from `dsum`, the gradient that r has besides.
pub(super) fn backward(
    kind: Kind,
    r: RowView<'_, f32>,
    weight: Option<&[f32]>,
    dy: RowView<'_, f32>,
    dsum: Option<RowView<'_, f32>>,
) -> (Buffer<f32>, Buffer<f32>, Buffer<f32>) {
    let (t, c) = (r.rows, r.width);
    let mut dr = Buffer::<f32>::scratch(t * c);
    let (mut dweight, mut dbias) = (Buffer::<f32>::zeros(c), Buffer::<f32>::zeros(c));
    if t * c == 0 {
        return (dr, dweight, dbias);
    }
    let mut partial = Buffer::<f32>::zeros(t.div_ceil(BLOCK) * 2 * c);
    let work = |block: usize, dr: &mut [f32], partial: &mut [f32]| {
        let (dweight, dbias) = partial.split_at_mut(c);
        for (i, dr) in dr.chunks_exact_mut(c).enumerate() {
            let row = block * BLOCK + i;
            dispatch(Differentiate {
                kind,
                row: r.row(row),
                weight,
                dy: dy.row(row),
                dsum: dsum.map(|dsum| dsum.row(row)),
                dr,
                dweight,
                dbias,
            });
        }
    };
    let blocks = dr.par_chunks_mut(BLOCK * c).zip(partial.par_chunks_mut(2 * c)).enumerate();
    if t * c <= SERIAL {
        for (block, (dr, partial)) in
            dr.chunks_mut(BLOCK * c).zip(partial.chunks_mut(2 * c)).enumerate()
        {
            work(block, dr, partial);
        }
    } else {
        blocks.with_max_len(1).for_each(|(block, (dr, partial))| work(block, dr, partial));
    }
    for partial in partial.chunks_exact(2 * c) {
        for (sum, value) in dweight.iter_mut().zip(&partial[..c]) {
            *sum += value;
        }
        for (sum, value) in dbias.iter_mut().zip(&partial[c..]) {
            *sum += value;
        }
    }
    (dr, dweight, dbias)
}

fn by_blocks(rows: &mut [f32], c: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if rows.len() <= SERIAL {
        work(0, rows);
    } else {
        rows.par_chunks_mut(BLOCK * c)
            .with_max_len(1)
            .enumerate()
            .for_each(|(block, rows)| work(block * BLOCK, rows));
    }
}

struct Normalize<'a> {
    kind: Kind,
    row: &'a [f32],
    affine: Affine<'a>,
    y: &'a mut [f32],
}

impl WithSimd for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { kind, row, affine, y } = self;
        let (mean, scale) = statistics(simd, kind, row);
        let (mean, scale) = (simd.splat_f32s(mean), simd.splat_f32s(scale));
        let mut at = 0;
        while at < row.len() {
            let mut value = simd.mul_f32s(simd.sub_f32s(read(simd, row, at), mean), scale);
            match (affine.weight, affine.bias) {
                (Some(weight), Some(bias)) => {
                    value = simd.mul_add_f32s(value, read(simd, weight, at), read(simd, bias, at));
                }
                (Some(weight), None) => value = simd.mul_f32s(value, read(simd, weight, at)),
                (None, Some(bias)) => value = simd.add_f32s(value, read(simd, bias, at)),
                (None, None) => {}
            }
            write(simd, y, at, value);
            at += S::F32_LANES;
        }
    }
}

struct Differentiate<'a> {
    kind: Kind,
    row: &'a [f32],
    weight: Option<&'a [f32]>,
    dy: &'a [f32],
    dsum: Option<&'a [f32]>,
    dr: &'a mut [f32],
    dweight: &'a mut [f32],
    dbias: &'a mut [f32],
}

impl WithSimd for Differentiate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { kind, row, weight, dy, dsum, dr, dweight, dbias } = self;
        let c = row.len() as f32;
        let (mean, scale) = statistics(simd, kind, row);
        let (mean, scales) = (simd.splat_f32s(mean), simd.splat_f32s(scale));
        let mut along = simd.splat_f32s(0.0);
        let mut middle = simd.splat_f32s(0.0);
        let mut at = 0;
        while at < row.len() {
            let normed = simd.mul_f32s(simd.sub_f32s(read(simd, row, at), mean), scales);
            let d = read(simd, dy, at);
            let g = match weight {
                Some(weight) => simd.mul_f32s(d, read(simd, weight, at)),
                None => d,
            };
            // Lanes past the end read as zeros; d is zero there, so they add nothing.
            along = simd.mul_add_f32s(g, normed, along);
            middle = simd.add_f32s(middle, g);
            let sum = simd.mul_add_f32s(d, normed, read(simd, dweight, at));
            write(simd, dweight, at, sum);
            let sum = simd.add_f32s(d, read(simd, dbias, at));
            write(simd, dbias, at, sum);
            at += S::F32_LANES;
        }
        let along = simd.splat_f32s(simd.reduce_sum_f32s(along) / c);
        let middle =
            simd.splat_f32s(if kind.center { simd.reduce_sum_f32s(middle) / c } else { 0.0 });
        let mut at = 0;
        while at < row.len() {
            let normed = simd.mul_f32s(simd.sub_f32s(read(simd, row, at), mean), scales);
            let d = read(simd, dy, at);
            let g = match weight {
                Some(weight) => simd.mul_f32s(d, read(simd, weight, at)),
                None => d,
            };
            let inner = simd.sub_f32s(simd.sub_f32s(g, middle), simd.mul_f32s(normed, along));
            let value = match dsum {
                Some(dsum) => simd.mul_add_f32s(scales, inner, read(simd, dsum, at)),
                None => simd.mul_f32s(scales, inner),
            };
            write(simd, dr, at, value);
            at += S::F32_LANES;
        }
    }
}

/// (mean, 1 / sqrt(mean square or variance + eps)) of a row.
#[inline(always)]
fn statistics<S: Simd>(simd: S, kind: Kind, row: &[f32]) -> (f32, f32) {
    let c = row.len() as f32;
    let mut mean = 0.0;
    if kind.center {
        let mut sum = simd.splat_f32s(0.0);
        let mut at = 0;
        while at < row.len() {
            sum = simd.add_f32s(sum, read(simd, row, at));
            at += S::F32_LANES;
        }
        mean = simd.reduce_sum_f32s(sum) / c;
    }
    let means = simd.splat_f32s(mean);
    let mut square = simd.splat_f32s(0.0);
    let mut at = 0;
    while at + S::F32_LANES <= row.len() {
        let value = simd.sub_f32s(load(simd, &row[at..]), means);
        square = simd.mul_add_f32s(value, value, square);
        at += S::F32_LANES;
    }
    let mut square = simd.reduce_sum_f32s(square);
    // Past the end there is nothing to subtract the mean from, so the tail goes value by value.
    for value in &row[at..] {
        square += (value - mean) * (value - mean);
    }
    (mean, 1.0 / (square / c + kind.eps).sqrt())
}

#[inline(always)]
fn read<S: Simd>(simd: S, row: &[f32], at: usize) -> S::f32s {
    let rest = &row[at..];
    if rest.len() >= S::F32_LANES { load(simd, rest) } else { simd.partial_load_f32s(rest) }
}

#[inline(always)]
fn write<S: Simd>(simd: S, row: &mut [f32], at: usize, value: S::f32s) {
    let rest = &mut row[at..];
    if rest.len() >= S::F32_LANES {
        store(simd, rest, value);
    } else {
        simd.partial_store_f32s(rest, value);
    }
}
