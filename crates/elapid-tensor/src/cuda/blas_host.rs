//! Matrix products on the emulated card: plain Rust on the memory of this program. Every element is one sum in f64 in
//! the order of k, rounded once at the end, so it is at least as accurate as any card.

use half::bf16;
use rayon::prelude::*;

use super::blas::{Matrix, Product};
use crate::DType;

/// Multiplications below which one thread is faster than waking others.
const WORTH_THREADS: usize = 1 << 16;

/// One matrix of a batch: elements by row and column.
#[derive(Clone, Copy)]
struct Elements {
    address: u64,
    dtype: DType,
    row_stride: usize,
    col_stride: usize,
}

impl Elements {
    fn new(matrix: &Matrix, index: usize) -> Self {
        let start = index * matrix.batch_stride * matrix.dtype.size();
        let (row_stride, col_stride) =
            if matrix.transposed { (1, matrix.stride) } else { (matrix.stride, 1) };
        let address = matrix.address + start as u64;
        Self { address, dtype: matrix.dtype, row_stride, col_stride }
    }

    fn place<T>(self, row: usize, col: usize) -> *mut T {
        let offset = row * self.row_stride + col * self.col_stride;
        (self.address as *mut T).wrapping_add(offset)
    }

    /// # Safety
    /// The element must be there, and nobody may write it meanwhile.
    unsafe fn read(self, row: usize, col: usize) -> f32 {
        if self.dtype == DType::F32 {
            // SAFETY: the caller's promise; addresses are multiples of the element's size.
            unsafe { self.place::<f32>(row, col).read() }
        } else {
            // SAFETY: as above; the only other type is BF16.
            unsafe { self.place::<bf16>(row, col).read() }.to_f32()
        }
    }

    /// # Safety
    /// The element must be there, and nobody may use it meanwhile.
    unsafe fn write(self, row: usize, col: usize, value: f32) {
        if self.dtype == DType::F32 {
            // SAFETY: the caller's promise; addresses are multiples of the element's size.
            unsafe { self.place::<f32>(row, col).write(value) };
        } else {
            // SAFETY: as above; the only other type is BF16.
            unsafe { self.place::<bf16>(row, col).write(bf16::from_f32(value)) };
        }
    }
}

/// To the nearest number with 10 bits after the point, ties away from zero; infinities and NaN pass.
pub(super) fn round_to_tf32(value: f32) -> f32 {
    if !value.is_finite() {
        return value;
    }
    f32::from_bits(value.to_bits().wrapping_add(1 << 12) & !((1 << 13) - 1))
}

/// # Safety
/// As [`super::Gpu::multiply`], of a product that has passed its checks.
pub(super) unsafe fn multiply(product: &Product) {
    let Product { a, b, c, alpha, beta, .. } = *product;
    let (m, n, k) = (c.rows, c.cols, a.cols);
    let round = product.tf32 && a.dtype == DType::F32;
    let input = |value: f32| f64::from(if round { round_to_tf32(value) } else { value });
    let bias: Vec<f64> = if product.bias == 0 {
        vec![0.0; n]
    } else {
        let bias = Matrix::contiguous(product.bias, product.bias_dtype, 1, n);
        // SAFETY: the caller's promise: n elements.
        (0..n).map(|col| f64::from(unsafe { Elements::new(&bias, 0).read(0, col) })).collect()
    };
    for index in 0..product.batch {
        let [a, b, c] = [a, b, c].map(|matrix| Elements::new(&matrix, index));
        // SAFETY: within [k, n], which nobody writes.
        let entry = |i: usize| input(unsafe { b.read(i / n, i % n) });
        let right: Vec<f64> = (0..k * n).map(entry).collect();
        let row = |row: usize| {
            let mut sums = vec![0.0; n];
            for (term, right) in right.chunks_exact(n).enumerate() {
                // SAFETY: within [m, k], which nobody writes.
                let left = input(unsafe { a.read(row, term) });
                sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
            }
            for (col, (sum, bias)) in sums.into_iter().zip(&bias).enumerate() {
                let mut value = f64::from(alpha) * sum + bias;
                if beta != 0.0 {
                    // SAFETY: within [m, n]; this row is this call's alone.
                    value += f64::from(beta) * f64::from(unsafe { c.read(row, col) });
                }
                // SAFETY: as above.
                unsafe { c.write(row, col, value as f32) };
            }
        };
        if m * n * k < WORTH_THREADS {
            (0..m).for_each(row);
        } else {
            (0..m).into_par_iter().for_each(row);
        }
    }
}
