//! `q8_0`: `d: f16, q: [i8; 32]`, an element is `d q`.

use std::borrow::Cow;

use super::{Encoding, half_at, q4_0, to_half};

/// Elements of a block.
pub const LEN: usize = 32;
/// Bytes of a block.
pub const BYTES: usize = 34;

/// The values of a block.
pub fn dequantize(block: &[u8; BYTES]) -> [f32; LEN] {
    let d = half_at(block, 0);
    std::array::from_fn(|i| d * f32::from(block[2 + i] as i8))
}

/// The block nearest to finite `x` whose largest magnitude is 127 steps; `None` if the step does not fit f16.
pub fn quantize(x: &[f32; LEN]) -> Option<[u8; BYTES]> {
    let largest = x.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let d = largest / 127.0;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let mut block = [0; BYTES];
    block[..2].copy_from_slice(&to_half(d)?.to_le_bytes());
    for (q, v) in block[2..].iter_mut().zip(x) {
        *q = (v * inverse).round() as i8 as u8;
    }
    Some(block)
}

/// Blocks of exactly the same values, if the encoding has such: whole blocks of `q8_0` themselves, and those of `q4_0`
/// with the same steps.
pub fn exactly(encoding: Encoding, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    match encoding {
        Encoding::Q8_0 => Some(Cow::Borrowed(bytes)),
        Encoding::Q4_0 => {
            let (blocks, _) = bytes.as_chunks::<{ q4_0::BYTES }>();
            Some(blocks.iter().flat_map(of_q4_0).collect())
        }
        _ => None,
    }
}

fn of_q4_0(block: &[u8; q4_0::BYTES]) -> [u8; BYTES] {
    let mut own = [0; BYTES];
    let (scale, pairs) = block.split_at(2);
    own[..2].copy_from_slice(scale);
    for (i, pair) in pairs.iter().enumerate() {
        own[2 + i] = (pair & 15).wrapping_sub(8);
        own[2 + i + LEN / 2] = (pair >> 4).wrapping_sub(8);
    }
    own
}
