//! The convolution of tensors on a GPU.

use elapid_tensor::autograd::Backward;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{Result, Tensor};

use super::cuda::{self, Inputs};
use super::{OP, Values};
use crate::gpu::{
    DeviceSequences, GpuElement, by_rows, placed, rows, slice_of, whole, with_gpu_element,
};

impl Values {
    /// Runs `f` on the arguments as the launches want them.
    fn on_gpu<T: GpuElement, R>(
        &self,
        gpu: &Gpu,
        f: impl FnOnce(&Inputs<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let x = by_rows(&self.x)?;
        let weight = whole(&self.weight)?;
        let bias = self.bias.as_ref().map(whole).transpose()?;
        let state = self.state.as_ref().map(whole).transpose()?;
        let sequences = DeviceSequences::of(gpu, &self.sequences)?;
        f(&Inputs {
            x: rows(&x)?,
            weight: weight.device_slice()?,
            bias: slice_of(&bias)?,
            state: slice_of(&state)?,
            sequences: &sequences,
            channels: self.weight.dim(0),
            width: self.weight.dim(1),
            silu: self.silu,
        })
    }

    /// y and the state after the batch.
    pub(super) fn forward_on_gpu(&self, gpu: &Gpu) -> Result<(Tensor, Tensor)> {
        let state_shape =
            [self.sequences.slots(), self.weight.dim(0), self.weight.dim(1).saturating_sub(1)];
        with_gpu_element!(OP, self.x, T => self.on_gpu::<T, _>(gpu, |inputs| {
            let (y, state) = cuda::forward(gpu, inputs)?;
            Ok((Tensor::from_device(y, self.x.shape())?, Tensor::from_device(state, state_shape)?))
        }))
    }

    pub(super) fn gradients_on_gpu(
        &self,
        gpu: &Gpu,
        context: &mut Backward,
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = match context.take_grad(0) {
            Some(dy) => by_rows(&dy)?,
            None => Tensor::zeros_on(self.x.device(), self.x.dtype(), self.x.shape())?,
        };
        let dstate = context.take_grad(1).map(|dstate| whole(&dstate)).transpose()?;
        with_gpu_element!(OP, self.x, T => self.on_gpu::<T, _>(gpu, |inputs| {
            let dx = context.place(0, self.x.dtype())?;
            let found = cuda::backward(gpu, inputs, rows(&dy)?, slice_of(&dstate)?, dx.as_ref())?;
            let mut grads = vec![
                Some(placed(dx, found.x, self.x.shape())?),
                Some(Tensor::from_device(found.weight, self.weight.shape())?),
            ];
            if let Some(bias) = &self.bias {
                grads.push(Some(Tensor::from_device(found.bias, bias.shape())?));
            }
            if let Some(state) = &self.state {
                grads.push(Some(Tensor::from_device(found.state, state.shape())?));
            }
            Ok(grads)
        }))
    }
}
