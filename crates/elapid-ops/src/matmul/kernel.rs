//! The inner kernels of the matrix product: register tiles and panel packing.
//!
//! Every element of the result is defined as the sum, in order, of the sums of blocks of [`KC`] products,
//! each block a chain of fused multiply-adds in ascending k that starts from zero. All kernels here keep
//! exactly this order, so an element has the same bits whichever kernel, tile, thread or batch computes it,
//! and on every machine with fused multiply-add. Blocks also keep the rounding error of long sums
//! (weight gradients contract over all tokens) near that of a pairwise sum.

use super::transpose::transpose_block;
use pulp::{NullaryFnOnce, Simd};

/// Products summed in one chain. Part of the definition of the result: not a tuning value.
pub(super) const KC: usize = 256;

/// Most rows of a register tile on any machine (AVX-512: 12 x 32).
pub(super) const MAX_MR: usize = 12;

/// Most columns of a register tile on any machine.
pub(super) const MAX_NR: usize = 32;

/// A strided view of an operand: element (i, j) is at `ptr + i * row + j * col`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    pub ptr: *const f32,
    pub row: usize,
    pub col: usize,
}

// SAFETY: an operand is a read-only view; the drivers keep its slice borrowed while tasks run.
unsafe impl Send for Operand {}
// SAFETY: as above.
unsafe impl Sync for Operand {}

impl Operand {
    /// The view that starts at element (i, j).
    ///
    /// # Safety
    /// (i, j) must be inside the view or one past its end.
    #[inline(always)]
    pub unsafe fn at(self, i: usize, j: usize) -> Self {
        // SAFETY: the caller vouches for the offset.
        Self { ptr: unsafe { self.ptr.add(i * self.row + j * self.col) }, ..self }
    }
}

/// Rows and vectors of the register tile that fits the register file of `S`.
#[inline(always)]
pub(super) const fn tile_shape<S: Simd>() -> (usize, usize) {
    match S::F32_LANES {
        16 => (12, 2),
        8 => (6, 2),
        4 => (6, 4),
        _ => (4, 4),
    }
}

/// Columns of the register tile.
#[inline(always)]
pub(super) const fn tile_columns<S: Simd>() -> usize {
    tile_shape::<S>().1 * S::F32_LANES
}

/// Terms of one turn of the inner loop.
const UNROLL: usize = 4;

/// One tile of the result: `rows <= MR`, `cols <= NR`; the product over `k <= KC` terms.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Element (row i, term k) at `a + i * a_row + k` in place, at `a + i + k * MR` if packed.
    pub a: *const f32,
    pub a_row: usize,
    pub packed: bool,
    /// Term k holds NR consecutive columns at `b + k * b_step`.
    pub b: *const f32,
    pub b_step: usize,
    pub k: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    pub rows: usize,
    pub cols: usize,
    /// Add to the result (later blocks of KC) instead of storing.
    pub add: bool,
}

struct TileRows<S, const R: usize, const V: usize, const PACKED: bool> {
    simd: S,
    tile: Tile,
}

impl<S: Simd, const R: usize, const V: usize, const PACKED: bool> NullaryFnOnce
    for TileRows<S, R, V, PACKED>
{
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { simd, tile } = self;
        let lanes = S::F32_LANES;
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        let mut b = tile.b;
        // One pointer a row, which the compiler must not see as multiples of a stride: it would keep the
        // stride on the stack and load it before every element. Packed rows are constants apart.
        let rows: [*const f32; R] = core::array::from_fn(|i| {
            if PACKED {
                tile.a.wrapping_add(i)
            } else {
                core::hint::black_box(tile.a.wrapping_add(i * tile.a_row))
            }
        });
        let step = if PACKED { tile_shape::<S>().0 } else { 1 };
        let mut at = 0;
        // SAFETY: the tile's operands hold `k` terms of R rows and NR columns, the result R x cols elements
        // (the contract of `run_tile`).
        unsafe {
            let mut term = |at: usize, b: *const f32| {
                let mut columns = [simd.splat_f32s(0.0); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = b.add(v * lanes).cast::<S::f32s>().read_unaligned();
                }
                for (row, row_sums) in rows.iter().zip(acc.iter_mut()) {
                    let value = simd.splat_f32s(*row.add(at));
                    for (sum, column) in row_sums.iter_mut().zip(columns) {
                        *sum = simd.mul_add_e_f32s(value, column, *sum);
                    }
                }
            };
            for _ in 0..tile.k / UNROLL {
                for t in 0..UNROLL {
                    term(at + t * step, b);
                    b = b.wrapping_add(tile.b_step);
                }
                at += UNROLL * step;
            }
            for _ in 0..tile.k % UNROLL {
                term(at, b);
                at += step;
                b = b.wrapping_add(tile.b_step);
            }
            if tile.cols == V * lanes {
                for (i, row) in acc.iter().enumerate() {
                    for (v, &sum) in row.iter().enumerate() {
                        let out = tile.c.add(i * tile.c_stride + v * lanes).cast::<S::f32s>();
                        let sum =
                            if tile.add { simd.add_f32s(out.read_unaligned(), sum) } else { sum };
                        out.write_unaligned(sum);
                    }
                }
            } else {
                for (i, row) in acc.iter().enumerate() {
                    let mut buffer = [0.0f32; MAX_NR];
                    for (v, &sum) in row.iter().enumerate() {
                        buffer.as_mut_ptr().add(v * lanes).cast::<S::f32s>().write_unaligned(sum);
                    }
                    for (j, &sum) in buffer.iter().take(tile.cols).enumerate() {
                        let out = tile.c.add(i * tile.c_stride + j);
                        *out = if tile.add { *out + sum } else { sum };
                    }
                }
            }
        }
    }
}

/// Computes one tile.
///
/// # Safety
/// `a` must hold `k` terms of `rows` rows, `b` `k` terms of NR columns (padding included), `c` `rows` rows of
/// `cols` elements that nobody else touches.
#[inline(always)]
pub(super) unsafe fn run_tile<S: Simd>(simd: S, tile: Tile) {
    macro_rules! rows {
        ($v:literal, $($r:literal)*) => {
            match tile.rows {
                $($r if tile.packed => simd.vectorize(TileRows::<S, $r, $v, true> { simd, tile }),
                $r => simd.vectorize(TileRows::<S, $r, $v, false> { simd, tile }),)*
                _ => {}
            }
        };
    }
    match S::F32_LANES {
        16 => rows!(2, 1 2 3 4 5 6 7 8 9 10 11 12),
        8 => rows!(2, 1 2 3 4 5 6),
        4 => rows!(4, 1 2 3 4 5 6),
        _ => rows!(4, 1 2 3 4),
    }
}

/// Panels or tiles packed side by side: reads whole cache lines of each source row without spreading the
/// writes over more streams than a set of the first-level cache holds.
const PACK_GROUP: usize = 4;

/// Packs `k` terms of `cols` columns of `b` (element (k, j) at row k, column j) into panels of NR columns,
/// the last one padded with zeros: panel p, term k, column j at `(p * k_terms + k) * NR + j`.
///
/// # Safety
/// `b` must hold the block and `dst` room for `cols` rounded up to NR times `k` elements.
#[inline(always)]
pub(super) unsafe fn pack_columns<S: Simd>(_: S, b: Operand, k: usize, cols: usize, dst: *mut f32) {
    let (lanes, nr) = (S::F32_LANES, tile_columns::<S>());
    let mut first = 0;
    // SAFETY: columns first.. of the block go to panel first / nr of the destination.
    unsafe {
        if b.col == 1 {
            while first + nr <= cols {
                let group = ((cols - first) / nr).min(PACK_GROUP);
                for t in 0..k {
                    for p in 0..group {
                        let src = b.ptr.add(t * b.row + first + p * nr);
                        let out = dst.add((first + p * nr) * k + t * nr);
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
            let (src, panel) = (b.at(0, first), dst.add(first * k));
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

/// Packs `rows` rows by `k` terms of `a` into tiles of MR rows: tile i, term k, row r at
/// `(i * k_terms + k) * MR + r`. Missing rows of the last tile are left as they are.
///
/// # Safety
/// `a` must hold the block and `dst` room for `rows` rounded up to MR times `k` elements.
#[inline(always)]
pub(super) unsafe fn pack_rows<S: Simd>(_: S, a: Operand, rows: usize, k: usize, dst: *mut f32) {
    // SAFETY: as the caller says.
    unsafe {
        match tile_shape::<S>().0 {
            12 => pack_tiles::<12>(a, rows, k, dst),
            6 => pack_tiles::<6>(a, rows, k, dst),
            _ => pack_tiles::<4>(a, rows, k, dst),
        }
    }
}

/// [`pack_rows`] for a fixed number of rows.
#[inline(always)]
unsafe fn pack_tiles<const MR: usize>(a: Operand, rows: usize, k: usize, dst: *mut f32) {
    // SAFETY: all indices are inside `rows x k` and its packed image.
    unsafe {
        let mut first = 0;
        while first + MR <= rows {
            let group = ((rows - first) / MR).min(PACK_GROUP);
            for t in 0..k {
                for p in 0..group {
                    let src = a.at(first + p * MR, t);
                    let out = dst.add((first + p * MR) * k + t * MR);
                    if a.row == 1 {
                        let values = src.ptr.cast::<[f32; MR]>().read_unaligned();
                        out.cast::<[f32; MR]>().write_unaligned(values);
                    } else {
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
                *dst.add(first * k + t * MR + r - first) = *a.at(r, t).ptr;
            }
        }
    }
}
