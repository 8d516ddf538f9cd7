//! The vectors of NEON.

use core::arch::aarch64::*;

use half::f16;

use super::{Call, Vectors, by_encoding};
use crate::blocks::Encoding;

/// # Safety
/// As [`super::super::product`].
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn rows(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Neon>(encoding, call) }
}

#[derive(Clone, Copy)]
struct Neon;

// SAFETY of all methods: the caller's; NEON is part of every aarch64 processor that Rust's targets name.
impl Vectors for Neon {
    type Vector = float32x4_t;
    const LANES: usize = 4;
    const TOKENS: usize = 5;
    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: as above.
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: as above; loads of bytes need no alignment.
        unsafe { vreinterpretq_f32_u8(vld1q_u8(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(v: float32x4_t, to: *mut f32) {
        // SAFETY: as above.
        unsafe { vst1q_f32(to, v) }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> [float32x4_t; 2] {
        // SAFETY: as above.
        unsafe {
            let words = vreinterpretq_u16_u8(vld1q_u8(from));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(words))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(words))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn like_bf16(from: *const f32) -> [float32x4_t; 2] {
        // SAFETY: as above.
        unsafe { [Self::load(from), Self::load(from.add(4))] }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> [float32x4_t; 2] {
        // SAFETY: as above.
        unsafe {
            let bytes = from.cast::<[[u8; 2]; 8]>().read_unaligned();
            let values = bytes.map(|bytes| f16::from_le_bytes(bytes).to_f32());
            Self::like_bf16(values.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn sums(v: [float32x4_t; 4]) -> [f32; 4] {
        v.map(|v| {
            // SAFETY: as above.
            unsafe {
                let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
                vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
            }
        })
    }
    #[inline(always)]
    fn ask(_: *const u8) {}
}
