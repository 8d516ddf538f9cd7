//! Copies of rows, and sums of rows into the rows they came from. The sums are made target by target from a
//! counting sort, so threads never write to the same row and the order of additions is that of the sources.

use std::ops::AddAssign;

use elapid_tensor::{Buffer, Element, RowView};
use rayon::prelude::*;

/// Below this many elements a second thread costs more than it saves.
const PARALLEL_FROM: usize = 64 << 10;
/// Elements of one task.
const TASK: usize = 16 << 10;

/// `out[k] = x[rows[k]]`; every number must be a row of `x`.
pub(crate) fn take_rows<T: Element>(x: RowView<'_, T>, rows: &[usize]) -> Buffer<T> {
    let width = x.width;
    let mut out = Buffer::scratch(rows.len() * width);
    if out.is_empty() {
        return out;
    }
    let copy = |(out, rows): (&mut [T], &[usize])| {
        for (out, &row) in out.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(x.row(row));
        }
    };
    if out.len() < PARALLEL_FROM {
        copy((&mut out, rows));
    } else {
        let each = (TASK / width).max(1);
        out.par_chunks_mut(each * width).zip(rows.par_chunks(each)).for_each(copy);
    }
    out
}

/// `dx[rows[k]] += dy[k]` into `count` rows of zeros, in the order of `k`; every number must be below `count`.
pub(crate) fn scatter_add<T: Element + AddAssign>(
    dy: &[T],
    rows: &[usize],
    width: usize,
    count: usize,
) -> Buffer<T> {
    let mut dx = Buffer::zeros(count * width);
    if dx.is_empty() || rows.is_empty() {
        return dx;
    }
    // ends[row] is where the sources of `row` begin, and after the sort where they end.
    let mut ends = vec![0usize; count + 1];
    for &row in rows {
        ends[row + 1] += 1;
    }
    for row in 0..count {
        ends[row + 1] += ends[row];
    }
    let mut sources = vec![0; rows.len()];
    for (k, &row) in rows.iter().enumerate() {
        sources[ends[row]] = k;
        ends[row] += 1;
    }
    let add = |first: usize, dx: &mut [T]| {
        for (row, dx) in (first..).zip(dx.chunks_exact_mut(width)) {
            let begin = if row == 0 { 0 } else { ends[row - 1] };
            for &k in &sources[begin..ends[row]] {
                for (dx, dy) in dx.iter_mut().zip(&dy[k * width..][..width]) {
                    *dx += *dy;
                }
            }
        }
    };
    if dy.len() < PARALLEL_FROM {
        add(0, &mut dx);
    } else {
        // Targets differ much in their number of sources, so there are many more tasks than threads.
        let each = count.div_ceil(256);
        dx.par_chunks_mut(each * width).enumerate().for_each(|(task, dx)| add(task * each, dx));
    }
    dx
}
