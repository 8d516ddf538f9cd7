//! The causal depthwise convolution with its activation: a sum over the last W inputs of each channel.
//!
//! `y[t, c] = act(bias[c] + Σ_w K[c, w] x[t - (W - 1 - w), c])` within each sequence (mamba.md b2 step 2). Before
//! a sequence stands its state, the last W - 1 inputs of what came earlier, or zeros if it is fresh; whether
//! that state is read is selected, so documents packed into one batch (packmamba.md b2) cannot touch each other.

mod backward;
mod cpu;
pub mod cuda;
mod on_gpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use backward::Outer;
use cpu::{Convolution, tap_major};
use elapid_tensor::autograd::{Backward, Saved, record};
use elapid_tensor::{Buffer, DType, Error, Result, Sequences, Tensor};

use crate::gpu::by_rows;

const OP: &str = "causal_conv1d";

/// What follows the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `v sigmoid(v)`.
    Silu,
}

/// The convolution of a ragged batch: x [T, E] (rows may lie apart), weight [E, W], bias [E], state
/// [slots, E, W - 1] with the oldest input first; returns y [T, E] and the state after the batch.
///
/// Sequences that run write their slot; a continued sequence without tokens and slots of no sequence carry the
/// incoming state through (zeros without one), a fresh sequence without tokens leaves zeros. Gradients flow to
/// x, weight, bias and state, from y and from the returned state. All f32; on a GPU, x and y may be bf16.
///
/// # Errors
/// If a shape, type or device does not fit, the batch has another number of tokens than `sequences`, or a sequence
/// continues and there is no state.
pub fn causal_conv1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    sequences: &Sequences,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    x.expect_rank(OP, "x", 2, "[T, E]")?;
    weight.expect_rank(OP, "weight", 2, "[E, W]")?;
    let (channels, width) = (x.dim(1), weight.dim(1));
    x.expect_shape(OP, "x", &[sequences.tokens(), channels])?;
    if weight.dim(0) != channels || width == 0 {
        return Err(weight.shape_error(OP, "weight", format!("[{channels}, W] with W >= 1")));
    }
    if let Some(bias) = bias {
        bias.expect_shape(OP, "bias", &[channels])?;
    }
    let state_shape = [sequences.slots(), channels, width - 1];
    match state {
        Some(state) => state.expect_shape(OP, "state", &state_shape)?,
        None if sequences.any_continued() => {
            return Err(Error::argument(OP, "a sequence continues, expected a state, got none"));
        }
        None => {}
    }
    let named = [("x", Some(x)), ("weight", Some(weight)), ("bias", bias), ("state", state)];
    for (name, tensor) in named.iter().filter_map(|(name, tensor)| tensor.map(|t| (*name, t))) {
        tensor.expect_device(OP, name, x.device())?;
        if name != "x" || x.gpu().is_none() {
            tensor.expect_dtype(OP, name, DType::F32)?;
        }
    }

    let on_gpu = x.gpu().cloned();
    let inputs: Vec<&Tensor> = named.iter().filter_map(|(_, tensor)| *tensor).collect();
    let silu = activation == Activation::Silu;
    let saved = || Values {
        x: x.detach(),
        weight: weight.detach(),
        bias: bias.map(Tensor::detach),
        state: state.map(Tensor::detach),
        silu,
        sequences: sequences.clone(),
    };
    let (y, state_out) = match x.gpu() {
        Some(gpu) => saved().forward_on_gpu(gpu)?,
        None => saved().with(|conv| {
            let mut y = Buffer::<f32>::scratch(x.elements());
            conv.forward(&mut y);
            let mut state_out = match conv.state {
                Some(state) => Buffer::copy_of(state),
                None => Buffer::<f32>::zeros(state_shape.iter().product()),
            };
            conv.state_out(&mut state_out);
            Ok((Tensor::from_buffer(y, x.shape())?, Tensor::from_buffer(state_out, state_shape)?))
        })?,
    };
    let mut outputs = record(OP, &inputs, vec![y, state_out], || {
        let (x, weight) = (Saved::new(x), Saved::new(weight));
        let (bias, state) = (bias.map(Saved::new), state.map(Saved::new));
        let (sequences, x_gpu) = (sequences.clone(), on_gpu);
        move |context: &mut Backward| {
            let values = Values {
                x: x.get()?,
                weight: weight.get()?,
                bias: bias.as_ref().map(Saved::get).transpose()?,
                state: state.as_ref().map(Saved::get).transpose()?,
                silu,
                sequences,
            };
            match x_gpu {
                Some(gpu) => values.gradients_on_gpu(&gpu, context),
                None => values.gradients(context),
            }
        }
    });
    let state_out = outputs.swap_remove(1);
    Ok((outputs.swap_remove(0), state_out))
}

/// The inputs' values.
struct Values {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    state: Option<Tensor>,
    silu: bool,
    sequences: Sequences,
}

impl Values {
    /// Runs `f` on the arguments as the CPU kernels want them.
    fn with<R>(&self, f: impl FnOnce(&Convolution<'_>) -> Result<R>) -> Result<R> {
        let (channels, width) = (self.weight.dim(0), self.weight.dim(1));
        // Only rows may lie apart; other views are rare and copied.
        let x = by_rows(&self.x)?;
        let taps = tap_major(self.weight.contiguous()?.data()?, channels, width);
        let bias = match &self.bias {
            Some(bias) => bias.to_vec::<f32>()?,
            None => vec![0.0; channels],
        };
        let state = self.state.as_ref().map(Tensor::contiguous).transpose()?;
        let state = state.as_ref().map(|state| state.data::<f32>()).transpose()?;
        f(&Convolution {
            x: x.row_view()?,
            taps: &taps,
            bias: &bias,
            width,
            silu: self.silu,
            sequences: &self.sequences,
            state,
        })
    }

    fn gradients(&self, context: &mut Backward) -> Result<Vec<Option<Tensor>>> {
        let dy = match context.take_grad(0) {
            Some(dy) => by_rows(&dy)?,
            None => Tensor::zeros::<f32>(self.x.shape()),
        };
        let dstate = context.take_grad(1).map(|dstate| dstate.contiguous()).transpose()?;
        self.with(|conv| {
            let outer = Outer {
                dy: dy.row_view()?,
                dstate: dstate.as_ref().map(|dstate| dstate.data::<f32>()).transpose()?,
            };
            let mut dx = Buffer::<f32>::scratch(self.x.elements());
            let (dweight, dbias) = conv.backward(outer, &mut dx);
            let mut grads = vec![
                Some(Tensor::from_buffer(dx, self.x.shape())?),
                Some(Tensor::from_slice(&dweight, self.weight.shape())?),
            ];
            if self.bias.is_some() {
                grads.push(Some(Tensor::from_slice(&dbias, [dbias.len()])?));
            }
            if let Some(state) = &self.state {
                let wanted = context.needs(grads.len());
                grads.push(if wanted {
                    let mut dstate_in = Buffer::<f32>::scratch(state.elements());
                    conv.backward_state(outer, &mut dstate_in);
                    Some(Tensor::from_buffer(dstate_in, state.shape())?)
                } else {
                    None
                });
            }
            Ok(grads)
        })
    }
}
