//! One token for each of some sequences through a whole Mamba language model on a GPU, in a few kernels a layer.
//!
//! ```text
//! residual ← embedding[id]
//! per layer:
//!   x, z     ← W_in (norm(residual))                        decode_input: with convolution, SiLU and the gate
//!   dt, B, C ← W_x u                                        decode_selection
//!   Δ        ← softplus(W_dt dt + bias)                     decode_scan: with the recurrence, D and the gate
//!   residual ← residual + W_out y                           decode_output: with the next norm's sums
//! logits     ← W_head (norm(residual))                      decode_rows
//! ```
//!
//! Decoding is bound by the memory that weights and states are read from and, where models are small, by the number of
//! kernels and by how long each waits for the one before. So weights lie in the order in which the tensor cores take them
//! (`layout.cuh`), in bf16 or as int8 with a scale for 32 of them; a kernel asks for its weights before it waits; norms are
//! folded into the products around them. States, sums, norms, Δ and the recurrence are f32, activations between the
//! kernels bf16. A sum over terms has one order, whatever the number of sequences: a sequence's logits and states have the
//! same bits alone and in any batch.

mod arguments;
mod cuda;
mod cut;
mod packed;
#[cfg(test)]
mod reference;
mod sample;
#[cfg(test)]
mod tests;

use elapid_tensor::cuda::{DeviceBuffer, Gpu, Result};
use elapid_tensor::{DType, Device, Tensor, bf16};

pub use cuda::Step;
pub use packed::{Encoding, Packed, Source};
pub use sample::{Choice, MOST_CLASSES, Room, Sampled, Sampling, Slot};

use crate::gpu::wrong;

const OP: &str = "decode_step";

/// Sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizes {
    /// D.
    pub width: usize,
    /// E.
    pub inner: usize,
    /// N.
    pub states: usize,
    /// R.
    pub rank: usize,
    /// W.
    pub taps: usize,
    /// V, rows of the embedding and of the head.
    pub classes: usize,
    /// LayerNorm instead of RMSNorm.
    pub centred: bool,
    /// Added to the mean square or variance of the norms.
    pub eps: f32,
    /// Where Δ's input, B and C are divided by their root mean square: what is added to the mean square.
    pub selection_eps: Option<f32>,
    /// How h is kept from step to step: f32, or bf16, which rounds it once a step.
    pub state: DType,
}

/// The scale of a norm and, of LayerNorm, its bias, [D] each.
#[derive(Debug)]
pub struct NormWeights {
    /// Scale.
    pub weight: DeviceBuffer<f32>,
    /// Bias.
    pub bias: Option<DeviceBuffer<f32>>,
}

/// The parameters of a layer.
#[derive(Debug)]
pub struct LayerWeights {
    /// Before the mixer.
    pub norm: NormWeights,
    /// W_in [2 E, D], packed in two parts of E rows.
    pub input: Packed,
    /// [2 E].
    pub input_bias: Option<DeviceBuffer<f32>>,
    /// Of the convolution [E, W].
    pub taps: DeviceBuffer<f32>,
    /// [E].
    pub tap_bias: Option<DeviceBuffer<f32>>,
    /// W_x [R + 2 N, E].
    pub selection: Packed,
    /// W_dt [E, R], in bf16.
    pub delta: Packed,
    /// [E].
    pub delta_bias: Option<DeviceBuffer<f32>>,
    /// A [E, N], below 0.
    pub a: DeviceBuffer<f32>,
    /// D [E].
    pub d: DeviceBuffer<f32>,
    /// W_out [D, E].
    pub output: Packed,
    /// [D].
    pub output_bias: Option<DeviceBuffer<f32>>,
}

/// The parameters of a model.
#[derive(Debug)]
pub struct Weights {
    /// [V, D].
    pub embedding: Packed,
    /// First to last.
    pub layers: Vec<LayerWeights>,
    /// Before the head.
    pub norm: NormWeights,
    /// [V, D]; none if it is the embedding.
    pub head: Option<Packed>,
}

impl Weights {
    /// The matrix that makes logits.
    pub fn head(&self) -> &Packed {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes that a step reads of them: all but the embedding's other rows.
    pub fn bytes_read(&self) -> usize {
        let layer = |layer: &LayerWeights| {
            let packed = [&layer.input, &layer.selection, &layer.delta, &layer.output];
            packed.map(Packed::bytes).into_iter().sum::<usize>()
                + 4 * (layer.norm.weight.len() + layer.taps.len() + layer.a.len() + layer.d.len())
        };
        self.layers.iter().map(layer).sum::<usize>() + self.head().bytes()
    }

    /// Checks that everything has the sizes of the model.
    ///
    /// # Errors
    /// Names the first that has not.
    pub fn check(&self, sizes: &Sizes) -> Result<()> {
        let Sizes { width: d, inner: e, states: n, rank: r, taps: w, classes: v, .. } = *sizes;
        let matrix = |name: &str, packed: &Packed, rows: usize, terms: usize| {
            if (packed.rows(), packed.terms()) == (rows, terms) {
                return Ok(());
            }
            let (found_rows, found_terms) = (packed.rows(), packed.terms());
            let message =
                format!("{name} is [{found_rows}, {found_terms}], expected [{rows}, {terms}]");
            Err(wrong(OP, message))
        };
        let array = |name: &str, buffer: &DeviceBuffer<f32>, len: usize| {
            crate::gpu::array(OP, name, buffer, len).map(drop)
        };
        let optional = |name: &str, buffer: &Option<DeviceBuffer<f32>>, len: usize| {
            buffer.as_ref().map_or(Ok(()), |buffer| array(name, buffer, len))
        };
        let norm = |norm: &NormWeights| {
            array("a norm's weight", &norm.weight, d)?;
            optional("a norm's bias", &norm.bias, d)
        };
        if !matches!(sizes.state, DType::F32 | DType::BF16) {
            return Err(wrong(OP, format!("a state in {}, expected f32 or bf16", sizes.state)));
        }
        if [d, e, n, r, w, v].contains(&0) {
            return Err(wrong(OP, format!("a size is 0: {sizes:?}")));
        }
        matrix("the embedding", &self.embedding, v, d)?;
        matrix("the head", self.head(), v, d)?;
        norm(&self.norm)?;
        for layer in &self.layers {
            norm(&layer.norm)?;
            matrix("in_proj", &layer.input, 2 * e, d)?;
            if layer.input.first_rows() != e {
                return Err(wrong(OP, "in_proj is not packed in two parts".into()));
            }
            optional("in_proj's bias", &layer.input_bias, 2 * e)?;
            array("the convolution's weight", &layer.taps, e * w)?;
            optional("the convolution's bias", &layer.tap_bias, e)?;
            matrix("x_proj", &layer.selection, r + 2 * n, e)?;
            matrix("dt_proj", &layer.delta, e, r)?;
            if layer.delta.encoding() != Encoding::Bf16 {
                return Err(wrong(OP, "dt_proj is not in bf16".into()));
            }
            optional("dt_proj's bias", &layer.delta_bias, e)?;
            array("A", &layer.a, e * n)?;
            array("D", &layer.d, e)?;
            matrix("out_proj", &layer.output, d, e)?;
            optional("out_proj's bias", &layer.output_bias, d)?;
        }
        Ok(())
    }
}

/// The state of a layer for some slots, on the GPU and without gaps.
#[derive(Debug)]
pub struct LayerState {
    /// The last W - 1 inputs of the convolution [slots, E, W - 1], oldest first, in f32.
    pub tail: Tensor,
    /// h [slots, E, N], in the type of [`Sizes::state`].
    pub state: Tensor,
}

impl LayerState {
    /// The state of slots that have seen nothing.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn fresh(gpu: &Gpu, sizes: &Sizes, slots: usize) -> elapid_tensor::Result<Self> {
        let device = Device::Cuda(gpu.id());
        let zeros = |dtype, last| Tensor::zeros_on(device, dtype, [slots, sizes.inner, last]);
        let tail = zeros(DType::F32, sizes.taps - 1)?;
        Ok(Self { tail, state: zeros(sizes.state, sizes.states)? })
    }

    /// Addresses of both, and the number of slots.
    fn places(&self, sizes: &Sizes) -> elapid_tensor::Result<(u64, u64)> {
        let slots = self.state.shape().first().copied().unwrap_or(0);
        self.tail.expect_shape(OP, "tail", &[slots, sizes.inner, sizes.taps - 1])?;
        self.state.expect_shape(OP, "state", &[slots, sizes.inner, sizes.states])?;
        let state = match sizes.state {
            DType::BF16 => self.state.device_slice::<bf16>()?.address(),
            _ => self.state.device_slice::<f32>()?.address(),
        };
        let tail = self.tail.device_slice::<f32>()?.address();
        // Kernels move 16 bytes at a time.
        match tail | state {
            both if both.is_multiple_of(16) => Ok((tail, state)),
            _ => Err(elapid_tensor::Error::argument(
                OP,
                "tail or state starts between multiples of 16 bytes, as a view can",
            )),
        }
    }
}
