//! Sums and maxima of f32. A sum is cut into groups whose bounds depend on nothing but the reduced extent; a
//! group is added in f32, groups are added in f64 and in order. So the bits do not depend on the number of
//! threads, and a long sum is about as exact as one in f64.

use elapid_tensor::Buffer;
use pulp::WithSimd;
use rayon::prelude::*;

use crate::simd::dispatch;

/// Elements added in f32 along a row.
const GROUP: usize = 1024;
/// Groups of a row that are one task.
const GROUPS_EACH: usize = 32;
/// Rows added in f32 when columns are summed.
const GROUP_ROWS: usize = 64;
/// Below this many elements a second thread costs more than it saves.
const PARALLEL_FROM: usize = 64 << 10;

/// `out[o, i] = factor Σ_c x[o, c, i]`.
pub(super) fn sum(x: &[f32], extents: [usize; 3], factor: f64) -> Buffer<f32> {
    let [outer, count, inner] = extents;
    let mut out = Buffer::<f32>::scratch(outer * inner);
    if count == 0 || out.is_empty() {
        out.fill(0.0);
    } else if inner == 1 {
        sum_rows(x, count, factor, &mut out);
    } else {
        sum_columns(x, extents, factor, &mut out);
    }
    out
}

fn sum_rows(x: &[f32], count: usize, factor: f64, out: &mut [f32]) {
    const TASK: usize = GROUP * GROUPS_EACH;
    let round = |sum: f64| (sum * factor) as f32;
    if x.len() < PARALLEL_FROM {
        for (out, row) in out.iter_mut().zip(x.chunks_exact(count)) {
            *out = round(row.chunks(TASK).map(sum_task).sum());
        }
    } else if count < 2 * TASK {
        let rows_each = (GROUP * 16).div_ceil(count);
        out.par_chunks_mut(rows_each).zip(x.par_chunks(rows_each * count)).for_each(|(out, x)| {
            for (out, row) in out.iter_mut().zip(x.chunks_exact(count)) {
                *out = round(row.chunks(TASK).map(sum_task).sum());
            }
        });
    } else {
        for (out, row) in out.iter_mut().zip(x.chunks_exact(count)) {
            let parts: Vec<f64> = row.par_chunks(TASK).map(sum_task).collect();
            *out = round(parts.iter().sum());
        }
    }
}

fn sum_task(x: &[f32]) -> f64 {
    const LANES: usize = 16;
    struct Sum<'a>(&'a [f32]);
    impl WithSimd for Sum<'_> {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _simd: S) -> f64 {
            let mut total = 0.0;
            for group in self.0.chunks(GROUP) {
                let mut lanes = [0f32; LANES];
                let blocks = group.chunks_exact(LANES);
                let rest = blocks.remainder();
                for block in blocks {
                    for (lane, value) in lanes.iter_mut().zip(block) {
                        *lane += value;
                    }
                }
                for (lane, value) in lanes.iter_mut().zip(rest) {
                    *lane += value;
                }
                total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
            }
            total
        }
    }
    dispatch(Sum(x))
}

fn sum_columns(x: &[f32], [_, count, inner]: [usize; 3], factor: f64, out: &mut [f32]) {
    struct AddRows<'a>(&'a [f32], &'a mut [f32]);
    impl WithSimd for AddRows<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _simd: S) {
            let Self(rows, sum) = self;
            sum.fill(0.0);
            for row in rows.chunks_exact(sum.len()) {
                for (sum, value) in sum.iter_mut().zip(row) {
                    *sum += value;
                }
            }
        }
    }
    let groups = count.div_ceil(GROUP_ROWS);
    let mut partial = Buffer::<f32>::scratch(out.len() * groups);
    let fill = |(number, sum): (usize, &mut [f32])| {
        let (o, group) = (number / groups, number % groups);
        let rows =
            (o * count + group * GROUP_ROWS)..(o * count + count.min((group + 1) * GROUP_ROWS));
        dispatch(AddRows(&x[rows.start * inner..rows.end * inner], sum));
    };
    if x.len() < PARALLEL_FROM {
        partial.chunks_exact_mut(inner).enumerate().for_each(fill);
    } else {
        let each = (16_384 / (inner * count.min(GROUP_ROWS))).max(1);
        partial.par_chunks_exact_mut(inner).enumerate().with_min_len(each).for_each(fill);
    }
    let mut total = vec![0f64; inner];
    for (out, partial) in out.chunks_exact_mut(inner).zip(partial.chunks_exact(groups * inner)) {
        total.fill(0.0);
        for group in partial.chunks_exact(inner) {
            for (total, value) in total.iter_mut().zip(group) {
                *total += f64::from(*value);
            }
        }
        for (out, total) in out.iter_mut().zip(&total) {
            *out = (total * factor) as f32;
        }
    }
}

/// The largest value and where along `count` it stands first; NaN is larger than everything.
pub(super) fn max(x: &[f32], [outer, count, inner]: [usize; 3]) -> (Buffer<f32>, Vec<usize>) {
    let mut values = Buffer::<f32>::scratch(outer * inner);
    let mut places = vec![0; outer * inner];
    values.fill(f32::NEG_INFINITY);
    if x.is_empty() {
        return (values, places);
    }
    let fill = |((values, places), x): ((&mut [f32], &mut [usize]), &[f32])| {
        for (c, row) in x.chunks_exact(inner).enumerate() {
            for ((best, place), &value) in values.iter_mut().zip(places.iter_mut()).zip(row) {
                if value > *best || (value.is_nan() && !best.is_nan()) {
                    (*best, *place) = (value, c);
                }
            }
        }
    };
    if x.len() < PARALLEL_FROM {
        values
            .chunks_exact_mut(inner)
            .zip(places.chunks_exact_mut(inner))
            .zip(x.chunks_exact(count * inner))
            .for_each(fill);
    } else {
        let each = (16_384 / (count * inner)).max(1);
        values
            .par_chunks_exact_mut(inner)
            .zip(places.par_chunks_exact_mut(inner))
            .zip(x.par_chunks_exact(count * inner))
            .with_min_len(each)
            .for_each(fill);
    }
    (values, places)
}
