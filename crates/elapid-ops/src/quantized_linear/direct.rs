//! Few tokens: blocks are read where they lie, eight rows side by side.

use std::ops::Range;

use super::activations::Row;
use super::unpack::Blocks;
use super::{Activations, Output, Weight};

/// Rows side by side.
pub(super) const GROUP: usize = 8;

/// # Safety
/// As [`super::product`], for weights in `B`.
pub(super) unsafe fn rows<B: Blocks>(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: Output,
) {
    let blocks = weight.columns / B::LEN;
    let mut row = rows.start;
    while row < rows.end {
        let from = weight.bytes[row * weight.row_bytes..].as_ptr();
        let count = GROUP.min(rows.end - row);
        for token in 0..x.tokens() {
            let integers = x.integers(token);
            // SAFETY: `count` rows lie at `from`, each of whole blocks; the caller vouches for the output.
            unsafe {
                let to = out.pointer.add(token * out.stride + row - rows.start);
                #[cfg(target_arch = "x86_64")]
                if count == GROUP && super::detected::has_avx2() {
                    super::direct_x86::eight::<B>(from, weight.row_bytes, blocks, &integers, to);
                    continue;
                }
                for r in 0..count {
                    *to.add(r) = one::<B>(from.add(r * weight.row_bytes), blocks, &integers);
                }
            }
        }
        row += count;
    }
}

/// One row and one token: the definition.
///
/// # Safety
/// `blocks` blocks must be at `from`, and as many in `x`.
unsafe fn one<B: Blocks>(from: *const u8, blocks: usize, x: &Row) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if super::detected::has_avx2() {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<B: Blocks>(from: *const u8, blocks: usize, x: &Row) -> f32 {
            // SAFETY: the caller's.
            unsafe { portable::<B>(from, blocks, x) }
        }
        // SAFETY: the instruction set was found; the caller's.
        return unsafe { avx2::<B>(from, blocks, x) };
    }
    // SAFETY: the caller's.
    unsafe { portable::<B>(from, blocks, x) }
}

/// # Safety
/// As [`one`].
#[inline(always)]
pub(super) unsafe fn portable<B: Blocks>(from: *const u8, blocks: usize, x: &Row) -> f32 {
    let mut y = 0.0f32;
    let mut room = [0i16; 256];
    let weights = &mut room[..B::LEN];
    for block in 0..blocks {
        // SAFETY: the caller's.
        unsafe {
            let from = from.add(block * B::BYTES);
            B::integers(from, weights);
            let words = std::slice::from_raw_parts(x.words.add(block * B::LEN), B::LEN);
            let products = weights.iter().zip(words);
            let sum: i32 = products.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
            let scale = *x.scales.add(block);
            y = (B::scale(from) * scale).mul_add(sum as f32, y);
            if B::OFFSETS {
                let (m, t) = B::offsets(from);
                let sums = std::slice::from_raw_parts(x.sums.add(block * 8), 8);
                let sum: i32 = t.iter().zip(sums).map(|(&t, &x)| i32::from(t) * i32::from(x)).sum();
                y = (-(m * scale)).mul_add(sum as f32, y);
            }
        }
    }
    y
}
