//! The inner kernel of the matrix product: register tiles.
//!
//! Every element of the result is defined as the sum, in order, of the sums of blocks of [`KC`] products,
//! each block a chain of fused multiply-adds in ascending k that starts from zero. All kernels here keep
//! exactly this order, so an element has the same bits whichever kernel, tile, thread or batch computes it,
//! and on every machine with fused multiply-add. Blocks also keep the rounding error of long sums
//! (weight gradients contract over all tokens) near that of a pairwise sum.

use super::pack::COPIED_ROW;
use crate::simd::{prefetch_outer, prefetch_to_write};
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

/// Terms by which the result is asked for ahead of the sums: fewer than a block has, so that then a tile's own rows are
/// asked for at its start.
const RESULT_AHEAD: usize = 128;

/// Where the tiles read the left operand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Where it is: element (row i, term k) at `a + i * a_row + k`.
    InPlace,
    /// In rows that were copied: at `a + i * COPIED_ROW + k`.
    Copied,
    /// Packed by terms: at `a + i + k * MR`.
    Packed,
}

const IN_PLACE: u8 = Left::InPlace as u8;
const COPIED: u8 = Left::Copied as u8;
const PACKED: u8 = Left::Packed as u8;

/// Tiles of the result, one below the other or side by side: each `rows <= MR`, `cols <= NR`; the product over `k <= KC`
/// terms.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    /// Number of tiles.
    pub count: usize,
    pub a: *const f32,
    /// Elements from the left operand of one tile to that of the next.
    pub a_step: usize,
    /// Elements between rows, if they are read in place.
    pub a_row: usize,
    pub left: Left,
    /// Term k holds NR consecutive columns at `b + k * b_step`.
    pub b: *const f32,
    pub b_step: usize,
    /// Elements from the right operand of one tile to that of the next.
    pub panel_step: usize,
    /// The right operand after these tiles, `k * NR` values, if it is packed.
    pub next_b: Option<*const f32>,
    pub k: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Elements from one tile of the result to the next.
    pub c_step: usize,
    /// The tile of the result after these; only asked for, so that it may lie outside.
    pub next_c: *mut f32,
    pub rows: usize,
    pub cols: usize,
    /// Add to the result (later blocks of KC) instead of storing.
    pub add: bool,
}

/// Adds one term to all sums. They go in and out as values and the function is always inlined: a reference to them that
/// is not (a closure's, say) makes the compiler store each sum after every term.
///
/// # Safety
/// `rows` must hold element `at`, `b` V vectors.
#[inline(always)]
unsafe fn add_term<S: Simd, const R: usize, const V: usize>(
    simd: S,
    rows: [*const f32; R],
    mut sums: [[S::f32s; V]; R],
    at: usize,
    b: *const f32,
) -> [[S::f32s; V]; R] {
    let mut columns = [simd.splat_f32s(0.0); V];
    // SAFETY: as the caller says.
    unsafe {
        for (v, column) in columns.iter_mut().enumerate() {
            *column = b.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned();
        }
        for (row, row_sums) in rows.iter().zip(sums.iter_mut()) {
            let value = simd.splat_f32s(*row.add(at));
            for (sum, column) in row_sums.iter_mut().zip(columns) {
                *sum = simd.mul_add_e_f32s(value, column, *sum);
            }
        }
    }
    sums
}

struct TileRows<S, const R: usize, const V: usize, const LEFT: u8> {
    simd: S,
    tiles: Tiles,
}

impl<S: Simd, const R: usize, const V: usize, const LEFT: u8> NullaryFnOnce
    for TileRows<S, R, V, LEFT>
{
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { simd, mut tiles } = self;
        let columns = V * S::F32_LANES;
        // The rows of the result that the tiles come to when as many terms have passed as memory takes time.
        let ahead = (RESULT_AHEAD / tiles.k.max(1)).min(tiles.count);
        let part = (tiles.k * columns).div_ceil(tiles.count.max(1));
        for i in 0..tiles.count {
            if let Some(next) = tiles.next_b {
                prefetch_outer(next.wrapping_add(i * part), part);
            }
            let c = if i + ahead < tiles.count {
                tiles.c.wrapping_add(ahead * tiles.c_step)
            } else {
                tiles.next_c.wrapping_add((i + ahead - tiles.count) * tiles.c_step)
            };
            for i in 0..R {
                prefetch_to_write(c.wrapping_add(i * tiles.c_stride).cast_const(), columns);
            }
            // SAFETY: what the caller of `run_tiles` vouches for, tile by tile.
            unsafe { one_tile::<S, R, V, LEFT>(simd, tiles) };
            tiles.a = tiles.a.wrapping_add(tiles.a_step);
            tiles.b = tiles.b.wrapping_add(tiles.panel_step);
            tiles.c = tiles.c.wrapping_add(tiles.c_step);
        }
    }
}

/// The first of `tiles`.
///
/// # Safety
/// As [`run_tiles`].
#[inline(always)]
unsafe fn one_tile<S: Simd, const R: usize, const V: usize, const LEFT: u8>(simd: S, tile: Tiles) {
    let lanes = S::F32_LANES;
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    let mut b = tile.b;
    // One pointer a row, which the compiler must not see as multiples of a stride: it would keep the
    // stride on the stack and load it before every element. Packed and copied rows are constants apart.
    let rows: [*const f32; R] = core::array::from_fn(|i| match LEFT {
        PACKED => tile.a.wrapping_add(i),
        COPIED => tile.a.wrapping_add(i * COPIED_ROW),
        _ => core::hint::black_box(tile.a.wrapping_add(i * tile.a_row)),
    });
    let step = if LEFT == PACKED { tile_shape::<S>().0 } else { 1 };
    let mut at = 0;
    // SAFETY: the tile's operands hold `k` terms of R rows and NR columns, the result R x cols elements.
    unsafe {
        for _ in 0..tile.k / UNROLL {
            for t in 0..UNROLL {
                acc = add_term(simd, rows, acc, at + t * step, b);
                b = b.wrapping_add(tile.b_step);
            }
            at += UNROLL * step;
        }
        for _ in 0..tile.k % UNROLL {
            acc = add_term(simd, rows, acc, at, b);
            at += step;
            b = b.wrapping_add(tile.b_step);
        }
        // A copy in memory for loops that index it: without it, the sums themselves may lie there all along.
        let acc = core::hint::black_box(acc);
        if tile.cols == V * lanes {
            for (i, row) in acc.iter().enumerate() {
                for (v, &sum) in row.iter().enumerate() {
                    let out = tile.c.add(i * tile.c_stride + v * lanes).cast::<S::f32s>();
                    let sum = if tile.add { simd.add_f32s(out.read_unaligned(), sum) } else { sum };
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

/// Computes tiles, all of them in one call: setting out for each by itself takes a twentieth of its time.
///
/// # Safety
/// For each tile `a` must hold `k` terms of `rows` rows, `b` `k` terms of NR columns (padding included), `c` `rows`
/// rows of `cols` elements that nobody else touches.
#[inline(always)]
pub(super) unsafe fn run_tiles<S: Simd>(simd: S, tiles: Tiles) {
    macro_rules! rows {
        ($v:literal, $($r:literal)*) => {
            match tiles.rows {
                $($r => match tiles.left {
                    Left::InPlace => {
                        simd.vectorize(TileRows::<S, $r, $v, IN_PLACE> { simd, tiles });
                    }
                    Left::Copied => {
                        simd.vectorize(TileRows::<S, $r, $v, COPIED> { simd, tiles });
                    }
                    Left::Packed => {
                        simd.vectorize(TileRows::<S, $r, $v, PACKED> { simd, tiles });
                    }
                },)*
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
