//! Projection onto the vocabulary and cross entropy in one operation.
//!
//! `logits = x Wᵀ` of all tokens would be the largest tensor of a language model by far; here they exist for a
//! chunk of tokens at a time only. In training the gradients are made along with the loss, chunk by chunk, and
//! backward merely scales them by the gradient that arrives.

mod cpu;
pub mod cuda;
mod on_gpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use std::sync::Arc;

use elapid_tensor::autograd::{Backward, is_recording, record_one};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{Buffer, DType, Error, Result, Tensor};
use pulp::Simd;
use rayon::prelude::*;

use crate::simd::{Lanewise, map_in_place};
use cpu::Problem;
pub use on_gpu::{Targets, linear_cross_entropy_prepared};

/// The target of a token that is not scored.
pub const IGNORED: i64 = -100;

/// How the tokens' losses become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Mean over the scored tokens; 0 if there is none.
    #[default]
    Mean,
    /// Sum over the scored tokens.
    Sum,
}

/// Operands after their checks.
struct Operands {
    x: Tensor,
    weight: Tensor,
    targets: Vec<i64>,
    scored: Vec<usize>,
    classes: usize,
}

impl Operands {
    fn new(
        op: &'static str,
        x: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
        real_vocab: usize,
    ) -> Result<Self> {
        x.expect_rank(op, "x", 2, "[T, D]")?;
        x.expect_dtype(op, "x", DType::F32)?;
        weight.expect_rank(op, "weight", 2, "[V, D]")?;
        weight.expect_dtype(op, "weight", DType::F32)?;
        if x.dim(1) == 0 {
            return Err(x.shape_error(op, "x", "[T, D] with D of at least 1"));
        }
        weight.expect_shape(op, "weight", &[weight.dim(0), x.dim(1)])?;
        targets.expect_shape(op, "targets", &[x.dim(0)])?;
        targets.expect_dtype(op, "targets", DType::I64)?;
        check_vocabulary(op, weight, real_vocab)?;
        let targets = targets.to_vec::<i64>()?;
        check_targets(op, &targets, real_vocab)?;
        let scored = (0..targets.len()).filter(|&t| targets[t] != IGNORED).collect();
        let rows_of = |tensor: &Tensor| {
            let tensor = tensor.detach();
            if tensor.strides()[1] == 1 { Ok(tensor) } else { tensor.contiguous() }
        };
        Ok(Self { x: rows_of(x)?, weight: rows_of(weight)?, targets, scored, classes: real_vocab })
    }

    fn problem(&self) -> Result<Problem<'_>> {
        Ok(Problem {
            x: self.x.row_view()?,
            weight: self.weight.row_view()?,
            targets: &self.targets,
            scored: &self.scored,
            classes: self.classes,
        })
    }
}

fn check_targets(op: &'static str, targets: &[i64], real_vocab: usize) -> Result<()> {
    let classes = 0..real_vocab as i64;
    match targets.iter().position(|target| !classes.contains(target) && *target != IGNORED) {
        None => Ok(()),
        Some(t) => Err(Error::argument(
            op,
            format!(
                "the target of token {t} is {}, expected 0 to {} or {IGNORED} (ignored)",
                targets[t],
                real_vocab.saturating_sub(1)
            ),
        )),
    }
}

/// Cross entropy (nats) of `softmax(x Wᵀ)` against `targets`, as a scalar: x f32 (on a GPU also bf16) `[T, D]`, weight
/// f32 `[V, D]`, targets i64 `[T]` on the host. Tokens with target [`IGNORED`] count for nothing; classes from `real_vocab` on (padding of
/// the vocabulary) take no part, neither in the softmax nor in the gradients.
///
/// # Errors
/// If a shape or type is another, `real_vocab` is 0 or above V, or a target is neither [`IGNORED`] nor below
/// `real_vocab` (the error names the token).
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    real_vocab: usize,
    reduction: Reduction,
) -> Result<Tensor> {
    const OP: &str = "linear_cross_entropy";
    if let Some(gpu) = x.gpu() {
        let targets = prepared(OP, gpu, weight, targets, real_vocab, reduction)?;
        return linear_cross_entropy_prepared(x, weight, &Arc::new(targets));
    }
    let operands = Operands::new(OP, x, weight, targets, real_vocab)?;
    let factor = match reduction {
        Reduction::Mean => 1.0 / operands.scored.len().max(1) as f64,
        Reduction::Sum => 1.0,
    };
    let mut total = 0f64;
    let add = |_, loss| total += loss;
    if !is_recording(&[x, weight]) {
        cpu::losses(&operands.problem()?, add);
        return Ok(Tensor::scalar((total * factor) as f32));
    }
    let wants = [x.tracks_grad(), weight.tracks_grad()];
    let gradients = cpu::losses_and_gradients(&operands.problem()?, factor, wants, add);
    let loss = Tensor::scalar((total * factor) as f32);
    let (x_shape, weight_shape) = (x.shape(), weight.shape());
    Ok(record_one(OP, &[x, weight], loss, || {
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let grad = grad.item::<f32>()?;
            let finish = |gradient: Option<Buffer<f32>>, shape, wanted: bool| {
                let gradient = gradient.filter(|_| wanted);
                gradient
                    .map(|gradient| Tensor::from_buffer(scaled(gradient, grad), shape))
                    .transpose()
            };
            Ok(vec![
                finish(gradients.dx, x_shape, context.needs(0))?,
                finish(gradients.dweight, weight_shape, context.needs(1))?,
            ])
        }
    }))
}

/// The loss of every token in nats, f32 `[T]`, 0 where the target is [`IGNORED`]: for evaluation, without a
/// gradient. Operands as of [`linear_cross_entropy`].
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn linear_cross_entropy_per_token(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    real_vocab: usize,
) -> Result<Tensor> {
    const OP: &str = "linear_cross_entropy_per_token";
    if let Some(gpu) = x.gpu() {
        let targets = prepared(OP, gpu, weight, targets, real_vocab, Reduction::Sum)?;
        return on_gpu::per_token(x, weight, &targets);
    }
    let operands = Operands::new(OP, x, weight, targets, real_vocab)?;
    let mut losses = Buffer::<f32>::zeros(x.dim(0));
    cpu::losses(&operands.problem()?, |t, loss| losses[t] = loss as f32);
    Tensor::from_buffer(losses, [x.dim(0)])
}

/// Targets of the host for a GPU.
fn prepared(
    op: &'static str,
    gpu: &Gpu,
    weight: &Tensor,
    targets: &Tensor,
    real_vocab: usize,
    reduction: Reduction,
) -> Result<Targets> {
    targets.expect_rank(op, "targets", 1, "[T]")?;
    targets.expect_dtype(op, "targets", DType::I64)?;
    check_vocabulary(op, weight, real_vocab)?;
    Targets::upload(gpu, &targets.to_vec::<i64>()?, real_vocab, (reduction, 1.0))
}

fn check_vocabulary(op: &'static str, weight: &Tensor, real_vocab: usize) -> Result<()> {
    if real_vocab == 0 || real_vocab > weight.dim(0) {
        return Err(Error::argument(
            op,
            format!("real_vocab is {real_vocab}, expected 1 to V = {}", weight.dim(0)),
        ));
    }
    Ok(())
}

/// `factor values`, in place.
fn scaled(mut values: Buffer<f32>, factor: f32) -> Buffer<f32> {
    #[derive(Clone, Copy)]
    struct Scale(f32);
    impl Lanewise for Scale {
        #[inline(always)]
        fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
            simd.mul_f32s(x, simd.splat_f32s(self.0))
        }
    }
    const BLOCK: usize = 32 << 10;
    if factor != 1.0 {
        values.par_chunks_mut(BLOCK).for_each(|block| map_in_place(Scale(factor), block));
    }
    values
}
