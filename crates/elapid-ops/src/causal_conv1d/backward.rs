//! The gradients of the convolution on the CPU (packmamba.md b3).
//!
//! With `g = dy act'(sum)`, recomputed here from x, `dx` is the convolution run against time. Each block of
//! tokens also recomputes g of the W - 1 tokens after it, so blocks share nothing; parameter gradients are
//! summed by block and then over blocks in order. Chains run from the latest token to the earliest and start
//! from the gradient of the outgoing state, so a split sequence has the bits of the whole one.

use super::cpu::{AHEAD, BLOCK, Convolution, TokenRows, columns_to_rows, get, put, sum};
use crate::simd::{dispatch, prefetch_line, prefetch_line_to_write, silu_derivative};
use elapid_tensor::{RowView, Sequence};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// What the backward pass starts from.
#[derive(Clone, Copy)]
pub(super) struct Outer<'a> {
    /// [T, E]
    pub dy: RowView<'a, f32>,
    /// [slots, E, W - 1]
    pub dstate: Option<&'a [f32]>,
}

impl Convolution<'_> {
    /// Writes `dx` [T, E]; returns `dweight` [E, W] and `dbias` [E].
    pub fn backward(&self, outer: Outer<'_>, dx: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        let (channels, width) = (self.channels(), self.width);
        let mut total = vec![0.0f32; (width + 1) * channels];
        if channels > 0 && !dx.is_empty() {
            let block = |(i, dx): (usize, &mut [f32])| {
                dispatch(Block { conv: *self, outer, first: i * BLOCK, dx })
            };
            let partial: Vec<Vec<f32>> = if self.is_parallel() {
                dx.par_chunks_mut(BLOCK * channels).with_max_len(1).enumerate().map(block).collect()
            } else {
                dx.chunks_mut(BLOCK * channels).enumerate().map(block).collect()
            };
            for partial in partial {
                for (total, value) in total.iter_mut().zip(partial) {
                    *total += value;
                }
            }
        }
        let (taps, bias) = total.split_at(width * channels);
        let dweight =
            (0..channels).flat_map(|c| (0..width).map(move |w| taps[w * channels + c])).collect();
        (dweight, bias.to_vec())
    }

    /// Writes the gradient of the incoming state, [slots, E, W - 1].
    pub fn backward_state(&self, outer: Outer<'_>, dstate_in: &mut [f32]) {
        let (channels, history) = (self.channels(), self.width - 1);
        if history == 0 || channels == 0 {
            return;
        }
        match outer.dstate {
            // Slots that no sequence writes hand the gradient through.
            Some(dstate) => dstate_in.copy_from_slice(dstate),
            None => dstate_in.fill(0.0),
        }
        for sequence in self.sequences {
            let slot = &mut dstate_in[sequence.slot * channels * history..][..channels * history];
            if !sequence.continued {
                slot.fill(0.0);
            } else if sequence.len > 0 {
                dispatch(StateSlot { conv: *self, outer, sequence, slot });
            }
        }
    }

    /// Sets `row` to the gradient that the outgoing state gives to the input at token `t` of the sequence
    /// (`t - (W - 1)` may lie before it), zeros if none.
    fn start_row(
        &self,
        outer: &Outer<'_>,
        sequence: &Sequence,
        column: Option<usize>,
        row: &mut [f32],
    ) {
        let history = self.width - 1;
        match (outer.dstate, column) {
            (Some(dstate), Some(j)) => {
                let slot = &dstate[sequence.slot * row.len() * history..][..row.len() * history];
                for (to, from) in row.iter_mut().zip(slot.iter().skip(j).step_by(history)) {
                    *to = *from;
                }
            }
            _ => row.fill(0.0),
        }
    }
}

struct Block<'a> {
    conv: Convolution<'a>,
    outer: Outer<'a>,
    first: usize,
    dx: &'a mut [f32],
}

impl WithSimd for Block<'_> {
    /// Parameter gradients of the block: W taps and the bias, [W + 1, E].
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        match (self.conv.width, self.conv.silu) {
            (4, true) => block::<S, 4, true>(simd, self),
            (3, true) => block::<S, 3, true>(simd, self),
            (2, true) => block::<S, 2, true>(simd, self),
            (_, true) => block::<S, 0, true>(simd, self),
            (_, false) => block::<S, 0, false>(simd, self),
        }
    }
}

#[inline(always)]
fn block<S: Simd, const W: usize, const SILU: bool>(simd: S, block: Block<'_>) -> Vec<f32> {
    let Block { conv, outer, first, dx } = block;
    let (channels, width) = (conv.channels(), conv.width);
    let last = first + dx.len() / channels;
    let sequences = conv.sequences.as_slice();
    // The tokens after the block that still see its tokens.
    let reach = sequences[conv.sequence_of(last - 1)].tokens().end.min(last + width - 1);
    let mut g = vec![0.0f32; (reach - first) * channels];
    let mut partial = vec![0.0f32; (width + 1) * channels];
    local_gradients::<S, W, SILU>(simd, conv, outer.dy, first..last, &mut g, Some(&mut partial));
    if reach > last {
        let after = &mut g[(last - first) * channels..];
        local_gradients::<S, W, SILU>(simd, conv, outer.dy, last..reach, after, None);
    }
    let mut rows: Vec<*const f32> = Vec::with_capacity(width);
    let mut index = conv.sequence_of(first);
    for t in first..last {
        while sequences[index].tokens().end <= t {
            index += 1;
        }
        let sequence = &sequences[index];
        let left = sequence.tokens().end - t;
        let row = &mut dx[(t - first) * channels..][..channels];
        let column = (width - 1).checked_sub(left);
        conv.start_row(&outer, sequence, column, row);
        // Tap w met this input at the token W - 1 - w later; taps whose token is beyond the end never did.
        let skipped = width.saturating_sub(left);
        rows.clear();
        for w in skipped..width {
            rows.push(g[(t - first + width - 1 - w) * channels..][..channels].as_ptr());
        }
        let taps = conv.taps[skipped * channels..].as_ptr();
        // SAFETY: `rows` and the taps from `skipped` on hold `channels` values each, as does the row of dx.
        unsafe {
            if skipped == 0 {
                chain::<S, W>(simd, &rows, taps, row.as_mut_ptr(), channels);
            } else {
                chain::<S, 0>(simd, &rows, taps, row.as_mut_ptr(), channels);
            }
        }
    }
    partial
}

/// `row += Σ_w taps_w rows_w`.
///
/// # Safety
/// All rows and taps must hold `channels` values.
#[inline(always)]
unsafe fn chain<S: Simd, const W: usize>(
    simd: S,
    rows: &[*const f32],
    taps: *const f32,
    row: *mut f32,
    channels: usize,
) {
    let mut c = 0;
    // SAFETY: the caller vouches for the rows.
    unsafe {
        while c + S::F32_LANES <= channels {
            prefetch_line_to_write(row.wrapping_add(c + AHEAD * channels));
            let value = sum::<S, W, false>(simd, rows, taps, row, c, channels);
            put::<S, false>(simd, row, c, channels, value);
            c += S::F32_LANES;
        }
        if c < channels {
            let value = sum::<S, W, true>(simd, rows, taps, row, c, channels);
            put::<S, true>(simd, row, c, channels, value);
        }
    }
}

/// `g = dy act'(sum)` of the tokens in `range`; adds `g x` and `g` to the parameter gradients if asked.
#[inline(always)]
fn local_gradients<S: Simd, const W: usize, const SILU: bool>(
    simd: S,
    conv: Convolution<'_>,
    dy: RowView<'_, f32>,
    range: Range<usize>,
    g: &mut [f32],
    partial: Option<&mut [f32]>,
) {
    let channels = conv.channels();
    let partial = partial.map(<[f32]>::as_mut_ptr);
    let mut tokens = TokenRows::new(conv, range.start);
    for (t, g) in range.zip(g.chunks_exact_mut(channels)) {
        let rows = tokens.at(t);
        let ahead = (t + AHEAD).min(conv.x.rows - 1);
        let (next_x, next_dy) = (conv.x.row(ahead).as_ptr(), dy.row(ahead).as_ptr());
        let (dy, g) = (dy.row(t).as_ptr(), g.as_mut_ptr());
        let mut c = 0;
        // SAFETY: dy, g, all rows, taps and partial sums hold `channels` values each.
        unsafe {
            while c + S::F32_LANES <= channels {
                prefetch_line(next_x.wrapping_add(c));
                prefetch_line(next_dy.wrapping_add(c));
                local_vector::<S, W, SILU, false>(simd, conv, dy, rows, g, partial, c);
                c += S::F32_LANES;
            }
            if c < channels {
                local_vector::<S, W, SILU, true>(simd, conv, dy, rows, g, partial, c);
            }
        }
    }
}

/// One vector of channels of [`local_gradients`].
///
/// # Safety
/// All rows must hold as many values as there are channels.
#[inline(always)]
unsafe fn local_vector<S: Simd, const W: usize, const SILU: bool, const TAIL: bool>(
    simd: S,
    conv: Convolution<'_>,
    dy: *const f32,
    rows: &[*const f32],
    g: *mut f32,
    partial: Option<*mut f32>,
    c: usize,
) {
    let channels = conv.channels();
    // SAFETY: the caller vouches for the rows.
    unsafe {
        let mut value = get::<S, TAIL>(simd, dy, c, channels);
        if SILU {
            let sum =
                sum::<S, W, TAIL>(simd, rows, conv.taps.as_ptr(), conv.bias.as_ptr(), c, channels);
            value = simd.mul_f32s(value, silu_derivative(simd, sum));
        }
        put::<S, TAIL>(simd, g, c, channels, value);
        let Some(partial) = partial else { return };
        let count = if W == 0 { rows.len() } else { W };
        for (w, &row) in rows.iter().enumerate().take(count) {
            let to = partial.add(w * channels);
            let x = get::<S, TAIL>(simd, row, c, channels);
            let total = simd.mul_add_e_f32s(value, x, get::<S, TAIL>(simd, to, c, channels));
            put::<S, TAIL>(simd, to, c, channels, total);
        }
        let to = partial.add(count * channels);
        put::<S, TAIL>(
            simd,
            to,
            c,
            channels,
            simd.add_f32s(get::<S, TAIL>(simd, to, c, channels), value),
        );
    }
}

/// The gradient of one continued sequence's incoming state.
struct StateSlot<'a> {
    conv: Convolution<'a>,
    outer: Outer<'a>,
    sequence: &'a Sequence,
    /// [E, W - 1]
    slot: &'a mut [f32],
}

impl WithSimd for StateSlot<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { conv, outer, sequence, slot } = self;
        let (channels, history) = (conv.channels(), conv.width - 1);
        let tokens = sequence.len.min(history);
        let mut g = vec![0.0f32; tokens * channels];
        let range = sequence.start..sequence.start + tokens;
        if conv.silu {
            local_gradients::<S, 0, true>(simd, conv, outer.dy, range, &mut g, None);
        } else {
            local_gradients::<S, 0, false>(simd, conv, outer.dy, range, &mut g, None);
        }
        let mut out = vec![0.0f32; channels * history];
        for (h, row) in out.chunks_mut(channels).enumerate() {
            conv.start_row(&outer, sequence, h.checked_sub(sequence.len), row);
            // Token t met the history's row h with tap h - t.
            let latest = h.min(tokens - 1);
            let rows: Vec<*const f32> =
                (0..=latest).rev().map(|t| g[t * channels..][..channels].as_ptr()).collect();
            let taps = conv.taps[(h - latest) * channels..].as_ptr();
            // SAFETY: rows and taps hold `channels` values each.
            unsafe { chain::<S, 0>(simd, &rows, taps, row.as_mut_ptr(), channels) };
        }
        // [W - 1, E] to [E, W - 1].
        columns_to_rows(&out, channels, slot);
    }
}
