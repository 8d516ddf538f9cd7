//! Operands brought into the order in which the tiles read them.
//!
//! The right operand goes to panels of NR columns. The left one is copied: row by row where its rows are contiguous
//! along k, term by term into tiles of MR rows where they are not. Rows in memory are often a power of two apart,
//! so that they share few sets of the first-level cache and take an entry of the page table's cache each; here they
//! are a cache line off. For the same reason panels and tiles are a line longer than what they hold: they are
//! written side by side.

use super::kernel::{KC, Operand, tile_columns, tile_shape};
use super::transpose::transpose_block;
use crate::simd::{LINE, prefetch};
use pulp::Simd;

/// Elements from one copied row of the left operand to the next. A constant, which the tile's addresses contain.
pub(super) const COPIED_ROW: usize = KC + LINE;

/// Panels written side by side.
const PANELS: usize = 8;
/// Tiles written side by side: more than there are in a block of rows, so that each line is read once.
const TILES: usize = 16;
/// Terms by which packing asks for memory ahead; the processor does not foresee rows so far apart.
const AHEAD: usize = 8;

/// Elements between packed panels.
pub(super) const PANEL_GAP: usize = LINE;

/// Elements from one packed panel of `k` terms to the next: a line more than it holds, or the panels' rows would
/// fall on the same few sets of the first-level cache while they are written.
#[inline(always)]
pub(super) const fn panel_stride<S: Simd>(k: usize) -> usize {
    k * tile_columns::<S>() + PANEL_GAP
}

/// Elements from one packed tile of `k` terms to the next, likewise.
#[inline(always)]
pub(super) const fn tile_stride<S: Simd>(k: usize) -> usize {
    (k * tile_shape::<S>().0).next_multiple_of(LINE) + LINE
}

/// Packs `k` terms of `cols` columns of `b` (element (k, j) at row k, column j) into panels of NR columns,
/// the last one padded with zeros: panel p, term k, column j at `p * panel_stride + k * NR + j`.
///
/// # Safety
/// `b` must hold the block and `dst` room for `cols / NR` panels, rounded up.
#[inline(always)]
pub(super) unsafe fn pack_columns<S: Simd>(_: S, b: Operand, k: usize, cols: usize, dst: *mut f32) {
    let (lanes, nr, stride) = (S::F32_LANES, tile_columns::<S>(), panel_stride::<S>(k));
    let mut first = 0;
    // SAFETY: columns first.. of the block go to panel first / nr of the destination.
    unsafe {
        if b.col == 1 {
            while first + nr <= cols {
                let group = ((cols - first) / nr).min(PANELS);
                for t in 0..k {
                    let row = b.ptr.add(t * b.row + first);
                    prefetch(row.wrapping_add(AHEAD * b.row), group * nr);
                    for p in 0..group {
                        let src = row.add(p * nr);
                        let out = dst.add((first / nr + p) * stride + t * nr);
                        for v in 0..nr / lanes {
                            let value = src.add(v * lanes).cast::<S::f32s>().read_unaligned();
                            out.add(v * lanes).cast::<S::f32s>().write_unaligned(value);
                        }
                    }
                }
                first += group * nr;
            }
        }
        while first < cols {
            let width = nr.min(cols - first);
            let (src, panel) = (b.at(0, first), dst.add(first / nr * stride));
            if width < nr {
                core::ptr::write_bytes(panel, 0, k * nr);
            }
            if b.row == 1 {
                transpose_block(src.ptr, b.col, width, k, panel, nr);
            } else {
                for t in 0..k {
                    for j in 0..width {
                        *panel.add(t * nr + j) = *src.at(t, j).ptr;
                    }
                }
            }
            first += nr;
        }
    }
}

/// Copies `rows` rows of `k <= KC` terms of `a`, contiguous along k, to rows [`COPIED_ROW`] apart.
///
/// # Safety
/// `a` must hold the block and `dst` room for `rows` rows.
#[inline(always)]
pub(super) unsafe fn copy_rows<S: Simd>(_: S, a: Operand, rows: usize, k: usize, dst: *mut f32) {
    // SAFETY: the caller vouches for both.
    unsafe {
        for i in 0..rows {
            let (src, out) = (a.at(i, 0).ptr, dst.add(i * COPIED_ROW));
            prefetch(src.wrapping_add(2 * a.row), k);
            let mut t = 0;
            while t + S::F32_LANES <= k {
                let value = src.add(t).cast::<S::f32s>().read_unaligned();
                out.add(t).cast::<S::f32s>().write_unaligned(value);
                t += S::F32_LANES;
            }
            while t < k {
                *out.add(t) = *src.add(t);
                t += 1;
            }
        }
    }
}

/// Packs `rows` rows by `k` terms of `a` into tiles of MR rows: tile i, term k, row r at
/// `i * tile_stride + k * MR + r`. Missing rows of the last tile are left as they are.
///
/// # Safety
/// `a` must hold the block and `dst` room for `rows / MR` tiles, rounded up.
#[inline(always)]
pub(super) unsafe fn pack_rows<S: Simd>(simd: S, a: Operand, rows: usize, k: usize, dst: *mut f32) {
    // SAFETY: as the caller says.
    unsafe {
        match tile_shape::<S>().0 {
            12 => pack_tiles::<S, 12>(simd, a, rows, k, dst),
            6 => pack_tiles::<S, 6>(simd, a, rows, k, dst),
            _ => pack_tiles::<S, 4>(simd, a, rows, k, dst),
        }
    }
}

/// [`pack_rows`] for a fixed number of rows.
#[inline(always)]
unsafe fn pack_tiles<S: Simd, const MR: usize>(
    _: S,
    a: Operand,
    rows: usize,
    k: usize,
    dst: *mut f32,
) {
    let lanes = S::F32_LANES;
    let stride = tile_stride::<S>(k);
    // Values copied for a term: whole vectors, of which the next term overwrites what is too much.
    let whole = MR.next_multiple_of(lanes);
    // SAFETY: all indices are inside `rows x k` and its packed image.
    unsafe {
        let mut first = 0;
        while first + MR <= rows {
            let group = ((rows - first) / MR).min(TILES);
            // Tiles behind which the operand has as many rows more as are copied too much.
            let wide = ((rows - first).saturating_sub(whole - MR) / MR).min(group);
            for t in 0..k {
                if a.row == 1 {
                    let row = a.ptr.add(first + t * a.col);
                    prefetch(row.wrapping_add(AHEAD * a.col), group * MR);
                    let out = dst.add(first / MR * stride + t * MR);
                    for p in 0..wide {
                        for v in (0..whole).step_by(lanes) {
                            let value = row.add(p * MR + v).cast::<S::f32s>().read_unaligned();
                            out.add(p * stride + v).cast::<S::f32s>().write_unaligned(value);
                        }
                    }
                    for p in wide..group {
                        let values = row.add(p * MR).cast::<[f32; MR]>().read_unaligned();
                        out.add(p * stride).cast::<[f32; MR]>().write_unaligned(values);
                    }
                } else {
                    for p in 0..group {
                        let src = a.at(first + p * MR, t);
                        let out = dst.add((first / MR + p) * stride + t * MR);
                        for r in 0..MR {
                            *out.add(r) = *src.at(r, 0).ptr;
                        }
                    }
                }
            }
            first += group * MR;
        }
        for t in 0..k {
            for r in first..rows {
                *dst.add(first / MR * stride + t * MR + r - first) = *a.at(r, t).ptr;
            }
        }
    }
}
