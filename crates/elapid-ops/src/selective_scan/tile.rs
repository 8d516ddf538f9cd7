//! How the work is cut: channel tiles that lie within one group of B and C, and the conversion of per-channel
//! arrays `[E, N]` to vectors over the channels of a tile.

use elapid_tensor::RowView;
use pulp::Simd;

use super::arguments::Projection;
use super::field::Field;
use crate::matmul::transpose_block;
use crate::simd::{LINE, load, prefetch, store};

/// Steps between two states that the forward saves for the backward, counted from the sequence's start.
pub const CHUNK: usize = 64;

/// Vectors that the passes over rows work on together: their functions are long chains that would leave the
/// processor waiting one by one, and more of them than this spill registers.
pub(super) const TOGETHER: usize = 4;

/// Steps by which the passes over rows ask for memory ahead.
pub(super) const AHEAD: usize = 6;

/// Neighbouring channels of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// First channel.
    pub first: usize,
    /// Number of channels.
    pub width: usize,
    /// Group of B and C.
    pub group: usize,
    /// Number of this tile within its group.
    pub place: usize,
}

/// The division of channels into tiles of at most `width`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    channels_per_group: usize,
    width: usize,
    groups: usize,
}

impl Tiles {
    pub(super) fn new(channels: usize, groups: usize, width: usize) -> Self {
        Self { channels_per_group: channels / groups, width, groups }
    }

    /// Tiles in a group.
    pub(super) fn per_group(&self) -> usize {
        self.channels_per_group.div_ceil(self.width)
    }

    /// Number of tiles.
    pub(super) fn len(&self) -> usize {
        self.groups * self.per_group()
    }

    /// Tile `index`.
    pub(super) fn get(&self, index: usize) -> Tile {
        let (group, place) = (index / self.per_group(), index % self.per_group());
        let before = place * self.width;
        Tile {
            first: group * self.channels_per_group + before,
            width: self.width.min(self.channels_per_group - before),
            group,
            place,
        }
    }
}

impl Tile {
    /// Vectors that hold the tile's channels.
    #[inline(always)]
    pub(super) fn vectors<S: Simd>(&self) -> usize {
        self.width.div_ceil(S::F32_LANES)
    }

    /// Whether vectors `v..v + count` have a channel in every lane.
    #[inline(always)]
    pub(super) fn is_full<S: Simd>(&self, v: usize, count: usize) -> bool {
        (v + count) * S::F32_LANES <= self.width
    }

    /// The tile's part of row `t`.
    #[inline(always)]
    pub(super) fn row<'a>(&self, view: &RowView<'a, f32>, t: usize) -> &'a [f32] {
        &view.data[t * view.stride + self.first..][..self.width]
    }

    /// Asks for the tile's part of the row [`AHEAD`] of `t`. Rows lie so far apart that the processor does not
    /// foresee them, and their chains are too long for it to look ahead to the next row by itself.
    #[inline(always)]
    pub(super) fn prefetch(&self, view: &RowView<'_, f32>, t: usize) {
        if t + AHEAD < view.rows {
            let row = &view.data[(t + AHEAD) * view.stride + self.first..][..self.width];
            prefetch(row.as_ptr(), row.len());
        }
    }

    /// The tile's part of an array `[E]`.
    #[inline(always)]
    pub(super) fn part<'a>(&self, values: &'a [f32]) -> &'a [f32] {
        &values[self.first..][..self.width]
    }

    /// First channel and number of channels of vector `v`.
    #[inline(always)]
    pub(super) fn span<S: Simd>(&self, v: usize) -> (usize, usize) {
        let before = v * S::F32_LANES;
        (self.first + before, S::F32_LANES.min(self.width - before))
    }
}

/// Channels `from..from + count` of a row; lanes past `count` are 0.
#[inline(always)]
pub(super) fn load_channels<S: Simd>(simd: S, row: &[f32], from: usize, count: usize) -> S::f32s {
    let row = &row[from..from + count];
    if count == S::F32_LANES {
        // SAFETY: the slice holds a whole vector.
        unsafe { row.as_ptr().cast::<S::f32s>().read_unaligned() }
    } else {
        simd.partial_load_f32s(row)
    }
}

/// Writes `count` lanes to the front of `row`.
#[inline(always)]
pub(super) fn store_channels<S: Simd>(simd: S, row: &mut [f32], count: usize, value: S::f32s) {
    let row = &mut row[..count];
    if count == S::F32_LANES {
        // SAFETY: the slice holds a whole vector.
        unsafe { row.as_mut_ptr().cast::<S::f32s>().write_unaligned(value) }
    } else {
        simd.partial_store_f32s(row, value);
    }
}

/// Vectors `v..v + K` of a tile's row; all but a single one must be full.
#[inline(always)]
pub(super) fn load_vectors<S: Simd, const K: usize>(
    simd: S,
    row: &[f32],
    v: usize,
) -> [S::f32s; K] {
    let mut values = [simd.splat_f32s(0.0); K];
    let first = v * S::F32_LANES;
    if K == 1 {
        values[0] = load_channels(simd, row, first, S::F32_LANES.min(row.len() - first));
    } else {
        let row = &row[first..first + K * S::F32_LANES];
        for (value, row) in values.iter_mut().zip(row.chunks_exact(S::F32_LANES)) {
            *value = load(simd, row);
        }
    }
    values
}

/// Writes vectors `v..v + K` of a tile's row; all but a single one must be full.
#[inline(always)]
pub(super) fn store_vectors<S: Simd, const K: usize>(
    simd: S,
    row: &mut [f32],
    v: usize,
    values: [S::f32s; K],
) {
    let first = v * S::F32_LANES;
    if K == 1 {
        let count = S::F32_LANES.min(row.len() - first);
        store_channels(simd, &mut row[first..], count, values[0]);
    } else {
        let row = &mut row[first..first + K * S::F32_LANES];
        for (row, value) in row.chunks_exact_mut(S::F32_LANES).zip(values) {
            store(simd, row, value);
        }
    }
}

/// f32 values from the steps of one vector, `[step][lane]`, to those of the next in scratch: a cache line more
/// than they take, or a step's vectors would all fall on the same few sets of the first-level cache.
#[inline(always)]
pub(super) const fn steps_stride<S: Simd>(steps: usize) -> usize {
    steps * S::F32_LANES + LINE
}

/// Vectors of a token, and where their step is in scratch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spot {
    pub token: usize,
    /// The first one.
    pub vector: usize,
    /// Of the first one in scratch.
    pub start: usize,
    /// From one vector to the next in scratch.
    pub stride: usize,
}

/// The same step of `K` vectors in scratch, the first at `at`.
#[inline(always)]
pub(super) fn load_step<S: Simd, const K: usize>(
    simd: S,
    rows: &[f32],
    at: usize,
    stride: usize,
) -> [S::f32s; K] {
    let mut values = [simd.splat_f32s(0.0); K];
    for (k, value) in values.iter_mut().enumerate() {
        *value = load(simd, &rows[at + k * stride..]);
    }
    values
}

/// Writes the same step of `K` vectors to scratch, the first at `at`.
#[inline(always)]
pub(super) fn store_step<S: Simd, const K: usize>(
    simd: S,
    rows: &mut [f32],
    at: usize,
    stride: usize,
    values: [S::f32s; K],
) {
    for (k, value) in values.into_iter().enumerate() {
        store(simd, &mut rows[at + k * stride..], value);
    }
}

/// Copies the tile's part of `[E, N]` (numbers of `PARTS` values side by side) to `[vector][n][part][lane]`;
/// lanes past the tile become 0.
#[inline(always)]
pub(super) fn gather<S: Simd, F: Field>(
    _simd: S,
    tile: &Tile,
    states: usize,
    from: &[f32],
    to: &mut [f32],
) {
    let numbers = states * F::PARTS;
    let lanes = S::F32_LANES;
    for v in 0..tile.vectors::<S>() {
        let (first, count) = tile.span::<S>(v);
        let to = &mut to[v * numbers * lanes..][..numbers * lanes];
        if count < lanes {
            to.fill(0.0);
        }
        let from = &from[first * numbers..][..count * numbers];
        // SAFETY: `count` rows of `numbers` values in `from`, as many columns at most `lanes` apart in `to`.
        unsafe { transpose_block(from.as_ptr(), numbers, count, numbers, to.as_mut_ptr(), lanes) };
    }
}

/// The opposite of [`gather`]: vectors to the tile's part of `[E, N]`, of which `to` starts at the tile.
#[inline(always)]
pub(super) fn scatter<S: Simd, F: Field>(
    _simd: S,
    tile: &Tile,
    states: usize,
    from: &[f32],
    to: &mut [f32],
) {
    let numbers = states * F::PARTS;
    let lanes = S::F32_LANES;
    for v in 0..tile.vectors::<S>() {
        let (_, count) = tile.span::<S>(v);
        let from = &from[v * numbers * lanes..][..numbers * lanes];
        let to = &mut to[v * lanes * numbers..][..count * numbers];
        // SAFETY: `numbers` rows of which `count <= lanes` values are taken, as many columns in `to`.
        unsafe { transpose_block(from.as_ptr(), lanes, numbers, count, to.as_mut_ptr(), numbers) };
    }
}

/// [`scatter`] of sums in f64.
#[inline(always)]
pub(super) fn scatter_wide<S: Simd, F: Field>(
    _simd: S,
    tile: &Tile,
    states: usize,
    from: &[f64],
    to: &mut [f64],
) {
    let numbers = states * F::PARTS;
    let lanes = S::F32_LANES;
    for v in 0..tile.vectors::<S>() {
        let (_, count) = tile.span::<S>(v);
        let from = &from[v * numbers * lanes..][..numbers * lanes];
        for lane in 0..count {
            let to = &mut to[(v * lanes + lane) * numbers..][..numbers];
            for (i, value) in to.iter_mut().enumerate() {
                *value = from[i * lanes + lane];
            }
        }
    }
}

/// Where a kernel reads B or C of a block of states.
#[derive(Clone, Copy)]
pub(super) struct Coefficients {
    at: *const f32,
    step: usize,
    constant: bool,
}

impl Coefficients {
    /// For tokens from `start` on (of which `steps` are read) and states from `n` on (of which `block`).
    /// `gathered` is the [`gather`]ed array of vector `v`, looked at only if the projection is constant.
    #[inline(always)]
    pub(super) fn new<S: Simd, F: Field>(
        projection: &Projection<'_, f32>,
        gathered: &[f32],
        start: usize,
        steps: usize,
        (group, states): (usize, usize),
        (n, block): (usize, usize),
    ) -> Self {
        match projection {
            Projection::Token { rows, .. } => {
                let first = (group * states + n) * F::PARTS;
                let needed = (start + steps - 1) * rows.stride + first + block * F::PARTS;
                assert!(needed <= rows.data.len());
                let at = rows.data[start * rows.stride + first..].as_ptr();
                Self { at, step: rows.stride, constant: false }
            }
            Projection::Constant(_) => {
                let size = F::PARTS * S::F32_LANES;
                let at = gathered[n * size..(n + block) * size].as_ptr();
                Self { at, step: 0, constant: true }
            }
        }
    }

    /// The number of step `t` and state `i` of the block. `TOKEN` promises that it is not constant.
    ///
    /// # Safety
    /// `t` and `i` must be within the steps and the block given to [`Coefficients::new`].
    #[inline(always)]
    pub(super) unsafe fn get<S: Simd, F: Field, const TOKEN: bool>(
        self,
        simd: S,
        t: usize,
        i: usize,
    ) -> F::V<S> {
        // SAFETY: `new` has checked the extent of both kinds.
        unsafe {
            if TOKEN || !self.constant {
                F::splat(simd, self.at.add(t * self.step + i * F::PARTS))
            } else {
                F::load(simd, self.at.add(i * F::PARTS * S::F32_LANES))
            }
        }
    }
}

/// The largest magnitude of a vector of magnitude bits, as f32; NaN wins over everything.
#[inline(always)]
pub(super) fn largest<S: Simd>(simd: S, bits: S::u32s) -> f32 {
    let mut all = [0u32; 16];
    // SAFETY: no vector has more than 16 lanes of 32 bits.
    unsafe {
        const { assert!(size_of::<S::u32s>() <= size_of::<[u32; 16]>()) };
        all.as_mut_ptr().cast::<S::u32s>().write_unaligned(bits);
    }
    let _ = simd;
    f32::from_bits(all.into_iter().fold(0, u32::max))
}

/// `max(bits, |value|)` on bit patterns, which order magnitudes and put NaN above infinity.
#[inline(always)]
pub(super) fn raise<S: Simd>(simd: S, bits: S::u32s, value: S::f32s) -> S::u32s {
    simd.max_u32s(bits, simd.transmute_u32s_f32s(simd.abs_f32s(value)))
}
