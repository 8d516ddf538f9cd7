//! The definition in f64: `C = A B` and its gradients, for contiguous row-major matrices.

/// `C[i, j] = Σ_k A[i, k] B[k, j]` with A [M, K], B [K, N].
pub fn matmul(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for t in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + t] * b[t * n + j];
            }
        }
    }
    c
}

/// Aᵀ of A [M, N].
pub fn transpose(a: &[f64], m: usize, n: usize) -> Vec<f64> {
    (0..n).flat_map(|j| (0..m).map(move |i| a[i * n + j])).collect()
}

/// `dA = dC Bᵀ` and `dB = Aᵀ dC`.
pub fn matmul_backward(
    a: &[f64],
    b: &[f64],
    dc: &[f64],
    m: usize,
    k: usize,
    n: usize,
) -> (Vec<f64>, Vec<f64>) {
    (matmul(dc, &transpose(b, k, n), m, n, k), matmul(&transpose(a, m, k), dc, k, m, n))
}
