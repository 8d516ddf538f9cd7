//! The vectors of NEON.

use core::arch::aarch64::*;

use half::f16;

use super::dense::{Call, LANES, Lanes, by_encoding};
use crate::blocks::Encoding;

/// # Safety
/// As [`super::product`].
#[target_feature(enable = "neon")]
pub(super) unsafe fn rows(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Neon>(encoding, call) }
}

/// Sixteen lanes in four registers.
#[derive(Clone, Copy)]
struct Neon;

// SAFETY of all methods: the caller's; NEON is part of every aarch64 processor that Rust's targets name.
impl Lanes for Neon {
    type Whole = [float32x4_t; 4];
    type Part = [float32x4_t; 2];
    const PARTS: usize = 2;
    const TILE: usize = 3;
    #[inline(always)]
    unsafe fn zero() -> Self::Whole {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(0.0); 4] }
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> Self::Whole {
        let mut v = [from; 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = from.wrapping_add(16 * i);
        }
        // SAFETY: as above; loads of bytes need no alignment.
        unsafe {
            [
                vreinterpretq_f32_u8(vld1q_u8(v[0])),
                vreinterpretq_f32_u8(vld1q_u8(v[1])),
                vreinterpretq_f32_u8(vld1q_u8(v[2])),
                vreinterpretq_f32_u8(vld1q_u8(v[3])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe {
            let a = vreinterpretq_u16_u8(vld1q_u8(from));
            let b = vreinterpretq_u16_u8(vld1q_u8(from.add(16)));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(a))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(a))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(b))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(b))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn like_bf16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe { Self::f32(from) }
    }
    #[inline(always)]
    unsafe fn store_bf16(v: Self::Whole, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::Whole>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe {
            let bytes = from.cast::<[[u8; 2]; LANES]>().read_unaligned();
            let values = bytes.map(|bytes| f16::from_le_bytes(bytes).to_f32());
            Self::f32(values.as_ptr().cast())
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::Whole, b: Self::Whole, mut c: Self::Whole) -> Self::Whole {
        for i in 0..4 {
            // SAFETY: as above.
            c[i] = unsafe { vfmaq_f32(c[i], a[i], b[i]) };
        }
        c
    }
    #[inline(always)]
    unsafe fn sum(v: Self::Whole) -> f32 {
        // SAFETY: as above.
        unsafe {
            let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        }
    }
    #[inline(always)]
    unsafe fn sum_bf16(v: Self::Whole) -> f32 {
        // SAFETY: as above.
        unsafe { Self::sum(v) }
    }
    #[inline(always)]
    unsafe fn part_zero() -> Self::Part {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(0.0); 2] }
    }
    #[inline(always)]
    unsafe fn part(from: *const f32) -> Self::Part {
        // SAFETY: as above.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
    }
    #[inline(always)]
    unsafe fn part_store(v: Self::Part, to: *mut f32) {
        // SAFETY: as above.
        unsafe {
            vst1q_f32(to, v[0]);
            vst1q_f32(to.add(4), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn part_mul_add(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part {
        // SAFETY: as above.
        unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    }
    #[inline(always)]
    fn ask(_: *const u8) {}
}
