//! The vectors of AVX2 with FMA and F16C, and of AVX-512.

use core::arch::x86_64::*;
use std::sync::OnceLock;

use super::dense::{Call, Lanes, by_encoding};
use crate::blocks::Encoding;

/// AVX2, FMA and F16C.
pub(super) fn has_avx2() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    })
}

/// AVX-512 as far as floats need it.
pub(super) fn has_avx512() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
    })
}

/// False if there is neither.
///
/// # Safety
/// As [`super::product`].
pub(super) unsafe fn rows(encoding: Encoding, call: Call) -> bool {
    // SAFETY: the instruction sets were found.
    unsafe {
        if has_avx512() {
            avx512(encoding, call);
        } else if has_avx2() {
            avx2(encoding, call);
        } else {
            return false;
        }
    }
    true
}

/// # Safety
/// As [`super::product`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Avx2>(encoding, call) }
}

/// # Safety
/// As [`super::product`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn avx512(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Avx512>(encoding, call) }
}

#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY of all methods: the caller's; the instruction set is available where they are inlined.
impl Lanes for Avx2 {
    const LANES: usize = 8;
    type Vector = __m256;
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: as above.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY of all methods: the caller's; the instruction set is available where they are inlined.
impl Lanes for Avx512 {
    const LANES: usize = 16;
    type Vector = __m512;
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: as above.
        unsafe {
            let upper = _mm512_castsi512_ps(_mm512_shuffle_i64x2::<0b01_00_11_10>(
                _mm512_castps_si512(v),
                _mm512_castps_si512(v),
            ));
            Avx2::sum(_mm512_castps512_ps256(_mm512_add_ps(v, upper)))
        }
    }
}
