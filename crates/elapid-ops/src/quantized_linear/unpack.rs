//! Blocks to the integers that products add up, 16 bits each: a weight is `d` times its integer, for `q4_k` less
//! `m t`. Scales inside of a block are multiplied into the integers, at most 945 for `q4_k` and 4,096 for `q6_k`.

use half::f16;

use crate::blocks::{Encoding, q4_0, q4_k, q6_k, q8_0};

/// The half-precision number at `from`.
///
/// # Safety
/// Two bytes must be there.
#[inline(always)]
pub(super) unsafe fn half(from: *const u8) -> f32 {
    // SAFETY: the caller's.
    f16::from_le_bytes(unsafe { from.cast::<[u8; 2]>().read_unaligned() }).to_f32()
}

/// An encoding's blocks.
pub(super) trait Blocks: Copy {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    const ENCODING: Encoding;
    /// Elements.
    const LEN: usize;
    /// Bytes.
    const BYTES: usize;
    /// True if there are offsets.
    const OFFSETS: bool;
    /// The integers of the block at `from`.
    unsafe fn integers(from: *const u8, out: &mut [i16]);
    /// The block's scale.
    unsafe fn scale(from: *const u8) -> f32;
    /// The scale of the offsets and each 32 elements' offset.
    unsafe fn offsets(from: *const u8) -> (f32, [i16; 8]);
}

// SAFETY of all methods: the caller's: a whole block is at `from`.

#[derive(Clone, Copy)]
pub(super) struct Q8;
impl Blocks for Q8 {
    const ENCODING: Encoding = Encoding::Q8_0;
    const LEN: usize = q8_0::LEN;
    const BYTES: usize = q8_0::BYTES;
    const OFFSETS: bool = false;
    #[inline(always)]
    unsafe fn integers(from: *const u8, out: &mut [i16]) {
        // SAFETY: as above.
        let q = unsafe { from.add(2).cast::<[i8; 32]>().read_unaligned() };
        for (out, q) in out.iter_mut().zip(q) {
            *out = i16::from(q);
        }
    }
    #[inline(always)]
    unsafe fn scale(from: *const u8) -> f32 {
        // SAFETY: as above.
        unsafe { half(from) }
    }
    #[inline(always)]
    unsafe fn offsets(_: *const u8) -> (f32, [i16; 8]) {
        (0.0, [0; 8])
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q4;
impl Blocks for Q4 {
    const ENCODING: Encoding = Encoding::Q4_0;
    const LEN: usize = q4_0::LEN;
    const BYTES: usize = q4_0::BYTES;
    const OFFSETS: bool = false;
    #[inline(always)]
    unsafe fn integers(from: *const u8, out: &mut [i16]) {
        // SAFETY: as above.
        let q = unsafe { from.add(2).cast::<[u8; 16]>().read_unaligned() };
        let (low, high) = out.split_at_mut(16);
        for ((low, high), q) in low.iter_mut().zip(high).zip(q) {
            *low = i16::from(q & 15) - 8;
            *high = i16::from(q >> 4) - 8;
        }
    }
    #[inline(always)]
    unsafe fn scale(from: *const u8) -> f32 {
        // SAFETY: as above.
        unsafe { half(from) }
    }
    #[inline(always)]
    unsafe fn offsets(_: *const u8) -> (f32, [i16; 8]) {
        (0.0, [0; 8])
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q4K;
impl Blocks for Q4K {
    const ENCODING: Encoding = Encoding::Q4_K;
    const LEN: usize = q4_k::LEN;
    const BYTES: usize = q4_k::BYTES;
    const OFFSETS: bool = true;
    #[inline(always)]
    unsafe fn integers(from: *const u8, out: &mut [i16]) {
        // SAFETY: as above.
        unsafe {
            let (s, _) = q4_k::scales(&from.add(q4_k::SCALES).cast::<[u8; 12]>().read_unaligned());
            for (pair, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
                let q = from.add(q4_k::LEVELS + 32 * pair).cast::<[u8; 32]>().read_unaligned();
                let (low, high) = out.split_at_mut(32);
                let (s, t) = (i16::from(s[2 * pair]), i16::from(s[2 * pair + 1]));
                for ((low, high), q) in low.iter_mut().zip(high).zip(q) {
                    *low = i16::from(q & 15) * s;
                    *high = i16::from(q >> 4) * t;
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn scale(from: *const u8) -> f32 {
        // SAFETY: as above.
        unsafe { half(from) }
    }
    #[inline(always)]
    unsafe fn offsets(from: *const u8) -> (f32, [i16; 8]) {
        // SAFETY: as above.
        unsafe {
            let (_, t) = q4_k::scales(&from.add(q4_k::SCALES).cast::<[u8; 12]>().read_unaligned());
            (half(from.add(2)), t.map(i16::from))
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q6K;
impl Blocks for Q6K {
    const ENCODING: Encoding = Encoding::Q6_K;
    const LEN: usize = q6_k::LEN;
    const BYTES: usize = q6_k::BYTES;
    const OFFSETS: bool = false;
    #[inline(always)]
    unsafe fn integers(from: *const u8, out: &mut [i16]) {
        // SAFETY: as above.
        unsafe {
            let s = from.add(q6_k::SCALES).cast::<[i8; 16]>().read_unaligned();
            for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let low = from.add(64 * half).cast::<[[u8; 32]; 2]>().read_unaligned();
                let high = from.add(q6_k::HIGH + 32 * half).cast::<[u8; 32]>().read_unaligned();
                for (r, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                        let s = i16::from(s[8 * half + 2 * r + part]);
                        for (i, out) in out.iter_mut().enumerate() {
                            let i = 16 * part + i;
                            let q = (low[r % 2][i] >> (4 * (r / 2)) & 15)
                                | (high[i] >> (2 * r) & 3) << 4;
                            *out = (i16::from(q) - 32) * s;
                        }
                    }
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn scale(from: *const u8) -> f32 {
        // SAFETY: as above.
        unsafe { half(from.add(q6_k::SCALE)) }
    }
    #[inline(always)]
    unsafe fn offsets(_: *const u8) -> (f32, [i16; 8]) {
        (0.0, [0; 8])
    }
}
