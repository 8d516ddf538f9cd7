//! Views and copies: reshape, transpose, narrow, split, concatenate, cast. Views are free and strided;
//! each records its gradient.

use std::sync::Arc;

use crate::autograd::{Joined, record, record_joined};
use crate::{Buffer, DType, Device, Element, Error, MAX_RANK, Result, Shape, Tensor};

/// Runs an expression with `$T` bound to the Rust type of a `DType`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::I64 => {
                type $T = i64;
                $body
            }
            $crate::DType::I32 => {
                type $T = i32;
                $body
            }
            $crate::DType::U32 => {
                type $T = u32;
                $body
            }
            $crate::DType::U8 => {
                type $T = u8;
                $body
            }
        }
    };
}
pub(crate) use with_element;

impl Tensor {
    fn view(&self, shape: Shape, strides: Shape, offset: usize) -> Tensor {
        Tensor { shape, strides, offset, meta: None, ..self.clone() }
    }

    fn record_view(
        &self,
        op: &'static str,
        view: Tensor,
        backward: impl FnOnce(Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Tensor {
        let mut outputs = record(op, &[self], vec![view], || {
            move |context: &mut crate::autograd::Backward| {
                Ok(vec![context.take_grad(0).map(backward).transpose()?])
            }
        });
        outputs.swap_remove(0)
    }

    /// A fresh contiguous copy, without gradient.
    pub(crate) fn copied(&self) -> Result<Tensor> {
        fn copy<T: Element>(tensor: &Tensor) -> Result<Tensor> {
            let mut buffer = Buffer::<T>::scratch(tensor.elements());
            let mut filled = 0;
            tensor.for_each_run(|run: &[T]| {
                buffer[filled..filled + run.len()].copy_from_slice(run);
                filled += run.len();
            })?;
            Tensor::from_buffer(buffer, tensor.shape)
        }
        match self.gpu() {
            Some(_) => self.copied_on_gpu(self.dtype),
            None => with_element!(self.dtype, T => copy::<T>(self)),
        }
    }

    /// The same values without gaps; free if there are none.
    ///
    /// # Errors
    /// If the tensor is on a GPU that fails.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        Ok(self.record_view("contiguous", self.copied()?, Ok))
    }

    /// The same elements in order under another shape. A view with gaps is copied first.
    ///
    /// # Errors
    /// If the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.elements() != self.elements() {
            return Err(self.shape_error(
                "reshape",
                "tensor",
                format!("{} elements for {shape}", shape.elements()),
            ));
        }
        let source = self.contiguous()?;
        let view = source.view(shape, shape.contiguous_strides(), source.offset);
        let from = source.shape;
        Ok(source.record_view("reshape", view, move |grad| grad.reshape(from)))
    }

    /// A new axis of one element before axis `axis`: a view.
    ///
    /// # Errors
    /// If the tensor has fewer axes, or as many as can be.
    pub fn unsqueeze(&self, axis: usize) -> Result<Tensor> {
        let rank = self.rank();
        if axis > rank || rank == MAX_RANK {
            return Err(self.shape_error("unsqueeze", "tensor", format!("{axis} to 5 axes")));
        }
        let mut shape = [1; MAX_RANK];
        let mut strides = [1; MAX_RANK];
        for from in 0..rank {
            let to = from + usize::from(from >= axis);
            shape[to] = self.shape[from];
            strides[to] = self.strides[from];
        }
        let view =
            self.view(Shape::new(&shape[..=rank]), Shape::new(&strides[..=rank]), self.offset);
        let from = self.shape;
        Ok(self.record_view("unsqueeze", view, move |grad| grad.reshape(from)))
    }

    /// Two axes exchanged: a view.
    ///
    /// # Errors
    /// If an axis does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Tensor> {
        if a.max(b) >= self.rank() {
            return Err(self.shape_error(
                "transpose",
                "tensor",
                format!("at least {} axes", a.max(b) + 1),
            ));
        }
        let mut shape = [0; MAX_RANK];
        let mut strides = [0; MAX_RANK];
        shape[..self.rank()].copy_from_slice(&self.shape);
        strides[..self.rank()].copy_from_slice(&self.strides);
        shape.swap(a, b);
        strides.swap(a, b);
        let view = self.view(
            Shape::new(&shape[..self.rank()]),
            Shape::new(&strides[..self.rank()]),
            self.offset,
        );
        Ok(self.record_view("transpose", view, move |grad| grad.transpose(a, b)))
    }

    pub(crate) fn narrowed(&self, axis: usize, start: usize, len: usize) -> Result<Tensor> {
        if axis >= self.rank() || start.checked_add(len).is_none_or(|end| end > self.shape[axis]) {
            return Err(self.shape_error(
                "narrow",
                "tensor",
                format!("axis {axis} of at least {start} + {len}"),
            ));
        }
        let mut shape = [0; MAX_RANK];
        shape[..self.rank()].copy_from_slice(&self.shape);
        shape[axis] = len;
        let offset = self.offset + start * self.strides[axis];
        Ok(self.view(Shape::new(&shape[..self.rank()]), self.strides, offset))
    }

    /// Elements `start..start + len` of an axis: a view.
    ///
    /// # Errors
    /// If the axis is shorter or does not exist.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Tensor> {
        let view = self.narrowed(axis, start, len)?;
        let shape = self.shape;
        Ok(self.record_view("narrow", view, move |grad| {
            let mut parts = Vec::with_capacity(3);
            for width in [start, shape[axis] - start - len] {
                let mut dims = [0; MAX_RANK];
                dims[..shape.len()].copy_from_slice(&shape);
                dims[axis] = width;
                let dims = Shape::new(&dims[..shape.len()]);
                parts.push(Tensor::zeros_on(grad.device(), grad.dtype, dims)?);
            }
            parts.insert(1, grad);
            Tensor::concat(&parts.iter().collect::<Vec<_>>(), axis)
        }))
    }

    /// Consecutive parts of an axis, `lengths` long each: views. Their gradients join in one copy, or on a GPU
    /// are written where they belong ([`Backward::place`](crate::autograd::Backward::place)).
    ///
    /// # Errors
    /// If the lengths do not add up to the axis.
    pub fn split(&self, axis: usize, lengths: &[usize]) -> Result<Vec<Tensor>> {
        if axis >= self.rank() || lengths.iter().sum::<usize>() != self.shape[axis] {
            return Err(self.shape_error(
                "split",
                "tensor",
                format!("axis {axis} = sum of {lengths:?}"),
            ));
        }
        let mut start = 0;
        let mut parts = Vec::with_capacity(lengths.len());
        for &len in lengths {
            parts.push(self.narrowed(axis, start, len)?);
            start += len;
        }
        let shapes: Vec<Shape> = parts.iter().map(|part| part.shape).collect();
        let (device, mut dtype) = (self.device(), self.gradient_dtype());
        let joined = Joined::new(self, self.dtype, axis, lengths).map(Arc::new);
        Ok(record_joined("split", &[self], parts, joined.clone(), || {
            move |context: &mut crate::autograd::Backward| {
                let given: Vec<Option<Tensor>> =
                    (0..shapes.len()).map(|i| context.take_grad(i)).collect();
                if let Some(joined) = joined
                    && let Some(whole) = joined.take(&given)?
                {
                    return Ok(vec![Some(whole)]);
                }
                dtype = given.iter().flatten().next().map_or(dtype, |grad| grad.dtype);
                let grads = given
                    .into_iter()
                    .zip(&shapes)
                    .map(|(grad, &shape)| match grad {
                        Some(grad) => Ok(grad),
                        None => Tensor::zeros_on(device, dtype, shape),
                    })
                    .collect::<Result<Vec<Tensor>>>()?;
                Ok(vec![Some(Tensor::concat(&grads.iter().collect::<Vec<_>>(), axis)?)])
            }
        }))
    }

    /// Tensors joined along an axis, in a fresh contiguous tensor.
    ///
    /// # Errors
    /// If there is none, or they differ in type or in another axis.
    pub fn concat(tensors: &[&Tensor], axis: usize) -> Result<Tensor> {
        let Some(&first) = tensors.first() else {
            return Err(Error::argument("concat", "no tensors"));
        };
        if axis >= first.rank() {
            return Err(first.shape_error("concat", "tensor 0", format!("an axis {axis}")));
        }
        let mut dims = [0; MAX_RANK];
        dims[..first.rank()].copy_from_slice(&first.shape);
        dims[axis] = 0;
        for (i, tensor) in tensors.iter().enumerate() {
            tensor.expect_dtype("concat", &format!("tensor {i}"), first.dtype)?;
            tensor.expect_device("concat", &format!("tensor {i}"), first.device())?;
            let same = tensor.rank() == first.rank()
                && (0..first.rank()).all(|a| a == axis || tensor.shape[a] == first.shape[a]);
            if !same {
                return Err(tensor.shape_error(
                    "concat",
                    &format!("tensor {i}"),
                    format!("{} but for axis {axis}", first.shape),
                ));
            }
            dims[axis] += tensor.shape[axis];
        }
        let shape = Shape::new(&dims[..first.rank()]);
        let joined = match first.gpu() {
            Some(gpu) => Tensor::concat_on_gpu(gpu, tensors, axis, shape)?,
            None => with_element!(first.dtype, T => concat_data::<T>(tensors, axis, shape))?,
        };
        let lengths: Vec<usize> = tensors.iter().map(|t| t.shape[axis]).collect();
        let mut outputs = record("concat", tensors, vec![joined], || {
            move |context: &mut crate::autograd::Backward| match context.take_grad(0) {
                Some(grad) => Ok(grad.split(axis, &lengths)?.into_iter().map(Some).collect()),
                None => Ok(vec![None; lengths.len()]),
            }
        });
        Ok(outputs.swap_remove(0))
    }

    /// The values rounded to another element type (through f64, so f32 to bf16 rounds once, to nearest even). On a
    /// GPU, f32 and bf16 become each other.
    ///
    /// # Errors
    /// If the tensor is on a GPU and a type is another, or the GPU fails.
    pub fn cast(&self, dtype: DType) -> Result<Tensor> {
        fn convert<A: Element, B: Element>(tensor: &Tensor) -> Result<Tensor> {
            let mut buffer = Buffer::<B>::scratch(tensor.elements());
            let mut filled = 0;
            tensor.for_each_run(|run: &[A]| {
                for (to, from) in buffer[filled..].iter_mut().zip(run) {
                    *to = B::from_f64(from.to_f64());
                }
                filled += run.len();
            })?;
            Tensor::from_buffer(buffer, tensor.shape)
        }
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        let cast = match self.gpu() {
            Some(_) => self.copied_on_gpu(dtype)?,
            None => {
                with_element!(self.dtype, A => with_element!(dtype, B => convert::<A, B>(self)))?
            }
        };
        if !dtype.is_float() {
            return Ok(cast);
        }
        let grad_dtype = self.gradient_dtype();
        Ok(self.record_view("cast", cast, move |grad| grad.cast(grad_dtype)))
    }

    /// The type of this tensor's gradient: on the host f32 for the narrow types, on a GPU the tensor's own.
    pub(crate) fn gradient_dtype(&self) -> DType {
        match (self.dtype, self.device()) {
            (DType::BF16 | DType::F16, Device::Cpu) => DType::F32,
            (other, _) => other,
        }
    }
}

fn concat_data<T: Element>(tensors: &[&Tensor], axis: usize, shape: Shape) -> Result<Tensor> {
    use rayon::prelude::*;

    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    let row = shape[axis] * inner;
    let mut buffer = Buffer::<T>::scratch(shape.elements());
    let flat: Vec<Tensor> = tensors
        .iter()
        .map(|t| {
            let detached = t.detach();
            // Rows with gaps among their own elements are rare (never in the models): copy those first.
            if axis == 0 || detached.row_view::<T>().is_err() || axis > 1 {
                detached.contiguous()
            } else {
                Ok(detached)
            }
        })
        .collect::<Result<_>>()?;
    let sources: Vec<(&[T], usize, usize)> = flat
        .iter()
        .map(|t| {
            let width = t.shape[axis] * inner;
            let stride = if axis == 1 { t.strides[0] } else { width };
            Ok((t.strided_data::<T>()?, width, stride))
        })
        .collect::<Result<_>>()?;
    if row == 0 || outer == 0 {
        return Tensor::from_buffer(buffer, shape);
    }
    let rows_each = (16_384 / row).max(1);
    buffer.par_chunks_mut(row * rows_each).enumerate().for_each(|(block, rows)| {
        for (i, to) in rows.chunks_mut(row).enumerate() {
            let o = block * rows_each + i;
            let mut at = 0;
            for &(data, width, stride) in &sources {
                to[at..at + width].copy_from_slice(&data[o * stride..o * stride + width]);
                at += width;
            }
        }
    });
    Tensor::from_buffer(buffer, shape)
}
