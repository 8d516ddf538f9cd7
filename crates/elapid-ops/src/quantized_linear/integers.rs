//! Weights in blocks of integers: which kernel takes a product.

use std::ops::Range;

use super::unpack::{Blocks, Q4, Q4K, Q6K, Q8};
use super::{Activations, Output, Weight, direct, panel};
use crate::blocks::Encoding;

/// Most tokens for which rows are read where they lie.
const DIRECT: usize = 3;
/// Tokens that are worked off together: their inputs stay in the second-level cache.
const TOKENS: usize = 96;

/// # Safety
/// As [`super::product`], for weights in blocks.
pub(super) unsafe fn rows(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: Output,
) {
    // SAFETY: the caller's.
    unsafe {
        match weight.encoding {
            Encoding::Q8_0 => of::<Q8>(weight, x, rows, out),
            Encoding::Q4_0 => of::<Q4>(weight, x, rows, out),
            Encoding::Q4_K => of::<Q4K>(weight, x, rows, out),
            Encoding::Q6_K => of::<Q6K>(weight, x, rows, out),
            _ => unreachable!("floats have kernels of their own"),
        }
    }
}

unsafe fn of<B: Blocks>(weight: &Weight<'_>, x: &Activations<'_>, rows: Range<usize>, out: Output) {
    // SAFETY: the caller's; instruction sets are looked for.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if super::quads_x86::has(B::ENCODING) {
            // One token is read where it lies, at the speed of memory; rearranging `q4_k` pays from three on.
            let direct = x.tokens() <= if B::LEN == 32 { 1 } else { 2 };
            if super::detected::has_vnni() && !direct {
                return super::quads_x86::vnni(weight, x, rows, out);
            }
            if super::detected::has_avx2() && !direct {
                return super::quads_x86::avx2(weight, x, rows, out);
            }
        }
        if x.tokens() <= DIRECT {
            direct::rows::<B>(weight, x, rows, out);
        } else {
            for first in (0..x.tokens()).step_by(TOKENS) {
                let tokens = first..x.tokens().min(first + TOKENS);
                panel::rows::<B>(weight, x, rows.clone(), tokens, out);
            }
        }
    }
}
