//! The vectors of AVX2 with FMA and F16C, and of AVX-512.

use core::arch::x86_64::*;
use std::sync::OnceLock;

use super::dense::{Call, LANES, Lanes, ROWS, by_encoding};
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
    type Whole = [__m256; 2];
    type Part = __m256;
    const PARTS: usize = 2;
    const TILE: usize = 3;
    #[inline(always)]
    unsafe fn zero() -> Self::Whole {
        // SAFETY: as above.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe { [_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.add(32).cast())] }
    }
    /// Interleaved with zeros, which widens in one instruction: lanes 0..4 and 8..12, then 4..8 and 12..16.
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe {
            let (words, zero) = (_mm256_loadu_si256(from.cast()), _mm256_setzero_si256());
            [
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn like_bf16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe {
            let from = from.cast::<f32>();
            [_mm256_loadu2_m128(from.add(8), from), _mm256_loadu2_m128(from.add(12), from.add(4))]
        }
    }
    #[inline(always)]
    unsafe fn store_bf16([a, b]: Self::Whole, to: *mut f32) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu2_m128(to.add(8), to, a);
            _mm256_storeu2_m128(to.add(12), to.add(4), b);
        }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::Whole, b: Self::Whole, c: Self::Whole) -> Self::Whole {
        // SAFETY: as above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn sum([a, b]: Self::Whole) -> f32 {
        // SAFETY: as above.
        unsafe {
            let v = _mm256_add_ps(a, b);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            four(v)
        }
    }
    #[inline(always)]
    unsafe fn sum_bf16([a, b]: Self::Whole) -> f32 {
        // SAFETY: as above.
        unsafe {
            // Eight apart are the halves of a register here.
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let b = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            four(_mm_add_ps(a, b))
        }
    }
    /// Four rows side by side, added up in the same order.
    #[inline(always)]
    unsafe fn four_sums(from: *const f32) -> [f32; ROWS] {
        // SAFETY: as above.
        unsafe {
            let mut rows = [_mm_setzero_ps(); ROWS];
            for (r, row) in rows.iter_mut().enumerate() {
                let [a, b] = Self::f32(from.add(r * LANES).cast());
                let v = _mm256_add_ps(a, b);
                *row = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            }
            let [mut a, mut b, mut c, mut d] = rows;
            _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
            let mut sums = [0.0; ROWS];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
            sums
        }
    }
    #[inline(always)]
    unsafe fn part_zero() -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn part(from: *const f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn part_store(v: __m256, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn part_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        // SAFETY: asking reads nothing that could be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// The sum of four lanes.
#[inline(always)]
unsafe fn four(v: __m128) -> f32 {
    // SAFETY: SSE3 is part of AVX2.
    unsafe {
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY of all methods: the caller's; the instruction set is available where they are inlined.
impl Lanes for Avx512 {
    type Whole = __m512;
    type Part = __m512;
    const PARTS: usize = 1;
    const TILE: usize = 6;
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
    unsafe fn like_bf16(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_bf16(v: __m512, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, v) }
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
            let upper = _mm512_shuffle_f32x4::<0b01_00_11_10>(v, v);
            let v = _mm512_castps512_ps256(_mm512_add_ps(v, upper));
            four(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)))
        }
    }
    #[inline(always)]
    unsafe fn sum_bf16(v: __m512) -> f32 {
        // SAFETY: as above.
        unsafe { Self::sum(v) }
    }
    #[inline(always)]
    unsafe fn four_sums(from: *const f32) -> [f32; ROWS] {
        // SAFETY: as above; AVX2 is part of it.
        unsafe { Avx2::four_sums(from) }
    }
    #[inline(always)]
    unsafe fn part_zero() -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn part(from: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn part_store(v: __m512, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn part_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        // SAFETY: asking reads nothing that could be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
