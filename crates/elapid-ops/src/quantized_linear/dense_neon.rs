//! The vectors of NEON.

use core::arch::aarch64::*;

use half::f16;

use super::dense::{Call, Lanes, by_encoding};
use crate::blocks::Encoding;

/// # Safety
/// As [`super::product`].
#[target_feature(enable = "neon")]
pub(super) unsafe fn rows(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Neon>(encoding, call) }
}

/// Eight lanes in two registers.
#[derive(Clone, Copy)]
struct Neon;

// SAFETY of all methods: the caller's; NEON is part of every aarch64 processor that Rust's targets name.
impl Lanes for Neon {
    const LANES: usize = 8;
    type Vector = (float32x4_t, float32x4_t);
    #[inline(always)]
    unsafe fn zero() -> Self::Vector {
        // SAFETY: as above.
        unsafe { (vdupq_n_f32(0.0), vdupq_n_f32(0.0)) }
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> Self::Vector {
        // SAFETY: as above; loads of bytes need no alignment.
        unsafe {
            (vreinterpretq_f32_u8(vld1q_u8(from)), vreinterpretq_f32_u8(vld1q_u8(from.add(16))))
        }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> Self::Vector {
        // SAFETY: as above.
        unsafe {
            let words = vreinterpretq_u16_u8(vld1q_u8(from));
            let low = vshll_n_u16::<16>(vget_low_u16(words));
            let high = vshll_n_u16::<16>(vget_high_u16(words));
            (vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high))
        }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> Self::Vector {
        // SAFETY: as above.
        unsafe {
            let bytes = from.cast::<[[u8; 2]; 8]>().read_unaligned();
            let values = bytes.map(|bytes| f16::from_le_bytes(bytes).to_f32());
            Self::f32(values.as_ptr().cast())
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        // SAFETY: as above.
        unsafe { (vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::Vector) -> f32 {
        // SAFETY: as above.
        unsafe {
            let v = vaddq_f32(v.0, v.1);
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        }
    }
}
