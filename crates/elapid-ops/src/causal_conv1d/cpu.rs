//! The convolution on the CPU: vectors over channels, threads over blocks of tokens.
//!
//! Every token is computed from W rows of E inputs: rows of x within the sequence, rows of its history (the
//! incoming state, or zeros) before it. The sum runs from the oldest tap to the newest in one chain that starts
//! from the bias, so neither blocks nor splits of a sequence change its bits.

use crate::simd::{dispatch, prefetch_line, prefetch_line_to_write, silu};
use elapid_tensor::{RowView, Sequence, Sequences};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Tokens of one task. Also the unit in which parameter gradients are summed: not to depend on threads.
pub(super) const BLOCK: usize = 64;
/// Tokens by which rows are asked for ahead.
pub(super) const AHEAD: usize = 2;
/// Channel-taps below which everything stays on one thread.
const PARALLEL_WORK: usize = 1 << 16;

/// The arguments, with the weight turned tap-major so that channels are neighbours.
#[derive(Clone, Copy)]
pub(super) struct Convolution<'a> {
    pub x: RowView<'a, f32>,
    /// [W, E]
    pub taps: &'a [f32],
    /// [E], zeros if there is none.
    pub bias: &'a [f32],
    pub width: usize,
    pub silu: bool,
    pub sequences: &'a Sequences,
    /// [slots, E, W - 1]
    pub state: Option<&'a [f32]>,
}

/// Weight [E, W] as taps [W, E].
pub(super) fn tap_major(weight: &[f32], channels: usize, width: usize) -> Vec<f32> {
    (0..width).flat_map(|w| (0..channels).map(move |c| weight[c * width + w])).collect()
}

impl<'a> Convolution<'a> {
    pub fn channels(&self) -> usize {
        self.x.width
    }

    pub fn is_parallel(&self) -> bool {
        self.x.rows * self.channels() * self.width >= PARALLEL_WORK
    }

    /// Index of the sequence that token `t` belongs to.
    pub fn sequence_of(&self, t: usize) -> usize {
        self.sequences.as_slice().partition_point(|s| s.start + s.len <= t)
    }

    /// The W - 1 inputs before a sequence as rows of E: from its slot, or zeros for a fresh sequence.
    pub fn history(&self, sequence: &Sequence, rows: &mut Vec<f32>) {
        let (channels, history) = (self.channels(), self.width - 1);
        rows.clear();
        rows.resize(channels * history, 0.0);
        if let (true, Some(state)) = (sequence.continued, self.state) {
            columns_to_rows(
                &state[sequence.slot * channels * history..][..channels * history],
                history,
                rows,
            );
        }
    }

    /// Writes `y` [T, E].
    pub fn forward(&self, y: &mut [f32]) {
        let channels = self.channels();
        if channels == 0 || y.is_empty() {
            return;
        }
        let block =
            |(i, y): (usize, &mut [f32])| dispatch(Forward { conv: *self, first: i * BLOCK, y });
        if self.is_parallel() {
            y.par_chunks_mut(BLOCK * channels).with_max_len(1).enumerate().for_each(block);
        } else {
            y.chunks_mut(BLOCK * channels).enumerate().for_each(block);
        }
    }

    /// Writes the state after the batch into `out`, which holds the incoming state (or zeros).
    pub fn state_out(&self, out: &mut [f32]) {
        let (channels, history) = (self.channels(), self.width - 1);
        if history == 0 {
            return;
        }
        let mut rows = Vec::new();
        for sequence in self.sequences {
            if sequence.len < history {
                self.history(sequence, &mut rows);
            }
            let slot = &mut out[sequence.slot * channels * history..][..channels * history];
            for j in 0..history {
                let row = if sequence.len + j < history {
                    &rows[(sequence.len + j) * channels..][..channels]
                } else {
                    self.x.row(sequence.start + sequence.len + j - history)
                };
                for (to, from) in slot.iter_mut().skip(j).step_by(history).zip(row) {
                    *to = *from;
                }
            }
        }
    }
}

/// Finds the W rows that each token sums, for tokens in ascending order.
pub(super) struct TokenRows<'a> {
    conv: Convolution<'a>,
    /// The token's sequence.
    index: usize,
    /// The sequence whose history is in `history`.
    loaded: Option<usize>,
    history: Vec<f32>,
    rows: Vec<*const f32>,
}

impl<'a> TokenRows<'a> {
    /// From token `first` on.
    pub fn new(conv: Convolution<'a>, first: usize) -> Self {
        let rows = Vec::with_capacity(conv.width);
        Self { conv, index: conv.sequence_of(first), loaded: None, history: Vec::new(), rows }
    }

    /// The rows of token `t`, oldest first, E values each; good until the next call.
    pub fn at(&mut self, t: usize) -> &[*const f32] {
        let (channels, width) = (self.conv.channels(), self.conv.width);
        let sequences = self.conv.sequences.as_slice();
        while sequences[self.index].tokens().end <= t {
            self.index += 1;
        }
        let position = t - sequences[self.index].start;
        if position < width - 1 && self.loaded != Some(self.index) {
            self.conv.history(&sequences[self.index], &mut self.history);
            self.loaded = Some(self.index);
        }
        self.rows.clear();
        for w in 0..width {
            let back = width - 1 - w;
            let row = if position >= back {
                self.conv.x.row(t - back)
            } else {
                &self.history[(position + w) * channels..][..channels]
            };
            self.rows.push(row.as_ptr());
        }
        &self.rows
    }
}

/// [E, W - 1] as [W - 1, E].
pub(super) fn columns_to_rows(columns: &[f32], history: usize, rows: &mut [f32]) {
    let channels = columns.len().checked_div(history).unwrap_or(0);
    for (c, column) in columns.chunks_exact(history.max(1)).enumerate() {
        for (h, &value) in column.iter().enumerate() {
            rows[h * channels + c] = value;
        }
    }
}

struct Forward<'a> {
    conv: Convolution<'a>,
    first: usize,
    y: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { conv, first, y } = self;
        match (conv.width, conv.silu) {
            (4, true) => forward::<S, 4, true>(simd, conv, first, y),
            (3, true) => forward::<S, 3, true>(simd, conv, first, y),
            (2, true) => forward::<S, 2, true>(simd, conv, first, y),
            (_, true) => forward::<S, 0, true>(simd, conv, first, y),
            (_, false) => forward::<S, 0, false>(simd, conv, first, y),
        }
    }
}

#[inline(always)]
fn forward<S: Simd, const W: usize, const SILU: bool>(
    simd: S,
    conv: Convolution<'_>,
    first: usize,
    y: &mut [f32],
) {
    let channels = conv.channels();
    let (taps, bias) = (conv.taps.as_ptr(), conv.bias.as_ptr());
    let mut tokens = TokenRows::new(conv, first);
    for (i, out) in y.chunks_exact_mut(channels).enumerate() {
        let rows = tokens.at(first + i);
        let out = out.as_mut_ptr();
        let next = conv.x.row((first + i + AHEAD).min(conv.x.rows - 1)).as_ptr();
        let mut c = 0;
        // SAFETY: all rows, the bias, each tap and the output row hold `channels` values.
        unsafe {
            while c + S::F32_LANES <= channels {
                prefetch_line(next.wrapping_add(c));
                prefetch_line_to_write(out.wrapping_add(c + AHEAD * channels));
                let sum = sum::<S, W, false>(simd, rows, taps, bias, c, channels);
                put::<S, false>(simd, out, c, channels, if SILU { silu(simd, sum) } else { sum });
                c += S::F32_LANES;
            }
            if c < channels {
                let sum = sum::<S, W, true>(simd, rows, taps, bias, c, channels);
                put::<S, true>(simd, out, c, channels, if SILU { silu(simd, sum) } else { sum });
            }
        }
    }
}

/// `start + Σ_w taps_w rows_w` for the vector of channels at `c`, in a chain of ascending w. W = 0 stands for
/// as many taps as there are rows.
///
/// # Safety
/// `start`, each row and each tap must hold `channels > c` values, with a whole vector at `c` unless `TAIL`.
#[inline(always)]
pub(super) unsafe fn sum<S: Simd, const W: usize, const TAIL: bool>(
    simd: S,
    rows: &[*const f32],
    taps: *const f32,
    start: *const f32,
    c: usize,
    channels: usize,
) -> S::f32s {
    // SAFETY: the caller vouches for every row.
    unsafe {
        let mut sum = get::<S, TAIL>(simd, start, c, channels);
        let count = if W == 0 { rows.len() } else { W };
        for (w, &row) in rows.iter().enumerate().take(count) {
            let tap = get::<S, TAIL>(simd, taps.add(w * channels), c, channels);
            sum = simd.mul_add_e_f32s(tap, get::<S, TAIL>(simd, row, c, channels), sum);
        }
        sum
    }
}

/// The vector at `c` of a row of `channels` values; padded with zeros if `TAIL`.
///
/// # Safety
/// As [`sum`].
#[inline(always)]
pub(super) unsafe fn get<S: Simd, const TAIL: bool>(
    simd: S,
    row: *const f32,
    c: usize,
    channels: usize,
) -> S::f32s {
    // SAFETY: the caller vouches for the row.
    unsafe {
        if TAIL {
            simd.partial_load_f32s(core::slice::from_raw_parts(row.add(c), channels - c))
        } else {
            row.add(c).cast::<S::f32s>().read_unaligned()
        }
    }
}

/// Writes the vector at `c`.
///
/// # Safety
/// As [`sum`], and nobody else may use the row.
#[inline(always)]
pub(super) unsafe fn put<S: Simd, const TAIL: bool>(
    simd: S,
    row: *mut f32,
    c: usize,
    channels: usize,
    value: S::f32s,
) {
    // SAFETY: the caller vouches for the row.
    unsafe {
        if TAIL {
            simd.partial_store_f32s(
                core::slice::from_raw_parts_mut(row.add(c), channels - c),
                value,
            );
        } else {
            row.add(c).cast::<S::f32s>().write_unaligned(value);
        }
    }
}
