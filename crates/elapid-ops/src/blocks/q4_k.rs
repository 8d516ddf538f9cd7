//! `q4_k`: `d: f16, m: f16, st: [u8; 12], q: [u4; 256]`, eight groups of 32. An element of group g is
//! `d s[g] q - m t[g]` with six-bit s and t ([`scales`]). Groups come in pairs: 32 bytes hold group 2p in their low
//! halves and group 2p + 1 in their high halves.

use super::{fit, half_at, to_half};

/// Elements of a block.
pub const LEN: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 144;
/// Elements that share a scale.
pub const GROUP: usize = 32;
/// Groups of a block.
pub const GROUPS: usize = 8;
/// Where the twelve bytes of scales and offsets begin.
pub const SCALES: usize = 4;
/// Where the four-bit integers begin.
pub const LEVELS: usize = 16;

/// The six-bit scales s and offsets t of the groups. Bytes 0..4 hold s of groups 0..4 in their low six bits, bytes
/// 4..8 likewise t; bytes 8..12 the low four bits of s (low half) and t (high half) of groups 4..8, whose upper two
/// bits are the upper bits of bytes 0..4 and 4..8.
pub fn scales(packed: &[u8; 12]) -> ([u8; GROUPS], [u8; GROUPS]) {
    let mut s = [0; GROUPS];
    let mut t = [0; GROUPS];
    for g in 0..4 {
        s[g] = packed[g] & 63;
        t[g] = packed[g + 4] & 63;
        s[g + 4] = packed[g + 8] & 15 | packed[g] >> 6 << 4;
        t[g + 4] = packed[g + 8] >> 4 | packed[g + 4] >> 6 << 4;
    }
    (s, t)
}

/// The inverse of [`scales`], for values below 64.
fn pack_scales(s: &[u8; GROUPS], t: &[u8; GROUPS]) -> [u8; 12] {
    let mut packed = [0; 12];
    for g in 0..4 {
        packed[g] = s[g] | s[g + 4] >> 4 << 6;
        packed[g + 4] = t[g] | t[g + 4] >> 4 << 6;
        packed[g + 8] = s[g + 4] & 15 | (t[g + 4] & 15) << 4;
    }
    packed
}

fn packed_scales(block: &[u8; BYTES]) -> [u8; 12] {
    std::array::from_fn(|i| block[SCALES + i])
}

/// The values of a block.
pub fn dequantize(block: &[u8; BYTES]) -> [f32; LEN] {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (s, t) = scales(&packed_scales(block));
    let mut out = [0.0; LEN];
    for (g, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
        let scale = d * f32::from(s[g]);
        let offset = m * f32::from(t[g]);
        for (i, out) in out.iter_mut().enumerate() {
            let pair = block[LEVELS + g / 2 * GROUP + i];
            let q = if g % 2 == 0 { pair & 15 } else { pair >> 4 };
            *out = scale * f32::from(q) - offset;
        }
    }
    out
}

/// The block for finite `x`: each group's scale and offset minimise the squared error, weighted towards large
/// magnitudes; scales and offsets are then rounded to six bits of their largest, and the integers chosen for these.
/// `None` if a scale does not fit f16.
pub fn quantize(x: &[f32; LEN]) -> Option<[u8; BYTES]> {
    let groups = x.as_chunks::<GROUP>().0;
    let mut scale = [0f32; GROUPS];
    let mut offset = [0f32; GROUPS];
    for (g, group) in groups.iter().enumerate() {
        let rms = (group.iter().map(|v| v * v).sum::<f32>() / GROUP as f32).sqrt();
        let weight: [f32; GROUP] = std::array::from_fn(|i| rms + group[i].abs());
        (scale[g], offset[g]) = fit::affine::<15>(group, &weight);
    }
    let six_bits = |values: &[f32; GROUPS]| {
        let largest = values.iter().fold(0f32, |largest, &v| largest.max(v));
        let inverse = if largest > 0.0 { 63.0 / largest } else { 0.0 };
        (largest / 63.0, values.map(|v| fit::nearest(inverse * v).clamp(0.0, 63.0) as u8))
    };
    let (d, s) = six_bits(&scale);
    let (m, t) = six_bits(&offset);
    let (d, m) = (to_half(d)?, to_half(m)?);

    let mut block = [0; BYTES];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..4].copy_from_slice(&m.to_le_bytes());
    block[SCALES..LEVELS].copy_from_slice(&pack_scales(&s, &t));
    let (d, m) = (d.to_f32(), m.to_f32());
    for (g, group) in groups.iter().enumerate() {
        let scale = d * f32::from(s[g]);
        let offset = m * f32::from(t[g]);
        if scale == 0.0 {
            continue;
        }
        for (i, v) in group.iter().enumerate() {
            let q = fit::nearest(((v + offset) / scale).clamp(0.0, 15.0)) as u8;
            block[LEVELS + g / 2 * GROUP + i] |= q << (4 * (g % 2));
        }
    }
    Some(block)
}
