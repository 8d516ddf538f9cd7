//! The fused loss: a chunk of scored tokens at a time, logits, losses and gradients follow each other while the
//! logits are in the cache. Ignored tokens are left out of the products altogether.
//!
//! The gradients are made in the forward pass: making the logits again in backward would be a third more
//! arithmetic, and keeping dx from one end of backward to the other costs no memory that backward does not need
//! anyway. Chunk bounds depend on the shapes alone and losses are added in f64 in the order of the tokens.

use elapid_tensor::{Buffer, RowView};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::matmul::{Matrix, gemm, gemm_add};
use crate::simd::dispatch;
use crate::softmax::cpu::{exp_and_sum, row_max, scale_row};

/// Logits of a chunk: 2 MiB, a part of the outer cache.
const CHUNK_LOGITS: usize = 1 << 19;
/// Fewest tokens of a chunk: below this the weight is read too often for what is done with it.
const CHUNK_TOKENS: usize = 256;
/// Logits that are one task when rows are normalised.
const TASK: usize = 16 << 10;

/// The operands, already checked: targets of scored tokens are below `classes`.
pub(super) struct Problem<'a> {
    /// `[T, D]`.
    pub(super) x: RowView<'a, f32>,
    /// `[V, D]`, of which the first `classes` rows take part.
    pub(super) weight: RowView<'a, f32>,
    pub(super) targets: &'a [i64],
    /// The tokens that count, in order.
    pub(super) scored: &'a [usize],
    pub(super) classes: usize,
}

/// Gradients of `factor Σ loss`.
pub(super) struct Gradients {
    pub(super) dx: Option<Buffer<f32>>,
    pub(super) dweight: Option<Buffer<f32>>,
}

/// Calls `f(token, loss)` for each scored token in order.
pub(super) fn losses(problem: &Problem<'_>, f: impl FnMut(usize, f64)) {
    run(problem, None, f, None, None);
}

/// As [`losses`], and the gradients of `factor` times their sum.
pub(super) fn losses_and_gradients(
    problem: &Problem<'_>,
    factor: f64,
    [wants_dx, wants_dweight]: [bool; 2],
    f: impl FnMut(usize, f64),
) -> Gradients {
    // Tokens and classes that take no part have a gradient of 0; all others are written.
    let gradient = |view: RowView<'_, f32>, all: bool| {
        let elements = view.rows * view.width;
        if all { Buffer::scratch(elements) } else { Buffer::zeros(elements) }
    };
    let Problem { x, weight, scored, classes, .. } = *problem;
    let mut dx = wants_dx.then(|| gradient(x, scored.len() == x.rows));
    let mut dweight =
        wants_dweight.then(|| gradient(weight, !scored.is_empty() && classes == weight.rows));
    run(problem, Some(factor), f, dx.as_deref_mut(), dweight.as_deref_mut());
    Gradients { dx, dweight }
}

fn matrix(view: RowView<'_, f32>, first: usize, rows: usize) -> Matrix<'_> {
    Matrix {
        data: &view.data[first * view.stride..],
        rows,
        cols: view.width,
        row_stride: view.stride,
        col_stride: 1,
    }
}

fn run(
    problem: &Problem<'_>,
    factor: Option<f64>,
    mut f: impl FnMut(usize, f64),
    mut dx: Option<&mut [f32]>,
    mut dweight: Option<&mut [f32]>,
) {
    let &Problem { x, weight, targets, scored, classes } = problem;
    if scored.is_empty() {
        return;
    }
    let width = x.width;
    let tokens = (CHUNK_LOGITS / classes).max(CHUNK_TOKENS).min(scored.len());
    let weight = matrix(weight, 0, classes);
    let mut logits = Buffer::<f32>::scratch(tokens * classes);
    let mut losses = vec![0f64; tokens];
    let mut rows = Vec::new();
    for (number, chunk) in scored.chunks(tokens).enumerate() {
        let (first, count) = (chunk[0], chunk.len());
        // Tokens without a gap are used where they lie.
        let together = chunk[count - 1] - first + 1 == count;
        let x = if together {
            matrix(x, first, count)
        } else {
            rows.clear();
            chunk.iter().for_each(|&t| rows.extend_from_slice(x.row(t)));
            Matrix::row_major(&rows, count, width)
        };
        let logits = &mut logits[..count * classes];
        checked(gemm(logits, x, weight.transposed()));
        normalise(logits, classes, chunk, targets, factor, &mut losses[..count]);
        chunk.iter().zip(&losses).for_each(|(&t, &loss)| f(t, loss));

        let dlogits = Matrix::row_major(logits, count, classes);
        if let Some(dweight) = dweight.as_deref_mut() {
            let dweight = &mut dweight[..classes * width];
            let product = if number == 0 { gemm } else { gemm_add };
            checked(product(dweight, dlogits.transposed(), x));
        }
        if let Some(dx) = dx.as_deref_mut() {
            if together {
                checked(gemm(&mut dx[first * width..][..count * width], dlogits, weight));
            } else {
                rows.resize(count * width, 0.0);
                checked(gemm(&mut rows, dlogits, weight));
                for (&t, row) in chunk.iter().zip(rows.chunks_exact(width)) {
                    dx[t * width..][..width].copy_from_slice(row);
                }
            }
        }
    }
}

/// The products' shapes follow from [`Problem`], whose shapes were checked.
fn checked(computed: bool) {
    debug_assert!(computed, "the shapes of a chunk's products agree");
}

/// Turns logits into `factor (softmax - 1[target])`, or into scratch without a factor, and writes the losses.
fn normalise(
    logits: &mut [f32],
    classes: usize,
    chunk: &[usize],
    targets: &[i64],
    factor: Option<f64>,
    losses: &mut [f64],
) {
    struct Rows<'a> {
        logits: &'a mut [f32],
        classes: usize,
        tokens: &'a [usize],
        targets: &'a [i64],
        factor: Option<f64>,
        losses: &'a mut [f64],
    }
    impl WithSimd for Rows<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let rows = self.logits.chunks_exact_mut(self.classes);
            for ((row, &t), loss) in rows.zip(self.tokens).zip(self.losses) {
                let target = self.targets[t] as usize;
                let max = row_max(simd, row);
                let wanted = row[target];
                let sum = exp_and_sum(simd, row, max);
                *loss = sum.ln() + (f64::from(max) - f64::from(wanted));
                if let Some(factor) = self.factor {
                    let at_target = (f64::from(row[target]) / sum - 1.0) * factor;
                    scale_row(simd, row, (factor / sum) as f32);
                    row[target] = at_target as f32;
                }
            }
        }
    }
    let each = (TASK / classes).max(1);
    let task = |((logits, tokens), losses): ((&mut [f32], &[usize]), &mut [f64])| {
        dispatch(Rows { logits, classes, tokens, targets, factor, losses });
    };
    if chunk.len() <= each {
        task(((logits, chunk), losses));
    } else {
        logits
            .par_chunks_mut(each * classes)
            .zip(chunk.par_chunks(each))
            .zip(losses.par_chunks_mut(each))
            .for_each(task);
    }
}
