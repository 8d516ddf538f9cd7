//! The vectors of AVX2 with FMA and F16C, and of AVX-512.

use core::arch::x86_64::*;

use super::super::detected::{has_avx2, has_avx512};
use super::{Call, Vectors, by_encoding};
use crate::blocks::Encoding;

/// False if there is neither.
///
/// # Safety
/// As [`super::super::product`].
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
/// As [`super::super::product`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn avx2(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Avx2>(encoding, call) }
}

/// # Safety
/// As [`super::super::product`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(in super::super) unsafe fn avx512(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe { by_encoding::<Avx512>(encoding, call) }
}

#[derive(Clone, Copy)]
struct Avx2;

// SAFETY of all methods: the caller's; the instruction set is available where they are inlined.
impl Vectors for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    const TOKENS: usize = 3;
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(v: __m256, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    /// Interleaved with zeros, which widens in one instruction: columns 0..4 and 8..12, then 4..8 and 12..16.
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> [__m256; 2] {
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
    unsafe fn like_bf16(from: *const f32) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            [_mm256_loadu2_m128(from.add(8), from), _mm256_loadu2_m128(from.add(12), from.add(4))]
        }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    /// All four side by side.
    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // SAFETY: as above.
        unsafe {
            // Lanes l and l + 4: a's four sums, then b's; c's, then d's.
            let ab = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(a, b),
                _mm256_permute2f128_ps::<0x31>(a, b),
            );
            let cd = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(c, d),
                _mm256_permute2f128_ps::<0x31>(c, d),
            );
            // Two apart: a and c in turns, twice, then b and d.
            let v = _mm256_add_ps(_mm256_unpacklo_ps(ab, cd), _mm256_unpackhi_ps(ab, cd));
            let v = _mm256_add_ps(v, _mm256_permute_ps::<0b00_00_11_10>(v));
            let (ac, bd) = (_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_unpacklo_ps(ac, bd));
            sums
        }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        // SAFETY: asking reads nothing that could be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

#[derive(Clone, Copy)]
struct Avx512;

// SAFETY of all methods: the caller's; the instruction set is available where they are inlined.
impl Vectors for Avx512 {
    type Vector = __m512;
    const LANES: usize = 16;
    const TOKENS: usize = 6;
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(v: __m512, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> [__m512; 2] {
        // SAFETY: as above.
        unsafe {
            let from = from.cast::<__m256i>();
            let a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
            let b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.add(1)));
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn like_bf16(from: *const f32) -> [__m512; 2] {
        // SAFETY: as above.
        unsafe { [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))] }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> [__m512; 2] {
        // SAFETY: as above.
        unsafe {
            let from = from.cast::<__m256i>();
            [
                _mm512_cvtph_ps(_mm256_loadu_si256(from)),
                _mm512_cvtph_ps(_mm256_loadu_si256(from.add(1))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sums(v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: as above; AVX2 is part of it.
        unsafe {
            let mut halves = [_mm256_setzero_ps(); 4];
            for (half, v) in halves.iter_mut().zip(v) {
                let upper = _mm512_shuffle_f32x4::<0b01_00_11_10>(v, v);
                *half = _mm512_castps512_ps256(_mm512_add_ps(v, upper));
            }
            Avx2::sums(halves)
        }
    }
    /// Both side by side, so that no half of a vector is idle.
    #[inline(always)]
    unsafe fn sums_of_two([a, b]: [[__m512; 4]; 2]) -> [[f32; 4]; 2] {
        // SAFETY: as above.
        unsafe {
            // Lanes l and l + 8: a's eight sums, then b's.
            let mut rows = [_mm512_setzero_ps(); 4];
            for (row, (a, b)) in rows.iter_mut().zip(a.into_iter().zip(b)) {
                let lower = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                let upper = _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b);
                *row = _mm512_add_ps(lower, upper);
            }
            // Four apart: a and b of the first row, then of the second.
            let first = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(rows[0], rows[1]),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(rows[0], rows[1]),
            );
            let last = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(rows[2], rows[3]),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(rows[2], rows[3]),
            );
            // Two apart: rows 0 and 2 in turns, or 1 and 3.
            let v = _mm512_add_ps(_mm512_unpacklo_ps(first, last), _mm512_unpackhi_ps(first, last));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b00_00_11_10>(v));
            let odd = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b11_10_11_10>(v, v));
            let sums = _mm256_unpacklo_ps(_mm512_castps512_ps256(v), odd);
            std::mem::transmute::<__m256, [[f32; 4]; 2]>(sums)
        }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        Avx2::ask(at);
    }
}
