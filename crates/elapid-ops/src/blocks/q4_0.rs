//! `q4_0`: `d: f16, q: [u4; 32]`, an element is `d (q - 8)`. Byte i holds element i in its low half and element
//! i + 16 in its high half.

use super::{half_at, to_half};

/// Elements of a block.
pub const LEN: usize = 32;
/// Bytes of a block.
pub const BYTES: usize = 18;

/// The values of a block.
pub fn dequantize(block: &[u8; BYTES]) -> [f32; LEN] {
    let d = half_at(block, 0);
    std::array::from_fn(|i| {
        let pair = block[2 + i % 16];
        let q = if i < 16 { pair & 15 } else { pair >> 4 };
        d * (f32::from(q) - 8.0)
    })
}

/// The block nearest to finite `x` in which the element of largest magnitude is 8 steps below zero (the step has
/// the sign that this needs); `None` if the step does not fit f16.
pub fn quantize(x: &[f32; LEN]) -> Option<[u8; BYTES]> {
    let extreme =
        x.iter().fold(0f32, |extreme, &v| if v.abs() > extreme.abs() { v } else { extreme });
    let d = extreme / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let level = |v: f32| ((v * inverse + 8.5) as u8).min(15);
    let mut block = [0; BYTES];
    block[..2].copy_from_slice(&to_half(d)?.to_le_bytes());
    for (i, pair) in block[2..].iter_mut().enumerate() {
        *pair = level(x[i]) | level(x[i + 16]) << 4;
    }
    Some(block)
}
