//! `q6_k`: `low: [u4; 256], high: [u2; 256], s: [i8; 16], d: f16`, sixteen groups of 16. An element of group g is
//! `d s[g] (q - 32)`, where q has its lower four bits in `low` and its upper two in `high`.
//!
//! In each half of 128 elements, element e = 32 r + i: byte `i + 32 (r % 2)` of the half's 64 bytes of `low` holds it
//! in its lower (r < 2) or upper half, and byte i of the half's 32 bytes of `high` in bits 2r and 2r + 1.

use super::{fit, half_at, to_half};

/// Elements of a block.
pub const LEN: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 210;
/// Elements that share a scale.
pub const GROUP: usize = 16;
/// Groups of a block.
pub const GROUPS: usize = 16;
/// Where the upper bits begin.
pub const HIGH: usize = 128;
/// Where the scales begin.
pub const SCALES: usize = 192;
/// Where the block's scale is.
pub const SCALE: usize = 208;

/// Where element `e` is: its byte and shift among the lower bits, and among the upper bits.
fn place(e: usize) -> ((usize, usize), (usize, usize)) {
    let (half, e) = (e / 128, e % 128);
    let (r, i) = (e / 32, e % 32);
    ((64 * half + i + 32 * (r % 2), 4 * (r / 2)), (HIGH + 32 * half + i, 2 * r))
}

/// The values of a block.
pub fn dequantize(block: &[u8; BYTES]) -> [f32; LEN] {
    let d = half_at(block, SCALE);
    std::array::from_fn(|e| {
        let ((low, low_shift), (high, high_shift)) = place(e);
        let q = block[low] >> low_shift & 15 | (block[high] >> high_shift & 3) << 4;
        d * f32::from(block[SCALES + e / GROUP] as i8) * (f32::from(q) - 32.0)
    })
}

/// The block for finite `x`: each group's scale minimises the squared error weighted by the squares of the values;
/// scales are then rounded to eight bits of the largest, and the integers chosen for these. `None` if the scale does
/// not fit f16.
pub fn quantize(x: &[f32; LEN]) -> Option<[u8; BYTES]> {
    let groups = x.as_chunks::<GROUP>().0;
    let scale: [f32; GROUPS] = std::array::from_fn(|g| fit::symmetric::<32, GROUP>(&groups[g]));
    let extreme =
        scale.iter().fold(0f32, |extreme, &v| if v.abs() > extreme.abs() { v } else { extreme });
    let mut block = [0; BYTES];
    if extreme == 0.0 {
        return Some(block);
    }
    let inverse = -128.0 / extreme;
    let d = to_half(1.0 / inverse)?;
    block[SCALE..].copy_from_slice(&d.to_le_bytes());
    for (g, group) in groups.iter().enumerate() {
        let s = fit::nearest((inverse * scale[g]).clamp(-128.0, 127.0)) as i8;
        block[SCALES + g] = s as u8;
        let step = d.to_f32() * f32::from(s);
        for (i, v) in group.iter().enumerate() {
            let steps = if step == 0.0 { 0.0 } else { (v / step).clamp(-32.0, 31.0) };
            let q = (fit::nearest(steps) + 32.0) as u8;
            let ((low, low_shift), (high, high_shift)) = place(g * GROUP + i);
            block[low] |= (q & 15) << low_shift;
            block[high] |= q >> 4 << high_shift;
        }
    }
    Some(block)
}
