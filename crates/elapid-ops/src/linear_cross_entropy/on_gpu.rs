//! Projection and cross entropy of tensors on a GPU.
//!
//! Logits are f32 whatever the type of `x`; their gradient has the type of `x`, for the products that follow.

use std::sync::Arc;

use elapid_tensor::autograd::{Backward, is_recording, record_one};
use elapid_tensor::cuda::{DeviceBuffer, Gpu, Matrix, Product};
use elapid_tensor::{DType, Device, Error, Result, Tensor, bf16};

use super::cuda::{self, Gradient, Scoring};
use super::{IGNORED, Reduction, check_targets};
use crate::elementwise;
use crate::gpu::{by_rows, expect, whole};

const OP: &str = "linear_cross_entropy";

/// Most bytes of logits at a time.
const LOGITS: usize = 1 << 30;
/// What the tokens of a chunk are a multiple of, where there are as many: whole tiles of the products.
const TILE: usize = 256;

/// The targets of a batch in the memory of a GPU. What is launched for them depends on their number alone.
#[derive(Debug)]
pub struct Targets {
    values: DeviceBuffer<i64>,
    scale: DeviceBuffer<f32>,
    classes: usize,
}

impl Targets {
    /// Copies targets to the GPU; their loss is that of `reduction` times `factor`.
    ///
    /// # Errors
    /// If a target is neither -100 nor below `real_vocab`, or there is no memory.
    pub fn upload(
        gpu: &Gpu,
        targets: &[i64],
        real_vocab: usize,
        (reduction, factor): (Reduction, f64),
    ) -> Result<Self> {
        let scale = scale(targets, real_vocab, (reduction, factor))?;
        let (values, scale) = (gpu.upload(targets)?, gpu.upload(&[scale])?);
        Ok(Self { values, scale, classes: real_vocab })
    }

    /// Puts as many other targets in the place of these.
    ///
    /// # Errors
    /// If there are more or fewer, or as [`Targets::upload`].
    pub fn write(&mut self, targets: &[i64], kind: (Reduction, f64)) -> Result<()> {
        if targets.len() != self.values.len() {
            let message = format!("{} targets, expected {}", targets.len(), self.values.len());
            return Err(Error::argument(OP, message));
        }
        let scale = scale(targets, self.classes, kind)?;
        self.values.write(targets)?;
        Ok(self.scale.write(&[scale])?)
    }
}

fn scale(targets: &[i64], real_vocab: usize, (reduction, factor): (Reduction, f64)) -> Result<f32> {
    check_targets(OP, targets, real_vocab)?;
    let scored = targets.iter().filter(|&&target| target != IGNORED).count();
    Ok(match reduction {
        Reduction::Mean => factor / scored.max(1) as f64,
        Reduction::Sum => factor,
    } as f32)
}

/// [`super::linear_cross_entropy`] of prepared targets, x f32 or bf16 `[T, D]`, weight f32 `[V, D]`, all on one GPU.
///
/// # Errors
/// If a shape, type or device is another, or the GPU fails.
pub fn linear_cross_entropy_prepared(
    x: &Tensor,
    weight: &Tensor,
    targets: &Arc<Targets>,
) -> Result<Tensor> {
    let gpu = check(x, weight, targets)?;
    let recording = is_recording(&[x, weight]);
    let found = run(&gpu, x, weight, targets, recording)?;
    let loss = cuda::total(&gpu, &found.losses, targets.scale.slice())?;
    let loss = Tensor::from_device(loss, [])?;
    Ok(record_one(OP, &[x, weight], loss, || {
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let finish = |gradient: Option<Tensor>, wanted: bool| {
                gradient.filter(|_| wanted).map(|gradient| scaled(gradient, &grad)).transpose()
            };
            Ok(vec![finish(found.dx, context.needs(0))?, finish(found.dweight, context.needs(1))?])
        }
    }))
}

/// `gradient grad`, a tensor of one element, which may be on the host.
fn scaled(gradient: Tensor, grad: &Tensor) -> Result<Tensor> {
    if grad.device() != Device::Cpu {
        return elementwise::mul(&gradient, &grad.cast(gradient.dtype())?);
    }
    match grad.item::<f32>()? {
        1.0 => Ok(gradient),
        factor => elementwise::scale(&gradient, factor.into()),
    }
}

/// The loss of every token, f32 `[T]`.
pub(super) fn per_token(x: &Tensor, weight: &Tensor, targets: &Targets) -> Result<Tensor> {
    let gpu = check(x, weight, targets)?;
    let found = run(&gpu, x, weight, targets, false)?;
    Tensor::from_device(found.losses, [x.dim(0)])
}

fn check(x: &Tensor, weight: &Tensor, targets: &Targets) -> Result<Gpu> {
    let Some(gpu) = x.gpu() else {
        return Err(Error::argument(OP, "x is on cpu, expected the GPU of the targets"));
    };
    x.expect_rank(OP, "x", 2, "[T, D]")?;
    if !matches!(x.dtype(), DType::F32 | DType::BF16) {
        return Err(x.unsupported(OP));
    }
    weight.expect_rank(OP, "weight", 2, "[V, D]")?;
    expect(OP, "weight", weight, gpu, DType::F32)?;
    weight.expect_shape(OP, "weight", &[weight.dim(0), x.dim(1)])?;
    x.expect_shape(OP, "x", &[targets.values.len(), x.dim(1)])?;
    Ok(gpu.clone())
}

struct Found {
    losses: DeviceBuffer<f32>,
    dx: Option<Tensor>,
    dweight: Option<Tensor>,
}

/// Losses, and gradients by x and weight if asked for, chunk by chunk of tokens.
fn run(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    targets: &Targets,
    gradients: bool,
) -> Result<Found> {
    let (tokens, width, vocab) = (x.dim(0), x.dim(1), weight.dim(0));
    let dtype = x.dtype();
    let x = by_rows(x)?;
    let w = whole(weight)?.cast(dtype)?;
    let most = (LOGITS / (4 * vocab.max(1))).max(64);
    let chunk = if most >= tokens { tokens.max(1) } else { most - most % TILE.min(most) };
    let mut logits = gpu.scratch::<f32>(chunk * vocab)?;
    let apart = gradients && dtype == DType::BF16;
    let mut narrow = gpu.scratch::<bf16>(if apart { chunk * vocab } else { 0 })?;
    let mut losses = gpu.scratch::<f32>(tokens)?;
    let mut dx = None;
    let mut dweight = None;
    if gradients {
        dx = Some(Tensor::zeros_on(x.device(), dtype, [tokens, width])?);
        dweight = Some(Tensor::zeros_on(x.device(), DType::F32, [vocab, width])?);
    }
    let w_matrix = Matrix::contiguous(w.device_address()?, dtype, vocab, width);
    let mut start = 0;
    while start < tokens {
        let rows = chunk.min(tokens - start);
        let x_rows = x.narrow(0, start, rows)?;
        let x_matrix = Matrix {
            stride: x.strides()[0],
            ..Matrix::contiguous(x_rows.device_address()?, dtype, rows, width)
        };
        let out = Matrix::contiguous(logits.address(), DType::F32, rows, vocab);
        let tf32 = gpu.tf32_allowed();
        let product = |a, b, c| Product { tf32, ..Product::new(a, b, c) };
        // SAFETY: the views were checked to be [rows, D] and [V, D], the logits have room for [chunk, V].
        unsafe { gpu.multiply(&product(x_matrix, w_matrix.transpose(), out))? };
        let scoring = Scoring {
            targets: targets.values.slice().range(start, rows),
            vocab,
            real_vocab: targets.classes,
            scale: Some(targets.scale.slice()),
        };
        match (gradients, apart) {
            (false, _) => {
                let nowhere = Gradient::<f32>::None;
                cuda::score(gpu, &mut logits, &scoring, nowhere, &mut losses, start)?;
            }
            (true, false) => {
                let here = Gradient::<f32>::InPlace;
                cuda::score(gpu, &mut logits, &scoring, here, &mut losses, start)?;
            }
            (true, true) => {
                let there = Gradient::Apart(&mut narrow);
                cuda::score(gpu, &mut logits, &scoring, there, &mut losses, start)?;
            }
        }
        if let (Some(dx), Some(dweight)) = (&dx, &dweight) {
            let address = if apart { narrow.address() } else { logits.address() };
            let grad = Matrix::contiguous(address, dtype, rows, vocab);
            let own = dx.narrow(0, start, rows)?;
            let dx_rows = Matrix::contiguous(own.device_address()?, dtype, rows, width);
            let sum = Matrix::contiguous(dweight.device_address()?, DType::F32, vocab, width);
            let add = Product { beta: 1.0, ..product(grad.transpose(), x_matrix, sum) };
            // SAFETY: as above; both results were made here.
            unsafe {
                gpu.multiply(&product(grad, w_matrix, dx_rows))?;
                gpu.multiply(&add)?;
            }
        }
        start += rows;
    }
    Ok(Found { losses, dx, dweight })
}
