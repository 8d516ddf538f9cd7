//! The f32 matrix product on the CPU: blocking, small-row special cases and the division among threads.
//!
//! Work is divided into rectangles of the result, never along k, and each rectangle packs what it needs, so
//! the bits of the result depend neither on the number of threads nor on the number of rows. Both operands are
//! brought into the tiles' order (`pack.rs`) unless so little uses them that this would cost more than it saves;
//! then they are read in place.

use super::kernel::{KC, Left, MAX_MR, MAX_NR, Operand, Tile, run_tile, tile_columns, tile_shape};
use super::matvec;
use super::pack::{COPIED_ROW, copy_rows, pack_columns, pack_rows, panel_stride, tile_stride};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::cell::RefCell;

/// Rows of the left operand kept in the second-level cache while all panels pass by: a multiple of every MR.
const MC: usize = 96;
/// Columns packed at a time: KC x NC floats are 1 MiB.
const NC: usize = 1024;
/// Multiply-adds below which a product stays on one thread: about 20 us of work.
const PARALLEL_WORK: usize = 1 << 20;
/// Most columns of a result that is computed transposed.
const THIN: usize = 64;
/// Tasks of a thread: more would even out a thread that is held up, but every task packs its part of the operands.
const TASKS: usize = 2;
/// Least multiply-adds of one task.
const TASK_WORK: usize = 1 << 18;

/// Fewest rows and columns of a rectangle for which rows of the left operand are copied.
const COPY_ROWS: usize = 16;
const COPY_COLUMNS: usize = 64;

/// Cost of an element of the left operand copied or read in place: a pass over the caches.
const LEFT_IN_PLACE: f64 = 0.2;
/// Cost of an element packed by whole vectors.
const PACK_PANELS: f64 = 0.4;
/// Cost of an element packed by transposing or in short runs.
const PACK: f64 = 1.0;

/// A division into fewer rows must cost less than this part of that into most rows.
const CLEARLY: f64 = 0.97;

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

    fn operand(&self) -> Operand {
        Operand { ptr: self.data.as_ptr(), row: self.row_stride, col: self.col_stride }
    }
}

/// The result matrix, shared by the tasks that each own a rectangle of it.
#[derive(Clone, Copy)]
struct Output {
    ptr: *mut f32,
    stride: usize,
}

// SAFETY: tasks write disjoint rectangles.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

thread_local! {
    /// Packed panels, kept between products: fresh megabytes would fault in page by page each time.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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
    let work = m * n * k;
    let threads = rayon::current_num_threads();
    if work < PARALLEL_WORK || threads == 1 {
        rectangle(output, a, b, [m, n, k], add);
        return;
    }
    let (row_step, col_step) = division([m, n, k], a, b, threads);
    let (row_tasks, col_tasks) = (m.div_ceil(row_step), n.div_ceil(col_step));
    (0..row_tasks * col_tasks).into_par_iter().with_max_len(1).for_each(|task| {
        let (i, j) = (task / col_tasks * row_step, task % col_tasks * col_step);
        let (rows, cols) = (row_step.min(m - i), col_step.min(n - j));
        // SAFETY: (i, j) is inside the result and the operands; rectangles of different tasks are disjoint.
        unsafe {
            let corner = Output { ptr: { output }.ptr.add(i * n + j), stride: n };
            rectangle(corner, a.at(i, 0), b.at(0, j), [rows, cols, k], add);
        }
    });
}

/// Rows and columns of one task, about two tasks a thread. Each task packs its own part of the operands, so of
/// all divisions the one is taken whose longest thread has least to do by a rough count of cycles: a task of few
/// rows packs much of the right operand for little work, one of few columns passes over much of the left one.
fn division([m, n, k]: [usize; 3], a: Operand, b: Operand, threads: usize) -> (usize, usize) {
    // Per element, in units of sixteen multiply-adds.
    let left = if a.col == 1 { LEFT_IN_PLACE } else { PACK };
    let right = if b.col == 1 { PACK_PANELS } else { PACK };
    let tasks = (m * n * k / TASK_WORK).clamp(1, threads * TASKS);
    let division = |row_tasks: usize| {
        let col_tasks = tasks.div_ceil(row_tasks);
        let row_step = m.div_ceil(row_tasks).next_multiple_of(MAX_MR).min(m.max(1));
        let col_step = n.div_ceil(col_tasks).next_multiple_of(MAX_NR).min(n.max(1));
        (row_step, col_step)
    };
    let cost = |&(row_step, col_step): &(usize, usize)| {
        let rounds = (m.div_ceil(row_step) * n.div_ceil(col_step)).div_ceil(threads);
        let work = (row_step * col_step) as f64 / 16.0;
        rounds as f64 * (work + left * row_step as f64 + right * col_step as f64)
    };
    // Whole rows unless something else is clearly better: they write the result in the longest runs.
    let most_rows = tasks.min(m.div_ceil(MC)).max(1);
    let rows = division(most_rows);
    let best = (1..most_rows).map(division).min_by(|x, y| cost(x).total_cmp(&cost(y)));
    best.filter(|best| cost(best) < CLEARLY * cost(&rows)).unwrap_or(rows)
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

struct Rectangle<'a> {
    c: Output,
    a: Operand,
    b: Operand,
    m: usize,
    n: usize,
    k: usize,
    /// Whether the product is added to the result's values.
    add: bool,
    scratch: &'a mut Vec<f32>,
}

impl WithSimd for Rectangle<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { c, a, b, m, n, k, add, scratch } = self;
        let (mr, nr) = (tile_shape::<S>().0, tile_columns::<S>());
        // With one tile of rows every panel is used once: full panels are then read in place.
        let in_place = b.col == 1 && m <= mr;
        let left = left_of(a, m, n);
        let kc_most = KC.min(k);
        let b_room = n.min(NC).div_ceil(nr) * panel_stride::<S>(kc_most);
        let a_room = match left {
            Left::InPlace => 0,
            Left::Copied => m.min(MC) * COPIED_ROW,
            Left::Packed => m.min(MC).div_ceil(mr) * tile_stride::<S>(kc_most),
        };
        if scratch.len() < a_room + b_room {
            scratch.resize(a_room + b_room, 0.0);
        }
        let (b_pack, a_pack) = scratch.split_at_mut(b_room);
        let (b_pack, a_pack) = (b_pack.as_mut_ptr(), a_pack.as_mut_ptr());
        for j0 in (0..n).step_by(NC) {
            let cols = NC.min(n - j0);
            for k0 in (0..k).step_by(KC) {
                let kc = KC.min(k - k0);
                let (panel, tile) = (panel_stride::<S>(kc), tile_stride::<S>(kc));
                let full = if in_place { cols / nr * nr } else { 0 };
                // SAFETY: the blocks are inside the operands, the packed images inside the scratch, and the
                // tiles inside the rectangle, which is this task's own.
                unsafe {
                    pack_columns(simd, b.at(k0, j0 + full), kc, cols - full, b_pack);
                    for i0 in (0..m).step_by(MC) {
                        let rows = MC.min(m - i0);
                        let block = a.at(i0, k0);
                        match left {
                            Left::InPlace => {}
                            Left::Copied => copy_rows(simd, block, rows, kc, a_pack),
                            Left::Packed => pack_rows(simd, block, rows, kc, a_pack),
                        }
                        for j in (0..cols).step_by(nr) {
                            let (b, b_step) = if j < full {
                                (b.at(k0, j0 + j).ptr.cast_mut(), b.row)
                            } else {
                                (b_pack.add((j - full) / nr * panel), nr)
                            };
                            for i in (0..rows).step_by(mr) {
                                let (a, a_row) = match left {
                                    Left::InPlace => (block.at(i, 0).ptr, block.row),
                                    Left::Copied => (a_pack.cast_const().add(i * COPIED_ROW), 0),
                                    Left::Packed => (a_pack.cast_const().add(i / mr * tile), 0),
                                };
                                run_tile(
                                    simd,
                                    Tile {
                                        a,
                                        a_row,
                                        left,
                                        b,
                                        b_step,
                                        k: kc,
                                        c: c.ptr.add((i0 + i) * c.stride + j0 + j),
                                        c_stride: c.stride,
                                        rows: mr.min(rows - i),
                                        cols: nr.min(cols - j),
                                        add: add || k0 > 0,
                                    },
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// How a block of the left operand reaches the tiles of a rectangle of `m x n`: one that few columns use is not worth
/// a copy.
fn left_of(a: Operand, m: usize, n: usize) -> Left {
    if a.col != 1 {
        Left::Packed
    } else if m >= COPY_ROWS && n >= COPY_COLUMNS {
        Left::Copied
    } else {
        Left::InPlace
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, random, widen};

    /// The tile shapes of machines without vectors agree with those of this one.
    #[test]
    fn scalar_tiles() {
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (13, 33, 300), (100, 20, 40)] {
            let (a, b) = (random(1, m * k), random(2, n * k));
            for a_matrix in [Matrix::row_major(&a, m, k), Matrix::row_major(&a, k, m).transposed()]
            {
                for b_matrix in
                    [Matrix::row_major(&b, k, n), Matrix::row_major(&b, n, k).transposed()]
                {
                    let mut want = vec![0.0; m * n];
                    assert!(gemm(&mut want, a_matrix, b_matrix));
                    let mut got = vec![0.0; m * n];
                    let c = Output { ptr: got.as_mut_ptr(), stride: n };
                    let (a, b, scratch) = (a_matrix.operand(), b_matrix.operand(), &mut Vec::new());
                    Rectangle { c, a, b, m, n, k, add: false, scratch }
                        .with_simd(pulp::Scalar::new());
                    close("product", &widen(&got), &widen(&want), 2e-6);
                }
            }
        }
    }
}
