//! The histories of convolutions of four taps: three numbers of a channel stand side by side in a state, and are wanted
//! one beside the other channels'.

use super::TILE;

/// [TILE, 3] to [3, TILE].
///
/// # Safety
/// Both must be there and not overlap.
#[inline(always)]
pub(super) unsafe fn apart(from: *const f32, to: *mut f32) {
    for channel in (0..TILE).step_by(8) {
        // SAFETY: eight channels of both; the instructions were found.
        unsafe {
            let (from, to) = (from.add(3 * channel), to.add(channel));
            #[cfg(target_arch = "x86_64")]
            if pulp::x86::V3::is_available() {
                x86::apart(from, to);
                continue;
            }
            for tap in 0..3 {
                for channel in 0..8 {
                    *to.add(TILE * tap + channel) = *from.add(3 * channel + tap);
                }
            }
        }
    }
}

/// [3, TILE] to [TILE, 3].
///
/// # Safety
/// As [`apart`].
#[inline(always)]
pub(super) unsafe fn together(from: *const f32, to: *mut f32) {
    for channel in (0..TILE).step_by(8) {
        // SAFETY: as in `apart`.
        unsafe {
            let (from, to) = (from.add(channel), to.add(3 * channel));
            #[cfg(target_arch = "x86_64")]
            if pulp::x86::V3::is_available() {
                x86::together(from, to);
                continue;
            }
            for channel in 0..8 {
                for tap in 0..3 {
                    *to.add(3 * channel + tap) = *from.add(TILE * tap + channel);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Of three vectors every third lane belongs together, so two blends and a permutation make or take one.

    use core::arch::x86_64::*;

    use super::TILE;

    /// Lanes 1, 4 and 7, and lanes 2 and 5.
    const SECOND: i32 = 0b1001_0010;
    const THIRD: i32 = 0b0010_0100;

    /// Eight channels.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub unsafe fn apart(from: *const f32, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            let a = _mm256_loadu_ps(from);
            let b = _mm256_loadu_ps(from.add(8));
            let c = _mm256_loadu_ps(from.add(16));
            let first = _mm256_blend_ps::<THIRD>(_mm256_blend_ps::<SECOND>(a, b), c);
            let second = _mm256_blend_ps::<THIRD>(_mm256_blend_ps::<SECOND>(c, a), b);
            let third = _mm256_blend_ps::<THIRD>(_mm256_blend_ps::<SECOND>(b, c), a);
            let places = _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5);
            _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(first, places));
            let places = _mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6);
            _mm256_storeu_ps(to.add(TILE), _mm256_permutevar8x32_ps(second, places));
            let places = _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7);
            _mm256_storeu_ps(to.add(2 * TILE), _mm256_permutevar8x32_ps(third, places));
        }
    }

    /// Eight channels.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub unsafe fn together(from: *const f32, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            let places = _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5);
            let first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), places);
            let places = _mm256_setr_epi32(5, 0, 3, 6, 1, 4, 7, 2);
            let second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from.add(TILE)), places);
            let places = _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7);
            let third = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from.add(2 * TILE)), places);
            let a = _mm256_blend_ps::<THIRD>(_mm256_blend_ps::<SECOND>(first, second), third);
            let b = _mm256_blend_ps::<THIRD>(_mm256_blend_ps::<SECOND>(third, first), second);
            let c = _mm256_blend_ps::<THIRD>(_mm256_blend_ps::<SECOND>(second, third), first);
            _mm256_storeu_ps(to, a);
            _mm256_storeu_ps(to.add(8), b);
            _mm256_storeu_ps(to.add(16), c);
        }
    }
}
