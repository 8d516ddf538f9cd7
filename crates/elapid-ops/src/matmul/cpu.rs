//! The f32 matrix product on the CPU: blocking, small-row special cases and the division among threads.
//!
//! Work is divided into parts of the result, never along k, so the bits of the result depend neither on the number of
//! threads nor on the number of rows. Both operands are brought into the tiles' order (`pack.rs`) unless so little uses
//! them that this would cost more than it saves; then they are read in place. On several threads the right operand is
//! packed once for all, and blocks of rows go to whoever is free.

use super::block::{
    MC, NC, Output, PACK_COLUMNS, PackPanels, Panels, Rectangle, RowBlock, TileShape,
};
use super::kernel::{KC, MAX_MR, MAX_NR, Operand};
use super::matvec;
use super::pack::PANEL_GAP;
use pulp::Arch;
use rayon::prelude::*;
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Values of the right operand packed at a time by all threads together: 4 MiB.
const PACKED: usize = 1 << 20;
/// Multiply-adds below which a product stays on one thread: about 20 us of work.
const PARALLEL_WORK: usize = 1 << 20;
/// Values that one thread packs by itself: about 20 us of work.
const PARALLEL_PACKING: usize = 1 << 16;
/// Most columns of a result that is computed transposed.
const THIN: usize = 64;
/// The rows that are left, by threads and this, are a block's, if that is less than [`MC`].
const TASKS: usize = 2;
/// Fewest rows of a block, as each reads all panels: a multiple of every MR.
const LEAST_ROWS: usize = 48;

/// A strided matrix over a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// The elements, starting with (0, 0).
    pub data: &'a [f32],
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A contiguous row-major matrix.
    pub fn row_major(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transposed view.
    pub fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// True if every element lies inside the slice.
    pub fn is_valid(&self) -> bool {
        if self.rows == 0 || self.cols == 0 {
            return true;
        }
        let rows = (self.rows - 1).checked_mul(self.row_stride);
        let cols = (self.cols - 1).checked_mul(self.col_stride);
        rows.zip(cols)
            .and_then(|(r, c)| r.checked_add(c))
            .is_some_and(|last| last < self.data.len())
    }

    pub(super) fn operand(&self) -> Operand {
        Operand { ptr: self.data.as_ptr(), row: self.row_stride, col: self.col_stride }
    }
}

thread_local! {
    /// Packed panels, kept between products: fresh megabytes would fault in page by page each time.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Panels that all threads share, kept by the one that asked for the product.
    static PANELS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `out = a b` with `out` [M, N] row-major and contiguous, a [M, K], b [K, N].
///
/// Row i of the result depends on row i of `a` and on `b` alone, bit for bit (see [`super::kernel`]).
/// Shapes and bounds must agree; otherwise nothing is computed and `false` is returned.
#[must_use]
pub fn gemm(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>) -> bool {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if b.rows != k || out.len() != m * n || !a.is_valid() || !b.is_valid() {
        return false;
    }
    if m == 0 || n == 0 {
        return true;
    }
    if k == 0 {
        out.fill(0.0);
        return true;
    }
    // A tall thin result with a left side that must be packed is computed from the other side, where the
    // small operand is the packed one: products commute, so the bits are the same.
    if a.col_stride != 1 && b.col_stride == 1 && n <= THIN && n * 4 <= m {
        let mut flipped = vec![0.0f32; m * n];
        run(&mut flipped, b.transposed(), a.transposed(), false);
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = flipped[j * m + i];
            }
        }
        return true;
    }
    run(out, a, b, false);
    true
}

/// `out += a b`, for sums of products over chunks; otherwise as [`gemm`].
#[must_use]
pub fn gemm_add(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>) -> bool {
    if b.rows != a.cols || out.len() != a.rows * b.cols || !a.is_valid() || !b.is_valid() {
        return false;
    }
    if !out.is_empty() && a.cols > 0 {
        run(out, a, b, true);
    }
    true
}

/// One product for each of `batch` pairs of operands, `a_step` and `b_step` elements apart; `out` is
/// [batch, M, N] and contiguous. As [`gemm`] for each.
#[must_use]
pub fn batched_gemm(
    out: &mut [f32],
    batch: usize,
    (a, a_step): (Matrix<'_>, usize),
    (b, b_step): (Matrix<'_>, usize),
) -> bool {
    let each = a.rows * b.cols;
    if out.len() != batch * each {
        return false;
    }
    if each == 0 {
        return true;
    }
    let one = |(i, out): (usize, &mut [f32])| {
        let (Some(a_data), Some(b_data)) = (a.data.get(i * a_step..), b.data.get(i * b_step..))
        else {
            return false;
        };
        gemm(out, Matrix { data: a_data, ..a }, Matrix { data: b_data, ..b })
    };
    if batch * each * a.cols < PARALLEL_WORK {
        out.chunks_mut(each).enumerate().all(one)
    } else {
        out.par_chunks_mut(each).enumerate().all(one)
    }
}

fn run(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, add: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let output = Output { ptr: out.as_mut_ptr(), stride: n };
    let (a, b) = (a.operand(), b.operand());
    let threads = rayon::current_num_threads();
    if m * n * k < PARALLEL_WORK || threads == 1 {
        rectangle(output, a, b, [m, n, k], add);
    } else if m <= MAX_MR {
        // Every panel is used once or twice: each task brings its own.
        let step = n.div_ceil(threads * TASKS).next_multiple_of(MAX_NR);
        (0..n.div_ceil(step)).into_par_iter().with_max_len(1).for_each(|task| {
            let j = task * step;
            // SAFETY: column j is inside the result and the operand; rectangles of different tasks are disjoint.
            unsafe {
                let corner = Output { ptr: { output }.ptr.add(j), stride: n };
                rectangle(corner, a, b.at(0, j), [m, step.min(n - j), k], add);
            }
        });
    } else {
        shared(output, a, b, [m, n, k], add, threads);
    }
}

/// A product on several threads: they pack the right operand together, [`PACKED`] values at a time, and then each takes
/// blocks of rows until none is left.
fn shared(c: Output, a: Operand, b: Operand, [m, n, k]: [usize; 3], add: bool, threads: usize) {
    let (_, nr) = Arch::new().dispatch(TileShape);
    // Taken, not borrowed: while it waits, this thread may be given a task with a product of its own.
    let mut scratch = PANELS.take();
    for j0 in (0..n).step_by(NC) {
        let cols = NC.min(n - j0);
        let depth = (PACKED / cols / KC).max(1) * KC;
        for k0 in (0..k).step_by(depth) {
            let k = depth.min(k - k0);
            let room = k.div_ceil(KC) * cols.div_ceil(nr) * (KC.min(k) * nr + PANEL_GAP);
            if scratch.len() < room {
                scratch.resize(room, 0.0);
            }
            let panels = Panels { ptr: scratch.as_mut_ptr(), k, cols };
            // SAFETY: (k0, j0) is inside the operands and column j0 inside the result.
            let (a, b, c) = unsafe {
                (a.at(0, k0), b.at(k0, j0), Output { ptr: c.ptr.add(j0), stride: c.stride })
            };
            let groups = cols.div_ceil(PACK_COLUMNS);
            let packers = if k * cols < PARALLEL_PACKING { 1 } else { threads };
            each(groups * k.div_ceil(KC), packers, |i| {
                let (k0, j) = (i / groups * KC, i % groups * PACK_COLUMNS);
                Arch::new().dispatch(PackPanels { b, panels, k0, j });
            });
            let tasks = tasks(m, cols, threads);
            each(tasks.len(), threads, |i| {
                let Task { rows: (i, m), cols: (j, n) } = tasks[i];
                let add = add || k0 > 0;
                SCRATCH.with_borrow_mut(|scratch| {
                    Arch::new().dispatch(RowBlock { c, a, panels, i, m, j, n, add, scratch });
                });
            });
        }
    }
    PANELS.set(scratch);
}

/// Calls `work` with 0..count on all threads, each taking the next number when it has done one.
fn each(count: usize, threads: usize, work: impl Fn(usize) + Sync) {
    if threads == 1 {
        return (0..count).for_each(work);
    }
    let next = AtomicUsize::new(0);
    (0..threads.min(count)).into_par_iter().with_max_len(1).for_each(|_| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            work(i);
        }
    });
}

/// First and number of rows and of columns of a part of the result.
struct Task {
    rows: (usize, usize),
    cols: (usize, usize),
}

/// Blocks of [`MC`] rows, and of fewer towards the end so that all threads end together; columns are divided only where
/// rows are few.
fn tasks(m: usize, n: usize, threads: usize) -> Vec<Task> {
    let mut rows = Vec::new();
    let mut done = 0;
    while done < m {
        let share = (m - done).div_ceil(threads * TASKS).next_multiple_of(MAX_MR);
        let step = share.clamp(LEAST_ROWS, MC).min(m - done);
        rows.push((done, step));
        done += step;
    }
    let parts = (threads * TASKS).div_ceil(rows.len());
    let step = n.div_ceil(parts).next_multiple_of(MAX_NR);
    let split = |rows| (0..n).step_by(step).map(move |j| Task { rows, cols: (j, step.min(n - j)) });
    rows.into_iter().flat_map(split).collect()
}

fn rectangle(c: Output, a: Operand, b: Operand, [m, n, k]: [usize; 3], add: bool) {
    if !add && m <= matvec::MAX_ROWS && a.col == 1 && b.row == 1 {
        // SAFETY: operands and result hold the rectangle.
        unsafe { matvec::few_rows(a, b, c.ptr, c.stride, m, n, k) };
        return;
    }
    SCRATCH.with_borrow_mut(|scratch| {
        Arch::new().dispatch(Rectangle { c, a, b, m, n, k, add, scratch });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{on_threads, random};

    /// Several turns of packing, columns divided among threads, and the last rows in smaller blocks: all of the bits of
    /// one rectangle.
    #[test]
    fn threads_share_panels() {
        for (m, n, k) in [(20, 1100, 2100), (700, 40, 300), (301, 130, 17)] {
            let (a, b) = (random(1, m * k), random(2, n * k));
            let a = Matrix::row_major(&a, m, k);
            let b = Matrix::row_major(&b, n, k).transposed();
            let (mut want, mut got) = (vec![1.0; m * n], vec![1.0; m * n]);
            let output = |out: &mut [f32]| Output { ptr: out.as_mut_ptr(), stride: n };
            rectangle(output(&mut want), a.operand(), b.operand(), [m, n, k], true);
            on_threads(3, || {
                shared(output(&mut got), a.operand(), b.operand(), [m, n, k], true, 3);
            });
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{m} x {n} x {k}");
        }
    }
}
