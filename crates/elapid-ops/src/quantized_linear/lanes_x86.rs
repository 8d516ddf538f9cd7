//! Sixteen sums of products of bytes side by side: on AVX2, which adds products up in pairs, and on AVX-512 with VNNI,
//! which adds them up in fours.
//!
//! A product of bytes takes one factor without a sign. Weights of four bits have none, and what was added to them is
//! taken off again by the sums' beginning, which depends on the token alone. For weights of eight bits, VNNI does the
//! same with 128 added to them; pairs would not fit 16 bits then, so on AVX2 the token's magnitudes are the factor
//! without a sign and the bits of the weights are turned over where the token is negative: |x| (-w - 1) = x w - |x|.

use core::arch::x86_64::*;

use super::quads::ROWS;

/// An instruction set. Methods may be called where it is available, with addresses of what they name.
pub(super) trait Lanes {
    /// A sum of each row; two of 16 bits where products of four bits are added up in pairs.
    type Sums: Copy;
    /// Four bytes of each row.
    type Quads: Copy;
    /// Tokens whose sums fit the registers beside what they are made of.
    const TILE: usize;
    /// Sums of each token that a block's products are added to in turns, so that none waits for the one before.
    const CHAINS: usize;
    /// Added to weights of eight bits.
    const FLIP: i8;
    /// Words that a quad of a token takes for weights of eight bits.
    const WORDS: usize;
    /// True if scales inside of a block are pairs of the same 16 bits, not one number of 32.
    const PAIRS: bool;

    /// The same in every lane.
    unsafe fn every(word: i32) -> Self::Sums;
    /// The rows' quads.
    unsafe fn quads(at: *const u8) -> Self::Quads;
    /// Stores the quads of eight rows and of the other eight, as they are read again.
    unsafe fn put(first: __m256i, last: __m256i, to: *mut u8);
    /// The sums of both.
    unsafe fn sum(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// Lays the 32 bytes of a token out for weights of eight bits, quads `step` words apart, and returns where its sums
    /// begin.
    unsafe fn lay_eight(x: *const i8, sum: i32, to: *mut i32, step: usize) -> i32;
    /// Where the sums of 32 bytes of a token with weights of four bits less 8 begin.
    unsafe fn begin_four(x: *const i8, sum: i32) -> i32;
    /// Adds the products with weights of eight bits.
    unsafe fn add_eight(sums: Self::Sums, w: Self::Quads, x: *const i32) -> Self::Sums;
    /// Adds the products with weights of four bits, up to eight times from the beginning.
    unsafe fn add_four(sums: Self::Sums, w: Self::Quads, x: *const i32) -> Self::Sums;
    /// Sums of weights of four bits as one number each.
    unsafe fn whole(sums: Self::Sums) -> Self::Sums;
    /// Adds such sums times the scales at `scales`.
    unsafe fn add_scaled(sums: Self::Sums, four: Self::Sums, scales: *const u8) -> Self::Sums;
    /// Adds the products of pairs of 16 bits.
    unsafe fn add_pairs(sums: Self::Sums, w: *const u8, x: *const i32) -> Self::Sums;
    /// y ← y + d scale sums
    unsafe fn take(sums: Self::Sums, d: *const u8, scale: *const i32, y: *mut f32);
    /// y ← y - d scale sums
    unsafe fn take_off(sums: Self::Sums, d: *const u8, scale: *const i32, y: *mut f32);
}

// SAFETY of everything below: the caller's: what is named is at the addresses, and the instruction set is available
// where a function is inlined.

#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// 16 bits of one.
#[inline(always)]
unsafe fn ones() -> __m256i {
    // SAFETY: as above.
    unsafe { _mm256_set1_epi16(1) }
}

/// The sum of eight lanes of pairs of 16 bits, as such a pair.
#[inline(always)]
unsafe fn both_halves(v: __m256i) -> i32 {
    // SAFETY: as above.
    unsafe {
        let v = _mm_add_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let v = _mm_add_epi16(v, _mm_shuffle_epi32::<0b1110>(v));
        _mm_cvtsi128_si32(_mm_add_epi16(v, _mm_shuffle_epi32::<0b01>(v)))
    }
}

impl Lanes for Avx2 {
    type Sums = [__m256i; 2];
    type Quads = [__m256i; 2];
    const TILE: usize = 4;
    const CHAINS: usize = 1;
    const FLIP: i8 = 0;
    const WORDS: usize = 2;
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn every(word: i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe { [_mm256_set1_epi32(word); 2] }
    }
    #[inline(always)]
    unsafe fn quads(at: *const u8) -> Self::Quads {
        // SAFETY: as above.
        unsafe { [_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn put(first: __m256i, last: __m256i, to: *mut u8) {
        // SAFETY: as above.
        unsafe {
            _mm256_store_si256(to.cast(), first);
            _mm256_store_si256(to.add(32).cast(), last);
        }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        // SAFETY: as above.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    /// Magnitudes, then all bits where the sign is negative.
    #[inline(always)]
    unsafe fn lay_eight(x: *const i8, sum: i32, to: *mut i32, step: usize) -> i32 {
        // SAFETY: as above.
        unsafe {
            let zero = _mm256_setzero_si256();
            let x = _mm256_loadu_si256(x.cast());
            let (size, sign) = (_mm256_abs_epi8(x), _mm256_cmpgt_epi8(zero, x));
            let mut pairs = [0i64; 8];
            let (low, high) =
                (_mm256_unpacklo_epi32(size, sign), _mm256_unpackhi_epi32(size, sign));
            _mm256_storeu_si256(
                pairs.as_mut_ptr().cast(),
                _mm256_permute2x128_si256::<0x20>(low, high),
            );
            _mm256_storeu_si256(
                pairs.as_mut_ptr().add(4).cast(),
                _mm256_permute2x128_si256::<0x31>(low, high),
            );
            for (j, pair) in pairs.into_iter().enumerate() {
                to.add(j * step).cast::<i64>().write_unaligned(pair);
            }
            // Four sums of eight magnitudes.
            let sums = _mm256_sad_epu8(size, zero);
            let two =
                _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            let sizes = _mm_cvtsi128_si32(two) + _mm_extract_epi32::<2>(two);
            (sizes - sum) / 2
        }
    }
    #[inline(always)]
    unsafe fn begin_four(x: *const i8, _: i32) -> i32 {
        // SAFETY: as above.
        unsafe {
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(8), _mm256_loadu_si256(x.cast()));
            both_halves(_mm256_sub_epi16(_mm256_setzero_si256(), pairs))
        }
    }
    #[inline(always)]
    unsafe fn add_eight(sums: Self::Sums, w: Self::Quads, x: *const i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let (size, sign) = (_mm256_set1_epi32(*x), _mm256_set1_epi32(*x.add(1)));
            // At most 2 * 127 * 128.
            let low = _mm256_maddubs_epi16(size, _mm256_xor_si256(sign, w[0]));
            let high = _mm256_maddubs_epi16(size, _mm256_xor_si256(sign, w[1]));
            [
                _mm256_add_epi32(sums[0], _mm256_madd_epi16(low, ones())),
                _mm256_add_epi32(sums[1], _mm256_madd_epi16(high, ones())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add_four(sums: Self::Sums, w: Self::Quads, x: *const i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let x = _mm256_set1_epi32(*x);
            // At most 8 * 2 * 15 * 127; less what `begin_four` takes off, 8 * 2 * 8 * 127.
            [
                _mm256_add_epi16(sums[0], _mm256_maddubs_epi16(w[0], x)),
                _mm256_add_epi16(sums[1], _mm256_maddubs_epi16(w[1], x)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn whole(sums: Self::Sums) -> Self::Sums {
        // SAFETY: as above.
        unsafe { [_mm256_madd_epi16(sums[0], ones()), _mm256_madd_epi16(sums[1], ones())] }
    }
    #[inline(always)]
    unsafe fn add_scaled(sums: Self::Sums, four: Self::Sums, scales: *const u8) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let s = Self::quads(scales);
            [
                _mm256_add_epi32(sums[0], _mm256_madd_epi16(four[0], s[0])),
                _mm256_add_epi32(sums[1], _mm256_madd_epi16(four[1], s[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add_pairs(sums: Self::Sums, w: *const u8, x: *const i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe { Self::add_scaled(sums, Self::every(*x), w) }
    }
    #[inline(always)]
    unsafe fn take(sums: Self::Sums, d: *const u8, scale: *const i32, y: *mut f32) {
        // SAFETY: as above.
        unsafe {
            let scale = _mm256_set1_ps(*scale.cast());
            for (h, sums) in sums.into_iter().enumerate() {
                let (d, y) = (_mm256_load_ps(d.cast::<f32>().add(8 * h)), y.add(8 * h));
                let d = _mm256_mul_ps(d, scale);
                _mm256_store_ps(y, _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sums), _mm256_load_ps(y)));
            }
        }
    }
    #[inline(always)]
    unsafe fn take_off(sums: Self::Sums, d: *const u8, scale: *const i32, y: *mut f32) {
        // SAFETY: as above.
        unsafe {
            let scale = _mm256_set1_ps(*scale.cast());
            for (h, sums) in sums.into_iter().enumerate() {
                let (d, y) = (_mm256_load_ps(d.cast::<f32>().add(8 * h)), y.add(8 * h));
                let d = _mm256_mul_ps(d, scale);
                _mm256_store_ps(
                    y,
                    _mm256_fnmadd_ps(d, _mm256_cvtepi32_ps(sums), _mm256_load_ps(y)),
                );
            }
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Vnni;

impl Lanes for Vnni {
    type Sums = __m512i;
    type Quads = __m512i;
    const TILE: usize = 12;
    const CHAINS: usize = 2;
    const FLIP: i8 = i8::MIN;
    const WORDS: usize = 1;
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn every(word: i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(word) }
    }
    #[inline(always)]
    unsafe fn quads(at: *const u8) -> Self::Quads {
        // SAFETY: as above.
        unsafe { _mm512_load_si512(at.cast()) }
    }
    /// One store, which a load of all may follow at once.
    #[inline(always)]
    unsafe fn put(first: __m256i, last: __m256i, to: *mut u8) {
        // SAFETY: as above.
        unsafe {
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), last);
            _mm512_store_si512(to.cast(), both);
        }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn lay_eight(x: *const i8, sum: i32, to: *mut i32, step: usize) -> i32 {
        for j in 0..8 {
            // SAFETY: as above.
            unsafe { *to.add(j * step) = x.cast::<i32>().add(j).read_unaligned() };
        }
        -128 * sum
    }
    #[inline(always)]
    unsafe fn begin_four(_: *const i8, sum: i32) -> i32 {
        -8 * sum
    }
    #[inline(always)]
    unsafe fn add_eight(sums: Self::Sums, w: Self::Quads, x: *const i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(*x)) }
    }
    #[inline(always)]
    unsafe fn add_four(sums: Self::Sums, w: Self::Quads, x: *const i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe { Self::add_eight(sums, w, x) }
    }
    #[inline(always)]
    unsafe fn whole(sums: Self::Sums) -> Self::Sums {
        sums
    }
    #[inline(always)]
    unsafe fn add_scaled(sums: Self::Sums, four: Self::Sums, scales: *const u8) -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_add_epi32(sums, _mm512_mullo_epi32(four, Self::quads(scales))) }
    }
    #[inline(always)]
    unsafe fn add_pairs(sums: Self::Sums, w: *const u8, x: *const i32) -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_dpwssd_epi32(sums, Self::quads(w), _mm512_set1_epi32(*x)) }
    }
    #[inline(always)]
    unsafe fn take(sums: Self::Sums, d: *const u8, scale: *const i32, y: *mut f32) {
        // SAFETY: as above.
        unsafe {
            let d = _mm512_mul_ps(_mm512_load_ps(d.cast()), _mm512_set1_ps(*scale.cast()));
            let sums = _mm512_cvtepi32_ps(sums);
            _mm512_store_ps(y, _mm512_fmadd_ps(d, sums, _mm512_load_ps(y)));
        }
    }
    #[inline(always)]
    unsafe fn take_off(sums: Self::Sums, d: *const u8, scale: *const i32, y: *mut f32) {
        // SAFETY: as above.
        unsafe {
            let d = _mm512_mul_ps(_mm512_load_ps(d.cast()), _mm512_set1_ps(*scale.cast()));
            let sums = _mm512_cvtepi32_ps(sums);
            _mm512_store_ps(y, _mm512_fnmadd_ps(d, sums, _mm512_load_ps(y)));
        }
    }
}

/// Sixteen bytes of eight rows, `at` bytes from where they begin: vector j has each row's j-th quad, a lane a row.
#[inline(always)]
pub(super) unsafe fn transposed(rows: &[*const u8; ROWS], first: usize, at: usize) -> [__m256i; 4] {
    // SAFETY: as above.
    unsafe {
        let mut v = [_mm256_setzero_si256(); 4];
        for (r, v) in v.iter_mut().enumerate() {
            let (low, high) = (rows[first + r].add(at), rows[first + r + 4].add(at));
            *v = _mm256_loadu2_m128i(high.cast(), low.cast());
        }
        let (a, b) = (_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
        let (c, d) = (_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    }
}
