//! Residual addition and norm of one row. Sums run over lanes in ascending order, the lanes are then added up, so a
//! row's bits depend on nothing else.

use pulp::{Simd, WithSimd};

use crate::simd::{dispatch, load};

/// RMSNorm, or LayerNorm if there is a bias.
#[derive(Debug, Clone)]
pub struct Normalization {
    /// [D]
    pub weight: Vec<f32>,
    /// [D]
    pub bias: Option<Vec<f32>>,
    /// Added to the mean square or variance.
    pub eps: f32,
}

impl Normalization {
    /// `residual += x` (if there is one), `out = norm(residual)`.
    ///
    /// # Panics
    /// If the widths differ.
    pub fn run(&self, x: Option<&[f32]>, residual: &mut [f32], out: &mut [f32]) {
        assert_eq!((residual.len(), out.len()), (self.weight.len(), self.weight.len()), "width");
        if let Some(x) = x {
            for (residual, x) in residual.iter_mut().zip(x) {
                *residual += x;
            }
        }
        let width = residual.len() as f32;
        match &self.bias {
            None => {
                let scale = 1.0 / (sum_of_squares(residual, 0.0) / width + self.eps).sqrt();
                for ((out, x), w) in out.iter_mut().zip(&*residual).zip(&self.weight) {
                    *out = x * scale * w;
                }
            }
            Some(bias) => {
                let mean = sum(residual) / width;
                let scale = 1.0 / (sum_of_squares(residual, mean) / width + self.eps).sqrt();
                let parameters = self.weight.iter().zip(bias);
                for ((out, x), (w, b)) in out.iter_mut().zip(&*residual).zip(parameters) {
                    *out = (x - mean) * scale * w + b;
                }
            }
        }
    }
}

/// `x` over its root mean square: the norms of Δ's inputs, B and C in FalconMamba (arXiv 2410.05355).
pub fn rms(x: &mut [f32], eps: f32) {
    let scale = 1.0 / (sum_of_squares(x, 0.0) / x.len() as f32 + eps).sqrt();
    for x in x {
        *x *= scale;
    }
}

fn sum(x: &[f32]) -> f32 {
    struct Op<'a>(&'a [f32]);
    impl WithSimd for Op<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            let mut total = simd.splat_f32s(0.0);
            let parts = self.0.chunks_exact(S::F32_LANES);
            let rest = simd.partial_load_f32s(parts.remainder());
            for part in parts {
                total = simd.add_f32s(total, load(simd, part));
            }
            simd.reduce_sum_f32s(simd.add_f32s(total, rest))
        }
    }
    dispatch(Op(x))
}

/// The sum of (x - mean)².
fn sum_of_squares(x: &[f32], mean: f32) -> f32 {
    struct Op<'a>(&'a [f32], f32);
    impl WithSimd for Op<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            let mean = simd.splat_f32s(self.1);
            let mut total = simd.splat_f32s(0.0);
            let parts = self.0.chunks_exact(S::F32_LANES);
            let mut rest = 0.0f32;
            for x in parts.remainder() {
                rest += (x - self.1) * (x - self.1);
            }
            for part in parts {
                let x = simd.sub_f32s(load(simd, part), mean);
                total = simd.mul_add_e_f32s(x, x, total);
            }
            simd.reduce_sum_f32s(total) + rest
        }
    }
    dispatch(Op(x, mean))
}
