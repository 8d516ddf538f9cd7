//! Transposes of small blocks: turns eight rows of a row-major weight into vectors that run over the rows.
//!
//! Products with a transposed right side (`y = x Wᵀ`, W [N, K]) read W along K but compute along N. An
//! 8 x 8 block transposed in registers costs 16 shuffles for 64 values, so even a matrix-vector product
//! stays bound by memory.

/// Copies the `rows x cols` block at `src` (row stride `src_stride`) to `dst` transposed: element (r, c)
/// lands at `dst[c * dst_stride + r]`.
///
/// # Safety
/// All addressed elements of both blocks must lie inside their allocations, and the blocks must not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose_block(
    src: *const f32,
    src_stride: usize,
    rows: usize,
    cols: usize,
    dst: *mut f32,
    dst_stride: usize,
) {
    let (full_rows, full_cols) = (rows / 8 * 8, cols / 8 * 8);
    // SAFETY: every index below is within `rows x cols`, which the caller vouches for.
    unsafe {
        let mut r = 0;
        while r < full_rows {
            let mut c = 0;
            while c < full_cols {
                transpose_8x8(
                    src.add(r * src_stride + c),
                    src_stride,
                    dst.add(c * dst_stride + r),
                    dst_stride,
                );
                c += 8;
            }
            r += 8;
        }
        for r in 0..rows {
            let first = if r < full_rows { full_cols } else { 0 };
            for c in first..cols {
                *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_8x8(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    if pulp::x86::V3::is_available() {
        // SAFETY: AVX was found at run time; the caller vouches for the addresses.
        unsafe { x86::transpose_8x8(src, src_stride, dst, dst_stride) }
    } else {
        // SAFETY: the caller vouches for the addresses.
        unsafe { transpose_8x8_portable(src, src_stride, dst, dst_stride) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn transpose_8x8(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    // SAFETY: the caller vouches for the addresses.
    unsafe { transpose_8x8_portable(src, src_stride, dst, dst_stride) }
}

#[inline(always)]
unsafe fn transpose_8x8_portable(
    src: *const f32,
    src_stride: usize,
    dst: *mut f32,
    dst_stride: usize,
) {
    for c in 0..8 {
        let mut column = [0.0f32; 8];
        for (r, value) in column.iter_mut().enumerate() {
            // SAFETY: (r, c) is within the 8 x 8 block.
            *value = unsafe { *src.add(r * src_stride + c) };
        }
        // SAFETY: row c of the destination block has eight elements.
        unsafe { dst.add(c * dst_stride).cast::<[f32; 8]>().write_unaligned(column) };
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! The AVX form.

    use core::arch::x86_64::*;

    /// Loads four columns of eight rows with row stride `stride`: vector c holds element c of every row.
    ///
    /// # Safety
    /// AVX must be available and the block must lie inside its allocation.
    #[inline]
    #[target_feature(enable = "avx")]
    pub unsafe fn load_columns(src: *const f32, stride: usize) -> [__m256; 4] {
        // Rows r and r + 4 are joined while loading, so that the shuffles stay in 128-bit lanes.
        // SAFETY: rows 0..8 of the block, four elements each.
        let join = |r: usize| unsafe {
            let low = _mm256_castps128_ps256(_mm_loadu_ps(src.add(r * stride)));
            _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(src.add((r + 4) * stride)))
        };
        let (r0, r1, r2, r3) = (join(0), join(1), join(2), join(3));
        let (t0, t1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
        let (t2, t3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
        [
            _mm256_shuffle_ps::<0x44>(t0, t2),
            _mm256_shuffle_ps::<0xEE>(t0, t2),
            _mm256_shuffle_ps::<0x44>(t1, t3),
            _mm256_shuffle_ps::<0xEE>(t1, t3),
        ]
    }

    /// Transposes one 8 x 8 block.
    ///
    /// # Safety
    /// AVX must be available and both blocks must lie inside their allocations.
    #[inline]
    #[target_feature(enable = "avx")]
    pub unsafe fn transpose_8x8(
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller vouches for both blocks.
        unsafe {
            for half in [0, 4] {
                let columns = load_columns(src.add(half), src_stride);
                for (c, column) in columns.into_iter().enumerate() {
                    _mm256_storeu_ps(dst.add((half + c) * dst_stride), column);
                }
            }
        }
    }
}
