//! The scan of tensors on a GPU: real with B and C of the token (`cuda.rs`), or general (`cuda_general.rs`).

use elapid_tensor::autograd::{Backward, Place, Saved, is_recording, record};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{Error, Result, Sequences, Shape, Tensor};

use super::cuda::{self, Plan};
use super::cuda_general::{self, Map};
use super::{Inputs, OP, Projected, Values};
use crate::gpu::{GpuElement, by_rows, placed, rows, slice_of, whole, with_gpu_element};
use crate::matmul::{linear_forward, linear_gradients_of_parameters, product};

/// What backward needs of forward.
enum Chunks {
    Token(cuda::Chunks),
    General(cuda_general::Chunks),
}

/// [`super::selective_scan`] of tensors whose shapes, types and device were checked.
pub(super) fn selective_scan(
    gpu: &Gpu,
    inputs: &Inputs<'_>,
    tensors: &[&Tensor],
    sequences: &Sequences,
) -> Result<(Tensor, Tensor)> {
    let (y, state, chunks) = forward(gpu, inputs, sequences, is_recording(tensors))?;
    let mut outputs = record(OP, tensors, vec![y, state], || {
        let saved = Values::new(inputs, |tensor| Ok(Saved::new(tensor)));
        let (sequences, gpu) = (sequences.clone(), gpu.clone());
        move |context: &mut Backward| {
            let values = saved?.map(Saved::get)?;
            let dy = context.take_grad(0);
            let chunks = chunks.as_ref();
            Ok(values.gradients_on_gpu(&gpu, context, &sequences, chunks, dy, false)?.0)
        }
    });
    let state = outputs.swap_remove(1);
    Ok((outputs.swap_remove(0), state))
}

/// Whether [`projected`] is there for a scan: its backward makes the output on its way.
pub(super) fn makes_output_again(inputs: &Inputs<'_>) -> Result<bool> {
    Ok(inputs.z.is_some() && !Values::new(inputs, |tensor| Ok(tensor.detach()))?.is_general())
}

/// [`super::selective_scan_linear`] where [`makes_output_again`].
pub(super) fn projected(
    gpu: &Gpu,
    inputs: &Inputs<'_>,
    (weight, bias): (&Tensor, Option<&Tensor>),
    sequences: &Sequences,
) -> Result<Projected> {
    let named = inputs.named();
    let scanned = named.len();
    let mut tensors: Vec<&Tensor> = named.iter().map(|(_, tensor)| *tensor).collect();
    tensors.push(weight);
    tensors.extend(bias);
    let (y, state, chunks) = forward(gpu, inputs, sequences, is_recording(&tensors))?;
    let output = linear_forward(OP, &y, weight, bias)?;
    let mut outputs = record(OP, &tensors, vec![output, state], || {
        let saved = Values::new(inputs, |tensor| Ok(Saved::new(tensor)));
        let (weight_type, weight) = (weight.dtype(), Saved::new(weight));
        let bias = bias.map(|bias| (scanned + 1, bias.shape()));
        let (sequences, gpu) = (sequences.clone(), gpu.clone());
        move |context: &mut Backward| {
            let values = saved?.map(Saved::get)?;
            let grad = context.take_grad(0);
            let dy = match &grad {
                Some(grad) => Some(product(OP, grad, &weight.get()?, values.u.dtype())?),
                None => None,
            };
            let wanted = grad.is_some() && context.needs(scanned);
            let chunks = chunks.as_ref();
            let (mut grads, y) =
                values.gradients_on_gpu(&gpu, context, &sequences, chunks, dy, wanted)?;
            let missing = || Error::Graph(format!("{OP}: the output was not made again"));
            match grad {
                Some(grad) => grads.extend(linear_gradients_of_parameters(
                    context,
                    &grad,
                    || y.ok_or_else(missing),
                    (scanned, weight_type),
                    bias,
                )?),
                None => {
                    grads.extend([None, None].into_iter().take(1 + usize::from(bias.is_some())))
                }
            }
            Ok(grads)
        }
    });
    let state = outputs.swap_remove(1);
    Ok(Projected { output: outputs.swap_remove(0), y, state })
}

/// Output and state, and what backward needs if `save`.
fn forward(
    gpu: &Gpu,
    inputs: &Inputs<'_>,
    sequences: &Sequences,
    save: bool,
) -> Result<(Tensor, Tensor, Option<Chunks>)> {
    let values = Values::new(inputs, |tensor| Ok(tensor.detach()))?;
    let state_shape: Vec<usize> =
        std::iter::once(sequences.slots()).chain(inputs.a.shape().iter().copied()).collect();
    let (y, state, chunks) = with_gpu_element!(OP, inputs.u, T => {
        if values.is_general() {
            values.general_on_gpu::<T, _>(gpu, sequences, |x| {
                let (y, state, chunks) = cuda_general::forward(gpu, x, save)?;
                let y = Tensor::from_device(y, inputs.u.shape())?;
                Ok((y, state, chunks.map(Chunks::General)))
            })
        } else {
            values.on_gpu::<T, _>(gpu, sequences, |x| {
                let (y, state, chunks) = cuda::forward(gpu, x, save)?;
                let y = Tensor::from_device(y, inputs.u.shape())?;
                Ok((y, state, chunks.map(Chunks::Token)))
            })
        }
    })?;
    Ok((y, Tensor::from_device(state, &state_shape[..])?, chunks))
}

impl Values<Tensor> {
    fn is_constant(&self, map: &Tensor) -> bool {
        map.shape() == self.a.shape()
    }

    fn is_general(&self) -> bool {
        self.a.rank() == 3 || self.is_constant(&self.b) || self.is_constant(&self.c)
    }

    /// Runs `f` on the arguments of a real scan with B and C of the token as the launches want them.
    fn on_gpu<T: GpuElement, R>(
        &self,
        gpu: &Gpu,
        sequences: &Sequences,
        f: impl FnOnce(&cuda::Inputs<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let sizes = (self.a.dim(0), self.b.dim(1), self.a.dim(1));
        let plan = Plan::of(gpu, sequences, sizes)?;
        let (u, delta, b, c) =
            (by_rows(&self.u)?, by_rows(&self.delta)?, by_rows(&self.b)?, by_rows(&self.c)?);
        let z = self.z.as_ref().map(by_rows).transpose()?;
        let a = whole(&self.a)?;
        let d = self.d.as_ref().map(whole).transpose()?;
        let delta_bias = self.delta_bias.as_ref().map(whole).transpose()?;
        let state = self.state.as_ref().map(whole).transpose()?;
        f(&cuda::Inputs {
            u: rows(&u)?,
            delta: rows(&delta)?,
            a: a.device_slice()?,
            b: rows(&b)?,
            c: rows(&c)?,
            d: slice_of(&d)?,
            z: z.as_ref().map(rows).transpose()?,
            delta_bias: slice_of(&delta_bias)?,
            delta_softplus: self.delta_softplus,
            state: slice_of(&state)?,
            plan: &plan,
        })
    }

    /// Runs `f` on the arguments of any scan as the general launches want them.
    fn general_on_gpu<T: GpuElement, R>(
        &self,
        gpu: &Gpu,
        sequences: &Sequences,
        f: impl FnOnce(&cuda_general::Inputs<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let plan = cuda_general::Plan::of(gpu, sequences)?;
        let laid_out = |map: &Tensor| if self.is_constant(map) { whole(map) } else { by_rows(map) };
        let (b, c) = (laid_out(&self.b)?, laid_out(&self.c)?);
        let groups = [&b, &c].into_iter().find(|map| !self.is_constant(map));
        let (u, delta) = (by_rows(&self.u)?, by_rows(&self.delta)?);
        let z = self.z.as_ref().map(by_rows).transpose()?;
        let a = whole(&self.a)?;
        let d = self.d.as_ref().map(whole).transpose()?;
        let delta_bias = self.delta_bias.as_ref().map(whole).transpose()?;
        let state = self.state.as_ref().map(whole).transpose()?;
        f(&cuda_general::Inputs {
            channels: a.dim(0),
            states: a.dim(1),
            complex: a.rank() == 3,
            groups: groups.map_or(1, |map| map.dim(1)),
            u: rows(&u)?,
            delta: rows(&delta)?,
            a: a.device_slice()?,
            b: self.map_of(&b)?,
            c: self.map_of(&c)?,
            d: slice_of(&d)?,
            z: z.as_ref().map(rows).transpose()?,
            delta_bias: slice_of(&delta_bias)?,
            delta_softplus: self.delta_softplus,
            state: slice_of(&state)?,
            plan: &plan,
        })
    }

    /// B or C as the general launches want it.
    fn map_of<'t, T: GpuElement>(
        &self,
        map: &'t Tensor,
    ) -> Result<cuda_general::MapArgument<'t, T>> {
        Ok(if self.is_constant(map) {
            Map::Constant(map.device_slice()?)
        } else {
            Map::Token(rows(map)?)
        })
    }

    /// The gradients in the order of `Inputs::named`, and the output once more if `with_output`.
    fn gradients_on_gpu(
        &self,
        gpu: &Gpu,
        context: &mut Backward,
        sequences: &Sequences,
        chunks: Option<&Chunks>,
        dy: Option<Tensor>,
        with_output: bool,
    ) -> Result<(Vec<Option<Tensor>>, Option<Tensor>)> {
        let chunks = chunks.ok_or_else(|| Error::Graph(format!("{OP}: nothing was saved")))?;
        let dy = match dy {
            Some(dy) => by_rows(&dy)?,
            None => Tensor::zeros_on(self.u.device(), self.u.dtype(), self.u.shape())?,
        };
        let dlast = context.take_grad(1).map(|dlast| whole(&dlast)).transpose()?;
        let dlast = slice_of(&dlast)?;
        with_gpu_element!(OP, self.u, T => {
            match chunks {
                Chunks::Token(chunks) => self.on_gpu::<T, _>(gpu, sequences, |x| {
                    let place = match &self.z {
                        Some(z) => context.place(5 + usize::from(self.d.is_some()), z.dtype())?,
                        None => None,
                    };
                    let dy = rows(&dy)?;
                    let mut grad =
                        cuda::backward(gpu, x, chunks, dy, dlast, place.as_ref(), with_output)?;
                    let y = grad.y.take();
                    let y = y.map(|y| Tensor::from_device(y, self.u.shape())).transpose()?;
                    Ok((self.in_order(grad.into(), place)?, y))
                }),
                Chunks::General(chunks) => self.general_on_gpu::<T, _>(gpu, sequences, |x| {
                    let grad = cuda_general::backward(gpu, x, chunks, rows(&dy)?, dlast)?;
                    Ok((self.in_order(grad, None)?, None))
                }),
            }
        })
    }

    /// The gradients by the tensors that are there, in the order of `Inputs::named`; that of z may be in `place`.
    fn in_order<T: GpuElement>(
        &self,
        grad: cuda_general::Gradients<T>,
        place: Option<Place>,
    ) -> Result<Vec<Option<Tensor>>> {
        let of_map = |map, shape: Shape| match map {
            Map::Token(grad) => Tensor::from_device::<T>(grad, shape),
            Map::Constant(grad) => Tensor::from_device::<f32>(grad, shape),
        };
        let mut grads = vec![
            Tensor::from_device(grad.u, self.u.shape())?,
            Tensor::from_device(grad.delta, self.delta.shape())?,
            Tensor::from_device(grad.a, self.a.shape())?,
            of_map(grad.b, self.b.shape())?,
            of_map(grad.c, self.c.shape())?,
        ];
        if let Some(d) = &self.d {
            grads.push(Tensor::from_device(grad.d, d.shape())?);
        }
        if let Some(z) = &self.z {
            grads.push(placed(place, grad.z, z.shape())?);
        }
        if let Some(bias) = &self.delta_bias {
            grads.push(Tensor::from_device(grad.delta_bias, bias.shape())?);
        }
        if let Some(state) = &self.state {
            grads.push(Tensor::from_device(grad.state, state.shape())?);
        }
        Ok(grads.into_iter().map(Some).collect())
    }
}
