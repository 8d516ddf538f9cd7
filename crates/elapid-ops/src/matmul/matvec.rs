//! Products of a few rows with a transposed weight: `y = x Wᵀ` for the T = 1 step of a recurrence.
//!
//! The weight W [N, K] is read once, straight from memory, eight rows at a time, and transposed in registers;
//! every element keeps the summation order of [`super::kernel`], so one token alone gives the bits that it
//! gives within a batch.

use super::kernel::{KC, Operand};

/// Most rows that take this path; from there on packing the weight pays.
pub(super) const MAX_ROWS: usize = 4;

/// `c[i, j] = Σ_k a[i, k] b[k, j]` for `m <= MAX_ROWS` where both operands are contiguous along k
/// (`a.col == 1`, `b.row == 1`).
///
/// # Safety
/// The operands must hold `m x k` and `k x n` elements, `c` `m` rows of `n` elements with the given stride.
pub(super) unsafe fn few_rows(
    a: Operand,
    b: Operand,
    c: *mut f32,
    c_stride: usize,
    m: usize,
    n: usize,
    k: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if pulp::x86::V3::is_available() {
        // SAFETY: AVX2 and FMA were found; the caller vouches for the operands.
        unsafe {
            match m {
                1 => x86::rows::<1>(a, b, c, c_stride, n, k),
                2 => x86::rows::<2>(a, b, c, c_stride, n, k),
                3 => x86::rows::<3>(a, b, c, c_stride, n, k),
                _ => x86::rows::<4>(a, b, c, c_stride, n, k),
            }
        }
        return;
    }
    // SAFETY: the caller vouches for the operands.
    unsafe { portable(a, b, c, c_stride, m, n, k) }
}

/// Eight columns of the result at a time, each its own chain.
///
/// # Safety
/// As [`few_rows`].
unsafe fn portable(
    a: Operand,
    b: Operand,
    c: *mut f32,
    c_stride: usize,
    m: usize,
    n: usize,
    k: usize,
) {
    const LANES: usize = 8;
    for i in 0..m {
        for j0 in (0..n).step_by(LANES) {
            let width = LANES.min(n - j0);
            let mut total = [0.0f32; LANES];
            for k0 in (0..k).step_by(KC) {
                let mut sums = [0.0f32; LANES];
                for t in k0..k.min(k0 + KC) {
                    // SAFETY: (i, t) and (t, j0 + j) are inside the operands.
                    unsafe {
                        let value = *a.at(i, t).ptr;
                        for (j, sum) in sums.iter_mut().enumerate().take(width) {
                            *sum = mul_add(value, *b.at(t, j0 + j).ptr, *sum);
                        }
                    }
                }
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total = if k0 == 0 { sum } else { *total + sum };
                }
            }
            for (j, &value) in total.iter().enumerate().take(width) {
                // SAFETY: (i, j0 + j) is inside the result.
                unsafe { *c.add(i * c_stride + j0 + j) = value };
            }
        }
    }
}

/// The multiply-add of the tile kernels: fused wherever their vectors are, else a product and a sum.
#[inline(always)]
fn mul_add(x: f32, y: f32, sum: f32) -> f32 {
    if cfg!(target_arch = "aarch64") { x.mul_add(y, sum) } else { x * y + sum }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The AVX2 form: blocks of eight rows by four terms, transposed in registers, two in flight.

    use super::super::transpose::x86::load_columns;
    use super::{KC, Operand};
    use core::arch::x86_64::*;

    /// # Safety
    /// AVX2 and FMA must be available; else as [`super::few_rows`] with `m = R` and `a.col == 1`.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn rows<const R: usize>(
        a: Operand,
        b: Operand,
        c: *mut f32,
        c_stride: usize,
        n: usize,
        k: usize,
    ) {
        // SAFETY: each group lies inside the columns of b and c.
        unsafe {
            let mut j = 0;
            while j + 16 <= n {
                group::<R, 2>(a, b.at(0, j), c.add(j), c_stride, k);
                j += 16;
            }
            while j + 8 <= n {
                group::<R, 1>(a, b.at(0, j), c.add(j), c_stride, k);
                j += 8;
            }
            for j in j..n {
                single::<R>(a, b.at(0, j), c.add(j), c_stride, k);
            }
        }
    }

    /// `8 * G` columns.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn group<const R: usize, const G: usize>(
        a: Operand,
        b: Operand,
        c: *mut f32,
        c_stride: usize,
        k: usize,
    ) {
        for k0 in (0..k).step_by(KC) {
            let end = k.min(k0 + KC);
            let full = k0 + (end - k0) / 4 * 4;
            let mut sums = [[_mm256_setzero_ps(); G]; R];
            // SAFETY: terms k0..end of R rows and 8 G columns, result R x 8 G.
            unsafe {
                for t in (k0..full).step_by(4) {
                    // Written out, so that the sums of both groups stay in registers.
                    macro_rules! blocks {
                        ($($g:literal)*) => {$(
                            if $g < G {
                                let columns = load_columns(b.ptr.add($g * 8 * b.col + t), b.col);
                                for (dt, column) in columns.into_iter().enumerate() {
                                    for (i, sum) in sums.iter_mut().enumerate() {
                                        let value = _mm256_broadcast_ss(&*a.ptr.add(i * a.row + t + dt));
                                        sum[$g % G] = _mm256_fmadd_ps(value, column, sum[$g % G]);
                                    }
                                }
                            }
                        )*};
                    }
                    blocks!(0 1);
                }
                for t in full..end {
                    for g in 0..G {
                        let mut column = [0.0f32; 8];
                        for (j, value) in column.iter_mut().enumerate() {
                            *value = *b.at(t, g * 8 + j).ptr;
                        }
                        let column = _mm256_loadu_ps(column.as_ptr());
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let value = _mm256_broadcast_ss(&*a.ptr.add(i * a.row + t));
                            sum[g] = _mm256_fmadd_ps(value, column, sum[g]);
                        }
                    }
                }
                for (i, row) in sums.iter().enumerate() {
                    for (g, &sum) in row.iter().enumerate() {
                        let out = c.add(i * c_stride + g * 8);
                        let sum =
                            if k0 > 0 { _mm256_add_ps(_mm256_loadu_ps(out), sum) } else { sum };
                        _mm256_storeu_ps(out, sum);
                    }
                }
            }
        }
    }

    /// One column.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn single<const R: usize>(
        a: Operand,
        b: Operand,
        c: *mut f32,
        c_stride: usize,
        k: usize,
    ) {
        for i in 0..R {
            for k0 in (0..k).step_by(KC) {
                let mut sum = 0.0f32;
                // SAFETY: terms of row i and of this column; one element of the result.
                unsafe {
                    for t in k0..k.min(k0 + KC) {
                        sum = (*a.ptr.add(i * a.row + t)).mul_add(*b.ptr.add(t), sum);
                    }
                    let out = c.add(i * c_stride);
                    *out = if k0 > 0 { *out + sum } else { sum };
                }
            }
        }
    }
}
