//! Products of tensors on a GPU.

use elapid_tensor::autograd::{Backward, Place, accumulate};
use elapid_tensor::cuda::{DeviceBuffer, Gpu, Matrix, Product, invariant_rows};
use elapid_tensor::{DType, Error, Result, Shape, Tensor, bf16};

use crate::gpu::place_of;

/// Where a product goes.
pub(super) enum To {
    /// A new tensor of this type.
    New(DType),
    /// This one, which it is added to.
    Sum(Tensor),
    /// The place of a gradient of this type.
    Place(Place, DType),
}

impl To {
    fn dtype(&self) -> DType {
        match self {
            To::New(dtype) | To::Place(_, dtype) => *dtype,
            To::Sum(sum) => sum.dtype(),
        }
    }
}

/// `a b`, the gradient of an input of an operation: brought to its place, or added to what others gave, if it can be.
pub(super) fn gradient(
    gpu: &Gpu,
    context: &mut Backward,
    input: usize,
    (a, b): (&Tensor, &Tensor),
    dtype: DType,
) -> Result<Tensor> {
    let to = match context.take_sum(input) {
        Some(sum) if sum.dtype() == dtype => To::Sum(sum),
        Some(sum) => {
            let mut own = product(gpu, context.op(), a, b, None, To::New(dtype))?;
            accumulate(&mut own, &sum)?;
            return Ok(own);
        }
        None => match context.place(input, dtype)? {
            Some(place) => To::Place(place, dtype),
            None => To::New(dtype),
        },
    };
    product(gpu, context.op(), a, b, None, to)
}

/// `a b + bias` of 2-D tensors, or 3-D ones without a bias, of any strides. Computes in bf16 if either is bf16.
pub(super) fn product(
    gpu: &Gpu,
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    to: To,
) -> Result<Tensor> {
    let out = to.dtype();
    let rank = if a.rank() == 3 { 3 } else { 2 };
    a.expect_rank(op, "a", rank, "[M, K] or [Z, M, K]")?;
    b.expect_rank(op, "b", rank, if rank == 3 { "[Z, K, N]" } else { "[K, N]" })?;
    for (name, tensor) in [("a", Some(a)), ("b", Some(b)), ("bias", bias)] {
        let Some(tensor) = tensor else { continue };
        tensor.expect_device(op, name, a.device())?;
        if !matches!(tensor.dtype(), DType::F32 | DType::BF16) {
            return Err(tensor.unsupported(op));
        }
    }
    let (batch, first) = if rank == 3 { (a.dim(0), 1) } else { (1, 0) };
    let (m, k, n) = (a.dim(first), a.dim(first + 1), b.dim(first + 1));
    if b.dim(first) != k || (rank == 3 && b.dim(0) != batch) {
        let expected = if rank == 3 { format!("[{batch}, {k}, N]") } else { format!("[{k}, N]") };
        return Err(b.shape_error(op, "b", expected));
    }
    let narrow = [a, b].iter().any(|tensor| tensor.dtype() == DType::BF16);
    let compute = if narrow { DType::BF16 } else { DType::F32 };
    let (a, b) = (operand(a, first, compute)?, operand(b, first, compute)?);
    let bias = bias.map(|bias| bias.detach().cast(out)).transpose()?;
    let shape = if rank == 3 { Shape::new(&[batch, m, n]) } else { Shape::new(&[m, n]) };
    let (c, beta, result) = match to {
        To::New(_) => {
            let result = empty(gpu, out, shape)?;
            (Matrix::contiguous(result.device_address()?, out, m, n), 0.0, result)
        }
        To::Sum(mut sum) => {
            sum.expect_shape(op, "sum of gradients", &shape)?;
            (Matrix::contiguous(sum.device_address_mut()?, out, m, n), 1.0, sum)
        }
        To::Place(place, _) => {
            let (address, stride) = place_of(op, &place, m, n)?;
            let c = Matrix { stride, ..Matrix::contiguous(address, out, m, n) };
            (c, 0.0, place.filled())
        }
    };
    let product = Product {
        batch,
        tf32: gpu.tf32_allowed(),
        invariant: invariant_rows(),
        bias: bias.as_ref().map_or(Ok(0), Tensor::device_address)?,
        bias_dtype: out,
        beta,
        ..Product::new(matrix(&a, first)?, matrix(&b, first)?, Matrix { batch_stride: m * n, ..c })
    };
    // SAFETY: the operands are views of live tensors with the extents checked above; the result is new, a sum that
    // nobody shares, or a place that nobody else uses.
    unsafe { gpu.multiply(&product)? };
    Ok(result)
}

/// The tensor in the type of the product, copied if neither rows nor columns are runs of neighbours.
fn operand(tensor: &Tensor, first: usize, dtype: DType) -> Result<Tensor> {
    let tensor = tensor.detach();
    let (rows, cols) = (tensor.strides()[first], tensor.strides()[first + 1]);
    let (height, width) = (tensor.dim(first), tensor.dim(first + 1));
    let by_rows = cols == 1 && rows >= width;
    let by_columns = rows == 1 && cols >= height;
    if tensor.dtype() != dtype && tensor.rank() == 2 && by_columns && !by_rows {
        // The transpose keeps its layout, so that the copy runs along memory.
        return tensor.transpose(0, 1)?.cast(dtype)?.transpose(0, 1);
    }
    let tensor = tensor.cast(dtype)?;
    if tensor.is_contiguous() || by_rows || by_columns { Ok(tensor) } else { tensor.contiguous() }
}

fn matrix(tensor: &Tensor, first: usize) -> Result<Matrix> {
    let (rows, cols) = (tensor.dim(first), tensor.dim(first + 1));
    let (row_stride, col_stride) = (tensor.strides()[first], tensor.strides()[first + 1]);
    let by_rows = (col_stride == 1 || cols <= 1) && (row_stride >= cols || rows <= 1);
    Ok(Matrix {
        address: tensor.device_address()?,
        dtype: tensor.dtype(),
        rows,
        cols,
        stride: if by_rows { row_stride.max(cols) } else { col_stride.max(rows) },
        transposed: !by_rows,
        batch_stride: if first == 1 { tensor.strides()[0] } else { 0 },
    })
}

fn empty(gpu: &Gpu, dtype: DType, shape: Shape) -> Result<Tensor> {
    let len = shape.elements();
    match dtype {
        DType::F32 => Tensor::from_device::<f32>(gpu.scratch(len)?, shape),
        DType::BF16 => {
            let buffer: DeviceBuffer<bf16> = gpu.scratch(len)?;
            Tensor::from_device(buffer, shape)
        }
        other => Err(Error::argument("matmul", format!("{other} has no products on a GPU"))),
    }
}
