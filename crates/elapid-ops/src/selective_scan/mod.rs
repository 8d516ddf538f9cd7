//! The selective scan (S6) of Mamba, arXiv 2312.00752, algorithm 2: a diagonal linear recurrence a channel whose
//! step Δ, input map B and output map C depend on the token.
//!
//! ```text
//! Δ = softplus(δ + bias);  h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t h_t + D u_t;  o_t = y_t silu(z_t)
//! ```
//!
//! `reference.rs` is the definition, forward and backward, in f64. The CPU code takes memory `O(T E)` plus, for
//! backward, the states at every 64th step of a sequence; it computes everything between again. Sequences of a
//! batch never meet: each starts from zero or from its own slot of the state (a select), so a NaN stays in its
//! document, and outputs and states have the same bits whether a sequence runs alone or in a batch, on however
//! many threads.

mod arguments;
mod backward;
mod backward_rows;
mod chunks;
mod cpu;
pub mod cuda;
mod cuda_general;
mod cuda_plan;
mod field;
mod forward;
mod on_gpu;
mod partial;
pub mod reference;
mod scratch;
mod stage;
mod sweep;
#[cfg(test)]
mod tests;
mod tile;

pub use arguments::{Arguments, Gradients, Projection};
pub use cpu::{backward as backward_cpu, chunk_states_len, forward as forward_cpu};

use elapid_tensor::autograd::{Backward, Saved, is_recording, record};
use elapid_tensor::{Buffer, DType, Error, Result, RowView, Sequences, Tensor};

use crate::gpu::by_rows;
use crate::matmul::linear;

const OP: &str = "selective_scan";

/// Most states per channel.
pub const MAX_STATES: usize = 256;

/// Tensors of a selective scan, all f32; on a GPU, u, delta, z and b and c of the token may be bf16, all or none. The
/// scan is complex if A has three axes; then A, B, C and the state end in an axis of two (re, im) and
/// y = 2 Re(C h) + D u.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Input `[T, E]`; rows may lie apart.
    pub u: &'a Tensor,
    /// Step δ before bias and softplus, `[T, E]`; rows may lie apart.
    pub delta: &'a Tensor,
    /// Decay rates `[E, N]`, with negative real part (not their logarithm).
    pub a: &'a Tensor,
    /// Input map, `[T, G, N]` (rows may lie apart) or constant `[E, N]`.
    pub b: &'a Tensor,
    /// Output map, `[T, G, N]` (rows may lie apart) or constant `[E, N]`.
    pub c: &'a Tensor,
    /// Skip `[E]`.
    pub d: Option<&'a Tensor>,
    /// Gate `[T, E]`; rows may lie apart.
    pub z: Option<&'a Tensor>,
    /// Added to δ, `[E]`.
    pub delta_bias: Option<&'a Tensor>,
    /// Whether Δ is the softplus of δ + bias (the identity above 20).
    pub delta_softplus: bool,
    /// State `[slots, E, N]` that continued sequences start from.
    pub state: Option<&'a Tensor>,
}

/// The scan of a ragged batch; returns the output `[T, E]` and the state `[slots, E, N]` after the batch.
///
/// Sequences that run write their slot; a continued sequence without tokens and slots of no sequence carry the
/// incoming state through (zeros without one), a fresh sequence without tokens leaves zeros. Gradients flow to
/// all tensors, from the output and from the returned state.
///
/// # Errors
/// If a shape or type does not fit, N is 0 or above [`MAX_STATES`], the groups of B and C differ or do not divide
/// E, or a sequence continues and there is no state.
pub fn selective_scan(inputs: &Inputs<'_>, sequences: &Sequences) -> Result<(Tensor, Tensor)> {
    inputs.check(sequences)?;
    let named = inputs.named();
    let tensors: Vec<&Tensor> = named.iter().map(|(_, tensor)| *tensor).collect();
    if let Some(gpu) = inputs.u.gpu() {
        return on_gpu::selective_scan(gpu, inputs, &tensors, sequences);
    }
    let values = Values::new(inputs, |tensor| Ok(tensor.detach()))?;
    let (y, state, chunk_states) = values.with(sequences, |x| {
        let mut y = Buffer::scratch(sequences.tokens() * x.channels);
        let mut last = Buffer::scratch(x.state_len());
        let saved = if is_recording(&tensors) { chunk_states_len(x) } else { 0 };
        let mut saved = Buffer::scratch(saved);
        forward_cpu(x, &mut y, &mut last, (!saved.is_empty()).then_some(&mut saved));
        let state_shape: Vec<usize> =
            std::iter::once(sequences.slots()).chain(inputs.a.shape().iter().copied()).collect();
        Ok((
            Tensor::from_buffer(y, inputs.u.shape())?,
            Tensor::from_buffer(last, &state_shape[..])?,
            saved,
        ))
    })?;
    let mut outputs = record(OP, &tensors, vec![y, state], || {
        let saved = Values::new(inputs, |tensor| Ok(Saved::new(tensor)));
        let sequences = sequences.clone();
        move |context: &mut Backward| {
            let values = saved?.map(|saved| saved.get())?;
            values.gradients(context, &sequences, &chunk_states)
        }
    });
    let state = outputs.swap_remove(1);
    Ok((outputs.swap_remove(0), state))
}

/// What [`selective_scan_linear`] returns.
pub struct Projected {
    /// `y Wᵀ + b`, `[T, D]`.
    pub output: Tensor,
    /// The scan's output, `[T, E]`, for onlookers: no gradient flows through it where it is not kept.
    pub y: Tensor,
    /// The state after the batch, `[slots, E, N]`.
    pub state: Tensor,
}

/// [`selective_scan`] and [`linear`] of its output. On a GPU a gated scan's output is not kept for the gradient of the
/// weight `[D, E]`: the scan's backward makes it again on its way.
///
/// # Errors
/// Those of both.
pub fn selective_scan_linear(
    inputs: &Inputs<'_>,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sequences: &Sequences,
) -> Result<Projected> {
    inputs.check(sequences)?;
    if let Some(gpu) = inputs.u.gpu()
        && on_gpu::makes_output_again(inputs)?
    {
        return on_gpu::projected(gpu, inputs, (weight, bias), sequences);
    }
    let (y, state) = selective_scan(inputs, sequences)?;
    Ok(Projected { output: linear(&y, weight, bias)?, y, state })
}

impl<'a> Inputs<'a> {
    /// The tensors that are there, in the order in which backward returns their gradients.
    fn named(&self) -> Vec<(&'static str, &'a Tensor)> {
        let all = [
            ("u", Some(self.u)),
            ("delta", Some(self.delta)),
            ("a", Some(self.a)),
            ("b", Some(self.b)),
            ("c", Some(self.c)),
            ("d", self.d),
            ("z", self.z),
            ("delta_bias", self.delta_bias),
            ("state", self.state),
        ];
        all.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect()
    }

    fn check(&self, sequences: &Sequences) -> Result<()> {
        for (name, tensor) in self.named() {
            tensor.expect_device(OP, name, self.u.device())?;
            let of_token = match name {
                "u" | "delta" | "z" => true,
                "b" | "c" => tensor.shape() != self.a.shape(),
                _ => false,
            };
            let own_type = self.u.gpu().is_some() && of_token;
            let dtype = if own_type { self.u.dtype() } else { DType::F32 };
            tensor.expect_dtype(OP, name, dtype)?;
        }
        let a = self.a.shape();
        let (channels, states) = match *a {
            [e, n] | [e, n, 2] if e > 0 && (1..=MAX_STATES).contains(&n) => (e, n),
            _ => {
                let expected = format!("[E, N] or complex [E, N, 2] with N from 1 to {MAX_STATES}");
                return Err(self.a.shape_error(OP, "a", expected));
            }
        };
        let number = &a[2..];
        let tokens = [sequences.tokens(), channels];
        self.u.expect_shape(OP, "u", &tokens)?;
        self.delta.expect_shape(OP, "delta", &tokens)?;
        if let Some(z) = self.z {
            z.expect_shape(OP, "z", &tokens)?;
        }
        for (name, tensor) in [("d", self.d), ("delta_bias", self.delta_bias)] {
            if let Some(tensor) = tensor {
                tensor.expect_shape(OP, name, &[channels])?;
            }
        }
        let mut groups = None;
        for (name, tensor) in [("b", self.b), ("c", self.c)] {
            if tensor.shape() == a {
                continue;
            }
            let fits = tensor.rank() == 3 + number.len()
                && tensor.dim(0) == tokens[0]
                && tensor.dim(2) == states
                && tensor.shape()[3..] == *number
                && tensor.dim(1) > 0
                && channels.is_multiple_of(tensor.dim(1))
                && groups.is_none_or(|groups| groups == tensor.dim(1));
            if !fits {
                let expected = format!(
                    "{a} or [{}, G, {states}{}] with one G for b and c that divides {channels}",
                    tokens[0],
                    if number.is_empty() { "" } else { ", 2" }
                );
                return Err(tensor.shape_error(OP, name, expected));
            }
            groups = Some(tensor.dim(1));
        }
        match self.state {
            Some(state) => {
                let shape: Vec<usize> =
                    std::iter::once(sequences.slots()).chain(a.iter().copied()).collect();
                state.expect_shape(OP, "state", &shape)
            }
            None if sequences.any_continued() => {
                Err(Error::argument(OP, "a sequence continues, expected a state, got none"))
            }
            None => Ok(()),
        }
    }
}

/// The inputs as values of some kind: tensors, or what is saved of them.
struct Values<V> {
    u: V,
    delta: V,
    a: V,
    b: V,
    c: V,
    d: Option<V>,
    z: Option<V>,
    delta_bias: Option<V>,
    delta_softplus: bool,
    state: Option<V>,
}

impl<V> Values<V> {
    fn new(inputs: &Inputs<'_>, f: impl Fn(&Tensor) -> Result<V>) -> Result<Self> {
        Ok(Self {
            u: f(inputs.u)?,
            delta: f(inputs.delta)?,
            a: f(inputs.a)?,
            b: f(inputs.b)?,
            c: f(inputs.c)?,
            d: inputs.d.map(&f).transpose()?,
            z: inputs.z.map(&f).transpose()?,
            delta_bias: inputs.delta_bias.map(&f).transpose()?,
            delta_softplus: inputs.delta_softplus,
            state: inputs.state.map(&f).transpose()?,
        })
    }

    fn map<W>(&self, f: impl Fn(&V) -> Result<W>) -> Result<Values<W>> {
        Ok(Values {
            u: f(&self.u)?,
            delta: f(&self.delta)?,
            a: f(&self.a)?,
            b: f(&self.b)?,
            c: f(&self.c)?,
            d: self.d.as_ref().map(&f).transpose()?,
            z: self.z.as_ref().map(&f).transpose()?,
            delta_bias: self.delta_bias.as_ref().map(&f).transpose()?,
            delta_softplus: self.delta_softplus,
            state: self.state.as_ref().map(&f).transpose()?,
        })
    }
}

impl Values<Tensor> {
    /// Runs `f` on the arguments as the CPU code wants them.
    fn with<R>(
        &self,
        sequences: &Sequences,
        f: impl FnOnce(&Arguments<'_, f32>) -> Result<R>,
    ) -> Result<R> {
        fn flat(tensor: &Option<Tensor>) -> Result<Option<&[f32]>> {
            tensor.as_ref().map(Tensor::data).transpose()
        }
        fn rows(tensor: &Option<Tensor>) -> Result<Option<RowView<'_, f32>>> {
            tensor.as_ref().map(Tensor::row_view).transpose()
        }
        let a = self.a.contiguous()?;
        let projection = |tensor: &Tensor| {
            if tensor.shape() == a.shape() { tensor.contiguous() } else { by_rows(tensor) }
        };
        let (b, c) = (projection(&self.b)?, projection(&self.c)?);
        fn project<'t>(tensor: &'t Tensor, a: &Tensor) -> Result<Projection<'t, f32>> {
            Ok(if tensor.shape() == a.shape() {
                Projection::Constant(tensor.data()?)
            } else {
                Projection::Token { rows: tensor.row_view()?, groups: tensor.dim(1) }
            })
        }
        let (u, delta) = (by_rows(&self.u)?, by_rows(&self.delta)?);
        let z = self.z.as_ref().map(by_rows).transpose()?;
        let d = self.d.as_ref().map(Tensor::contiguous).transpose()?;
        let delta_bias = self.delta_bias.as_ref().map(Tensor::contiguous).transpose()?;
        let state = self.state.as_ref().map(Tensor::contiguous).transpose()?;
        f(&Arguments {
            channels: a.dim(0),
            states: a.dim(1),
            complex: a.rank() == 3,
            u: u.row_view()?,
            delta: delta.row_view()?,
            a: a.data()?,
            b: project(&b, &a)?,
            c: project(&c, &a)?,
            d: flat(&d)?,
            z: rows(&z)?,
            delta_bias: flat(&delta_bias)?,
            delta_softplus: self.delta_softplus,
            h0: flat(&state)?,
            sequences,
        })
    }

    fn gradients(
        &self,
        context: &mut Backward,
        sequences: &Sequences,
        chunk_states: &[f32],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = match context.take_grad(0) {
            Some(dy) => by_rows(&dy)?,
            None => Tensor::zeros::<f32>(self.u.shape()),
        };
        let dlast = context.take_grad(1).map(|dlast| dlast.contiguous()).transpose()?;
        self.with(sequences, |x| {
            let dlast = dlast.as_ref().map(Tensor::data).transpose()?;
            let grad = backward_cpu(x, chunk_states, dy.row_view()?, dlast);
            let all = [
                (Some(&self.u), grad.u),
                (Some(&self.delta), grad.delta),
                (Some(&self.a), grad.a),
                (Some(&self.b), grad.b),
                (Some(&self.c), grad.c),
                (self.d.as_ref(), grad.d),
                (self.z.as_ref(), grad.z),
                (self.delta_bias.as_ref(), grad.delta_bias),
                (self.state.as_ref(), grad.h0),
            ];
            all.into_iter()
                .filter_map(|(tensor, grad)| Some((tensor?.shape(), grad)))
                .map(|(shape, grad)| Tensor::from_buffer(grad, shape).map(Some))
                .collect()
        })
    }
}
