//! Many tokens: rows are unpacked into a panel, once for all tokens.
//!
//! A panel holds `P` rows with two neighbouring integers of each side by side, so that one instruction multiplies and
//! adds both for all rows; the sums of a block stand in one vector, a lane a row.

use std::cell::RefCell;
use std::ops::Range;

use super::unpack::Blocks;
use super::{Activations, Output, Weight};

/// `P` rows of a weight.
#[derive(Default)]
pub(super) struct Panel {
    /// [columns / 2, P, 2]
    pub integers: Vec<i16>,
    /// [blocks, P]
    pub scales: Vec<f32>,
    /// Offsets [blocks * 4, P, 2] and their scales [blocks, P], if the encoding has them.
    pub offsets: Vec<i16>,
    pub offset_scales: Vec<f32>,
    /// A row on its way into the panel.
    row: Vec<i16>,
}

/// # Safety
/// As [`super::product`], for weights in `B` and the given tokens.
pub(super) unsafe fn rows<B: Blocks>(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    tokens: Range<usize>,
    out: Output,
) {
    thread_local! {
        static PANEL: RefCell<Panel> = RefCell::new(Panel::default());
    }
    PANEL.with_borrow_mut(|panel| {
        // SAFETY: the caller's; instruction sets are looked for.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            {
                if super::detected::has_vnni() {
                    return super::panel_x86::avx512::<B>(panel, weight, x, rows, tokens, out);
                }
                if super::detected::has_avx2() {
                    return super::panel_x86::avx2::<B>(panel, weight, x, rows, tokens, out);
                }
            }
            portable::<B>(panel, weight, x, rows, tokens, out);
        }
    });
}

/// # Safety
/// As [`rows`].
pub(super) unsafe fn portable<B: Blocks>(
    panel: &mut Panel,
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    tokens: Range<usize>,
    out: Output,
) {
    const P: usize = 8;
    for first in rows.clone().step_by(P) {
        let count = P.min(rows.end - first);
        // SAFETY: rows and tokens of the arguments.
        unsafe {
            panel.fill::<B, P>(weight, first..first + count);
            for token in tokens.clone() {
                let y = panel.token::<B, P>(x, token);
                let to = out.pointer.add(token * out.stride + first - rows.start);
                std::slice::from_raw_parts_mut(to, count).copy_from_slice(&y[..count]);
            }
        }
    }
}

impl Panel {
    /// Unpacks up to `P` rows; lanes without one are zero.
    ///
    /// # Safety
    /// The rows must be the weight's, and its blocks `B`.
    #[inline(always)]
    pub(super) unsafe fn fill<B: Blocks, const P: usize>(
        &mut self,
        weight: &Weight<'_>,
        rows: Range<usize>,
    ) {
        let columns = weight.columns;
        let blocks = columns / B::LEN;
        self.integers.resize(columns * P, 0);
        self.scales.resize(blocks * P, 0.0);
        if B::OFFSETS {
            self.offsets.resize(blocks * 8 * P, 0);
            self.offset_scales.resize(blocks * P, 0.0);
        }
        self.row.resize(columns * P, 0);
        if rows.len() < P {
            self.row[rows.len() * columns..columns * P].fill(0);
            self.scales[..blocks * P].fill(0.0);
            self.offsets.fill(0);
            self.offset_scales.fill(0.0);
        }
        for (lane, row) in rows.enumerate() {
            let from = weight.bytes[row * weight.row_bytes..].as_ptr();
            let values = &mut self.row[lane * columns..][..columns];
            for (block, values) in values.chunks_exact_mut(B::LEN).enumerate() {
                // SAFETY: a block of the row.
                unsafe {
                    let from = from.add(block * B::BYTES);
                    B::integers(from, values);
                    self.scales[block * P + lane] = B::scale(from);
                    if B::OFFSETS {
                        let (m, t) = B::offsets(from);
                        self.offset_scales[block * P + lane] = m;
                        for (i, t) in t.into_iter().enumerate() {
                            self.offsets[((block * 4 + i / 2) * P + lane) * 2 + i % 2] = t;
                        }
                    }
                }
            }
        }
        // Pairs of all rows side by side.
        for lane in 0..P {
            let pairs = self.row[lane * columns..][..columns].as_chunks::<2>().0;
            let to = self.integers[..columns * P].as_chunks_mut::<2>().0;
            for (pair, to) in pairs.iter().zip(to.iter_mut().skip(lane).step_by(P)) {
                *to = *pair;
            }
        }
    }

    /// One token with every row of the panel, in plain code.
    ///
    /// # Safety
    /// The panel must be filled with blocks `B` of the input's width.
    #[inline(always)]
    pub(super) unsafe fn token<B: Blocks, const P: usize>(
        &self,
        x: &Activations<'_>,
        token: usize,
    ) -> [f32; P] {
        let columns = x.columns();
        let row = x.integers(token);
        let mut y = [0.0f32; P];
        for block in 0..columns / B::LEN {
            let mut sums = [0i32; P];
            // SAFETY: a block of the token.
            let (words, scale) = unsafe {
                let words = row.words.add(block * B::LEN);
                (std::slice::from_raw_parts(words, B::LEN), *row.scales.add(block))
            };
            let pairs = &self.integers[block * B::LEN * P..][..B::LEN * P];
            for (x, pairs) in words.as_chunks::<2>().0.iter().zip(pairs.chunks_exact(2 * P)) {
                for (sum, w) in sums.iter_mut().zip(pairs.as_chunks::<2>().0) {
                    *sum += i32::from(x[0]) * i32::from(w[0]) + i32::from(x[1]) * i32::from(w[1]);
                }
            }
            for lane in 0..P {
                let d = self.scales[block * P + lane] * scale;
                y[lane] = d.mul_add(sums[lane] as f32, y[lane]);
            }
            if B::OFFSETS {
                // SAFETY: the sums of a block of the token.
                let sums_of_x = unsafe { std::slice::from_raw_parts(row.sums.add(block * 8), 8) };
                for (lane, y) in y.iter_mut().enumerate() {
                    let t = |i: usize| {
                        i32::from(self.offsets[((block * 4 + i / 2) * P + lane) * 2 + i % 2])
                    };
                    let sum: i32 = (0..8).map(|i| t(i) * i32::from(sums_of_x[i])).sum();
                    let m = self.offset_scales[block * P + lane] * scale;
                    *y = (-m).mul_add(sum as f32, *y);
                }
            }
        }
        y
    }
}
