//! Sums, means and maxima along one axis or over everything, of f32 or f64 on the host, of f32 or bf16 on a GPU.
//!
//! The order of additions depends only on the reduced extent (on a GPU also on the extents behind it and on the type,
//! but not on the card), never on threads or on how many rows there are, so a row reduced alone has the bits that it
//! has in a batch.

mod cpu;
mod cuda;
mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use elapid_tensor::autograd::{Backward, record_one};
use elapid_tensor::cuda::DeviceBuffer;
use elapid_tensor::{Buffer, DType, Error, MAX_RANK, Result, Shape, Tensor};

use crate::elementwise::{broadcast_to, scale};

/// A tensor read as `[outer, count, inner]`, where `count` is reduced.
struct Reduction {
    extents: [usize; 3],
    /// The input's shape with 1 in place of what is reduced.
    kept: Shape,
    /// The result's shape.
    out: Shape,
}

impl Reduction {
    /// Along one axis, which the result no longer has, or over all.
    fn new(op: &'static str, x: &Tensor, axis: Option<usize>) -> Result<Self> {
        let shape = x.shape();
        let mut kept = [1; MAX_RANK];
        let Some(axis) = axis else {
            let kept = Shape::new(&kept[..shape.len()]);
            return Ok(Self { extents: [1, x.elements(), 1], kept, out: Shape::new(&[]) });
        };
        if axis >= shape.len() {
            return Err(x.shape_error(op, "x", format!("an axis {axis}")));
        }
        kept[..shape.len()].copy_from_slice(&shape);
        kept[axis] = 1;
        let mut out = [0; MAX_RANK];
        out[..axis].copy_from_slice(&shape[..axis]);
        out[axis..shape.len() - 1].copy_from_slice(&shape[axis + 1..]);
        Ok(Self {
            extents: [
                shape[..axis].iter().product(),
                shape[axis],
                shape[axis + 1..].iter().product(),
            ],
            kept: Shape::new(&kept[..shape.len()]),
            out: Shape::new(&out[..shape.len() - 1]),
        })
    }
}

/// `factor Σ x` over the middle extent, without a gradient; of type `dtype`, which on the host is that of `x`.
fn sum_values(
    op: &'static str,
    x: &Tensor,
    extents: [usize; 3],
    factor: f64,
    dtype: DType,
    out: Shape,
) -> Result<Tensor> {
    let x = x.detach().contiguous()?;
    if let Some(gpu) = x.gpu() {
        return cuda::sum(gpu, op, &x, extents, factor, dtype, out);
    }
    match x.dtype() {
        DType::F32 => Tensor::from_buffer(cpu::sum(x.data()?, extents, factor), out),
        DType::F64 => {
            let sums: Vec<f64> =
                reference::sum(x.data()?, extents).iter().map(|sum| sum * factor).collect();
            Tensor::from_slice(&sums, out)
        }
        _ => Err(x.unsupported(op)),
    }
}

fn record_sum(op: &'static str, x: &Tensor, reduction: Reduction, factor: f64) -> Result<Tensor> {
    let out = sum_values(op, x, reduction.extents, factor, x.dtype(), reduction.out)?;
    let (shape, kept) = (x.shape(), reduction.kept);
    Ok(record_one(op, &[x], out, || {
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None]) };
            let grad = if factor == 1.0 { grad } else { scale(&grad, factor)? };
            Ok(vec![Some(broadcast_to(&grad.reshape(kept)?, shape)?)])
        }
    }))
}

/// The sum along an axis, which the result no longer has; without an axis, of all elements, as a scalar.
///
/// # Errors
/// If the axis does not exist or the device lacks the type.
pub fn sum(x: &Tensor, axis: Option<usize>) -> Result<Tensor> {
    record_sum("sum", x, Reduction::new("sum", x, axis)?, 1.0)
}

/// The mean along an axis, which the result no longer has; without an axis, of all elements, as a scalar.
///
/// # Errors
/// As [`sum`], or if there is nothing to average.
pub fn mean(x: &Tensor, axis: Option<usize>) -> Result<Tensor> {
    let reduction = Reduction::new("mean", x, axis)?;
    let count = reduction.extents[1];
    if count == 0 {
        return Err(x.shape_error("mean", "x", "at least one element to average"));
    }
    record_sum("mean", x, reduction, 1.0 / count as f64)
}

/// The largest value along an axis, which the result no longer has; without an axis, of all elements. NaN
/// counts as the largest. The gradient goes to the first of equal values.
///
/// # Errors
/// If the axis does not exist, there is nothing to choose from, or the device lacks the type.
pub fn max(x: &Tensor, axis: Option<usize>) -> Result<Tensor> {
    let Reduction { extents, out, .. } = Reduction::new("max", x, axis)?;
    let [_, count, inner] = extents;
    if count == 0 {
        return Err(x.shape_error("max", "x", "at least one element to choose from"));
    }
    let values = x.detach().contiguous()?;
    let (out, places) = match (x.gpu(), x.dtype()) {
        (Some(gpu), _) => {
            let (values, places) = cuda::max(gpu, "max", &values, extents, out)?;
            (values, Places::Gpu(places))
        }
        (None, DType::F32) => {
            let (values, places) = cpu::max(values.data()?, extents);
            (Tensor::from_buffer(values, out)?, Places::Host(places))
        }
        (None, DType::F64) => {
            let (values, places) = reference::max(values.data()?, extents);
            (Tensor::from_slice(&values, out)?, Places::Host(places))
        }
        _ => return Err(x.unsupported("max")),
    };
    let shape = x.shape();
    Ok(record_one("max", &[x], out, || {
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None]) };
            let grad = grad.contiguous()?;
            let places = match &places {
                Places::Gpu(places) => {
                    let dx = cuda::max_backward(places, "max", &grad, extents, shape)?;
                    return Ok(vec![Some(dx)]);
                }
                Places::Host(places) => places,
            };
            let target = |at: usize| ((at / inner) * count + places[at]) * inner + at % inner;
            Ok(vec![Some(match grad.dtype() {
                DType::F64 => place(grad.data::<f64>()?, target, shape)?,
                _ => place(grad.data::<f32>()?, target, shape)?,
            })])
        }
    }))
}

/// Where along the reduced axis the largest values stand.
enum Places {
    Host(Vec<usize>),
    Gpu(DeviceBuffer<i64>),
}

/// Zeros but for `values[i]` at `target(i)`.
fn place<T: elapid_tensor::Element>(
    values: &[T],
    target: impl Fn(usize) -> usize,
    shape: Shape,
) -> Result<Tensor> {
    let mut out = Buffer::<T>::zeros(shape.elements());
    for (at, value) in values.iter().enumerate() {
        out[target(at)] = *value;
    }
    Tensor::from_buffer(out, shape)
}

/// The gradient of a broadcast: `x` summed over the axes along which `shape` was repeated, in the order of
/// the axes. Records nothing. No copy if nothing was repeated.
pub(crate) fn sum_to_shape(x: &Tensor, shape: Shape) -> Result<Tensor> {
    const OP: &str = "sum_to_shape";
    if x.shape() == shape {
        return Ok(x.detach());
    }
    if crate::elementwise::broadcast_shape(&x.shape(), &shape) != Some(x.shape()) {
        return Err(Error::argument(OP, format!("{shape} does not repeat to {}", x.shape())));
    }
    let missing = x.rank() - shape.len();
    let mut dims = [1; MAX_RANK];
    dims[..x.rank()].copy_from_slice(&x.shape());
    let mut sum = x.detach();
    let repeated = |axis: usize| axis < missing || shape[axis - missing] != x.shape()[axis];
    let mut axis = 0;
    while axis < x.rank() {
        let mut end = axis;
        while end < x.rank() && repeated(end) {
            end += 1;
        }
        if end > axis {
            let extents = [
                dims[..axis].iter().product(),
                dims[axis..end].iter().product(),
                dims[end..x.rank()].iter().product(),
            ];
            dims[axis..end].fill(1);
            // Only the last sum is rounded to a narrow type.
            let last = !(end..x.rank()).any(repeated);
            let dtype = if last || x.gpu().is_none() { x.dtype() } else { DType::F32 };
            sum = sum_values(OP, &sum, extents, 1.0, dtype, Shape::new(&dims[..x.rank()]))?;
        }
        axis = end + 1;
    }
    sum.reshape(shape)
}
