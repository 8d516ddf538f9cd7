//! Blocks of the matrix product: operands packed or copied, and the register tiles run over them.
//!
//! A [`Rectangle`] packs both operands itself; a [`RowBlock`] finds the right one in panels that others have packed
//! ([`PackPanels`]). Both work through [`block`].

use super::kernel::{KC, Left, Operand, Tiles, run_tiles, tile_columns, tile_shape};
use super::pack::{COPIED_ROW, copy_rows, pack_columns, pack_rows, panel_stride, tile_stride};
use pulp::{Simd, WithSimd};

/// Rows of the left operand kept in the second-level cache while all panels pass by: a multiple of every MR.
pub(super) const MC: usize = 96;
/// Columns packed at a time.
pub(super) const NC: usize = 1024;
/// Columns of one task of packing: a whole number of panels.
pub(super) const PACK_COLUMNS: usize = 128;
/// Most terms of a block whose tiles follow one another along the rows of the result instead of down its columns.
const SHORT: usize = 64;
/// Fewest rows and columns of a rectangle for which rows of the left operand are copied.
const COPY_ROWS: usize = 16;
const COPY_COLUMNS: usize = 64;

/// The result matrix, shared by the tasks that each own a rectangle of it.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub ptr: *mut f32,
    pub stride: usize,
}

// SAFETY: tasks write disjoint rectangles.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Asks for rows and columns of the register tile of this machine.
pub(super) struct TileShape;

impl WithSimd for TileShape {
    type Output = (usize, usize);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
        (tile_shape::<S>().0, tile_columns::<S>())
    }
}

/// Panels of `k` terms of `cols` columns: those of the first [`KC`] terms, then those of the next.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    pub ptr: *mut f32,
    pub k: usize,
    pub cols: usize,
}

// SAFETY: tasks write disjoint panels, and read them when all are written.
unsafe impl Send for Panels {}
// SAFETY: as above.
unsafe impl Sync for Panels {}

impl Panels {
    /// The panels of the terms from `k0` on, a multiple of [`KC`].
    #[inline(always)]
    fn block<S: Simd>(self, k0: usize) -> *mut f32 {
        let one = self.cols.div_ceil(tile_columns::<S>()) * panel_stride::<S>(KC);
        self.ptr.wrapping_add(k0 / KC * one)
    }
}

/// Packs up to [`PACK_COLUMNS`] columns of up to [`KC`] terms.
pub(super) struct PackPanels {
    pub b: Operand,
    pub panels: Panels,
    pub k0: usize,
    pub j: usize,
}

impl WithSimd for PackPanels {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { b, panels, k0, j } = self;
        let (kc, cols) = (KC.min(panels.k - k0), PACK_COLUMNS.min(panels.cols - j));
        let to =
            panels.block::<S>(k0).wrapping_add(j / tile_columns::<S>() * panel_stride::<S>(kc));
        // SAFETY: the block is inside the operand and the panels, whose task this is.
        unsafe { pack_columns(simd, b.at(k0, j), kc, cols, to) };
    }
}

/// Rows `i..i + m` of columns `j..j + n` of the result, from packed panels.
pub(super) struct RowBlock<'a> {
    pub c: Output,
    pub a: Operand,
    pub panels: Panels,
    pub i: usize,
    pub m: usize,
    pub j: usize,
    pub n: usize,
    pub add: bool,
    pub scratch: &'a mut Vec<f32>,
}

impl WithSimd for RowBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { c, a, panels, i, m, j, n, add, scratch } = self;
        let left = left_of(a, m, n);
        let room = left_room::<S>(left, m, KC.min(panels.k));
        if scratch.len() < room {
            scratch.resize(room, 0.0);
        }
        for k0 in (0..panels.k).step_by(KC) {
            let k = KC.min(panels.k - k0);
            let first = j / tile_columns::<S>() * panel_stride::<S>(k);
            // SAFETY: the block is inside the operand, the panels and the result, whose task this is.
            unsafe {
                let c = Output { ptr: c.ptr.add(i * c.stride + j), stride: c.stride };
                let b = panels.block::<S>(k0).wrapping_add(first);
                let right = Right { full: 0, in_place: a, packed: b };
                let add = add || k0 > 0;
                block(simd, c, (a.at(i, k0), left), right, [m, n, k], add, scratch.as_mut_ptr());
            }
        }
    }
}

/// A part of the result whose operands it packs itself.
pub(super) struct Rectangle<'a> {
    pub c: Output,
    pub a: Operand,
    pub b: Operand,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Whether the product is added to the result's values.
    pub add: bool,
    pub scratch: &'a mut Vec<f32>,
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
        let a_room = left_room::<S>(left, m, kc_most);
        if scratch.len() < a_room + b_room {
            scratch.resize(a_room + b_room, 0.0);
        }
        let (b_pack, a_pack) = scratch.split_at_mut(b_room);
        let (b_pack, a_pack) = (b_pack.as_mut_ptr(), a_pack.as_mut_ptr());
        for j0 in (0..n).step_by(NC) {
            let cols = NC.min(n - j0);
            for k0 in (0..k).step_by(KC) {
                let kc = KC.min(k - k0);
                let full = if in_place { cols / nr * nr } else { 0 };
                // SAFETY: the blocks are inside the operands, the packed images inside the scratch, and the
                // tiles inside the rectangle, which is this task's own.
                unsafe {
                    pack_columns(simd, b.at(k0, j0 + full), kc, cols - full, b_pack);
                    let right = Right { full, in_place: b.at(k0, j0), packed: b_pack };
                    for i0 in (0..m).step_by(MC) {
                        let rows = MC.min(m - i0);
                        let c = Output { ptr: c.ptr.add(i0 * c.stride + j0), stride: c.stride };
                        let a = (a.at(i0, k0), left);
                        block(simd, c, a, right, [rows, cols, kc], add || k0 > 0, a_pack);
                    }
                }
            }
        }
    }
}

/// Where a block finds its columns: the first `full` in the operand itself, a whole number of panels, the rest packed.
#[derive(Clone, Copy)]
struct Right {
    full: usize,
    in_place: Operand,
    packed: *const f32,
}

/// Values of scratch that a block's left operand takes.
#[inline(always)]
fn left_room<S: Simd>(left: Left, m: usize, k: usize) -> usize {
    match left {
        Left::InPlace => 0,
        Left::Copied => m.min(MC) * COPIED_ROW,
        Left::Packed => m.min(MC).div_ceil(tile_shape::<S>().0) * tile_stride::<S>(k),
    }
}

/// At most [`MC`] rows of `cols` columns, from `k <= KC` terms.
///
/// # Safety
/// Operands, panels and result must hold the block, `a_pack` as much as [`left_room`] says; nobody else may touch this
/// part of the result.
#[inline(always)]
unsafe fn block<S: Simd>(
    simd: S,
    c: Output,
    (a, left): (Operand, Left),
    right: Right,
    [rows, cols, k]: [usize; 3],
    add: bool,
    a_pack: *mut f32,
) {
    let (mr, nr) = (tile_shape::<S>().0, tile_columns::<S>());
    let (panel, tile) = (panel_stride::<S>(k), tile_stride::<S>(k));
    // SAFETY: as the caller says.
    unsafe {
        match left {
            Left::InPlace => {}
            Left::Copied => copy_rows(simd, a, rows, k, a_pack),
            Left::Packed => pack_rows(simd, a, rows, k, a_pack),
        }
        let a_step = match left {
            Left::InPlace => mr * a.row,
            Left::Copied => mr * COPIED_ROW,
            Left::Packed => tile,
        };
        let tiles = Tiles {
            count: rows / mr,
            a: if left == Left::InPlace { a.ptr } else { a_pack.cast_const() },
            a_step,
            a_row: a.row,
            left,
            b: right.packed,
            b_step: nr,
            panel_step: 0,
            next_b: None,
            k,
            c: c.ptr,
            c_stride: c.stride,
            c_step: mr * c.stride,
            next_c: c.ptr,
            rows: mr,
            cols: nr,
            add,
        };
        if k <= SHORT && right.full == 0 {
            // Little is done for each value of the result, which is written in the order of its memory.
            for i in (0..rows).step_by(mr) {
                let row = Tiles {
                    count: cols / nr,
                    a: tiles.a.add(i / mr * a_step),
                    a_step: 0,
                    panel_step: panel,
                    c: c.ptr.add(i * c.stride),
                    c_step: nr,
                    next_c: c.ptr.wrapping_add((i + mr) * c.stride),
                    rows: mr.min(rows - i),
                    ..tiles
                };
                run_tiles(simd, row);
                let full = cols / nr * nr;
                if full < cols {
                    let (b, c) = (row.b.add(row.count * panel), row.c.add(full));
                    run_tiles(simd, Tiles { count: 1, b, c, cols: cols - full, ..row });
                }
            }
            return;
        }
        for j in (0..cols).step_by(nr) {
            let (b, b_step) = if j < right.full {
                (right.in_place.at(0, j).ptr, right.in_place.row)
            } else {
                (right.packed.add((j - right.full) / nr * panel), nr)
            };
            let column = Tiles {
                b,
                b_step,
                next_b: (j >= right.full && j + nr < cols).then(|| b.wrapping_add(panel)),
                c: c.ptr.add(j),
                next_c: c.ptr.wrapping_add(j + nr),
                cols: nr.min(cols - j),
                ..tiles
            };
            run_tiles(simd, column);
            let full = tiles.count * mr;
            if full < rows {
                let (a, c) = (column.a.add(column.count * a_step), column.c.add(full * c.stride));
                run_tiles(simd, Tiles { count: 1, a, c, rows: rows - full, ..column });
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
    use super::super::cpu::{Matrix, gemm};
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
