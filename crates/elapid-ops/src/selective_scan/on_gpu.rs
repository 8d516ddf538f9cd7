//! The scan of tensors on a GPU: real, with B and C of the token.

use elapid_tensor::autograd::{Backward, Saved, is_recording, record};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{Error, Result, Sequences, Tensor};

use super::cuda::{self, Plan};
use super::{Inputs, OP, Values};
use crate::gpu::{GpuElement, by_rows, placed, rows, slice_of, whole, with_gpu_element};

/// [`super::selective_scan`] of tensors whose shapes, types and device were checked.
pub(super) fn selective_scan(
    gpu: &Gpu,
    inputs: &Inputs<'_>,
    tensors: &[&Tensor],
    sequences: &Sequences,
) -> Result<(Tensor, Tensor)> {
    let a = inputs.a.shape();
    if a.len() != 2 || inputs.b.shape() == a || inputs.c.shape() == a {
        let message = "complex states and constant B or C have no implementation on a GPU: use cpu";
        return Err(Error::argument(OP, message));
    }
    let values = Values::new(inputs, |tensor| Ok(tensor.detach()))?;
    let state_shape = [sequences.slots(), a[0], a[1]];
    let save = is_recording(tensors);
    let (y, state, chunks) = with_gpu_element!(OP, inputs.u, T => {
        values.on_gpu::<T, _>(gpu, sequences, |x| {
            let (y, state, chunks) = cuda::forward(gpu, x, save)?;
            let y = Tensor::from_device(y, inputs.u.shape())?;
            Ok((y, Tensor::from_device(state, state_shape)?, chunks))
        })
    })?;
    let mut outputs = record(OP, tensors, vec![y, state], || {
        let saved = Values::new(inputs, |tensor| Ok(Saved::new(tensor)));
        let (sequences, gpu) = (sequences.clone(), gpu.clone());
        move |context: &mut Backward| {
            let values = saved?.map(Saved::get)?;
            let chunks = chunks.ok_or_else(|| Error::Graph(format!("{OP}: nothing was saved")))?;
            values.gradients_on_gpu(&gpu, context, &sequences, &chunks)
        }
    });
    let state = outputs.swap_remove(1);
    Ok((outputs.swap_remove(0), state))
}

impl Values<Tensor> {
    /// Runs `f` on the arguments as the launches want them.
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

    fn gradients_on_gpu(
        &self,
        gpu: &Gpu,
        context: &mut Backward,
        sequences: &Sequences,
        chunks: &cuda::Chunks,
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = match context.take_grad(0) {
            Some(dy) => by_rows(&dy)?,
            None => Tensor::zeros_on(self.u.device(), self.u.dtype(), self.u.shape())?,
        };
        let dlast = context.take_grad(1).map(|dlast| whole(&dlast)).transpose()?;
        with_gpu_element!(OP, self.u, T => self.on_gpu::<T, _>(gpu, sequences, |x| {
            let dlast = slice_of(&dlast)?;
            let place = match &self.z {
                Some(z) => context.place(5 + usize::from(self.d.is_some()), z.dtype())?,
                None => None,
            };
            let grad = cuda::backward(gpu, x, chunks, rows(&dy)?, dlast, place.as_ref())?;
            let mut grads = vec![
                Some(Tensor::from_device(grad.u, self.u.shape())?),
                Some(Tensor::from_device(grad.delta, self.delta.shape())?),
                Some(Tensor::from_device(grad.a, self.a.shape())?),
                Some(Tensor::from_device(grad.b, self.b.shape())?),
                Some(Tensor::from_device(grad.c, self.c.shape())?),
            ];
            if let Some(d) = &self.d {
                grads.push(Some(Tensor::from_device(grad.d, d.shape())?));
            }
            if let Some(z) = &self.z {
                grads.push(Some(placed(place, grad.z, z.shape())?));
            }
            if let Some(bias) = &self.delta_bias {
                grads.push(Some(Tensor::from_device(grad.delta_bias, bias.shape())?));
            }
            if let Some(state) = &self.state {
                grads.push(Some(Tensor::from_device(grad.state, state.shape())?));
            }
            Ok(grads)
        }))
    }
}
