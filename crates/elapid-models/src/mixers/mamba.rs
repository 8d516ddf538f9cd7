//! The Mamba mixer (S6; arXiv 2312.00752, section 3.4 and algorithm 2).
//!
//! ```text
//! x, z      = split(W_in · input)                          [T, E] each
//! u         = silu(causal_conv1d(x))                       [T, E]
//! dt, B, C  = split(W_x · u)                               [T, R], [T, N], [T, N]
//! Δ         = softplus(W_dt · dt + dt_bias)                [T, E]
//! h_t       = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t             [E, N]
//! y_t       = C_t · h_t + D u_t
//! output    = W_out · (y ⊙ silu(z))                        [T, D]
//! ```
//!
//! In FalconMamba dt, B and C are normalised before they are used (RMS without weights; arXiv 2410.05355).
//! u, W_dt · dt and, on a GPU, y ⊙ silu(z) are made again in backward rather than kept (section 3.3.2), unless the
//! context says otherwise: they are cheap, and as wide as everything else that a layer keeps.

use std::borrow::Cow;

use elapid_ops::causal_conv1d::{Activation, causal_conv1d};
use elapid_ops::elementwise::neg_exp;
use elapid_ops::matmul::linear;
use elapid_ops::norm::rms_norm;
use elapid_ops::selective_scan::{self, selective_scan, selective_scan_linear};
use elapid_tensor::autograd::{no_grad, rematerialize};
use elapid_tensor::{DType, Sequences, Shape, Tensor};

use super::SequenceMixer;
use crate::initialize::Initializer;
use crate::parameter::Visitor;
use crate::{Context, Kind, LayerState, Linear, MambaConfig, Parameter, Result};

const CONV_STATE: &str = "conv_state";
const SSM_STATE: &str = "ssm_state";

/// One Mamba mixer.
pub struct Mamba {
    in_proj: Linear,
    conv_weight: Tensor,
    conv_bias: Option<Tensor>,
    x_proj: Linear,
    dt_proj: Linear,
    a_log: Tensor,
    /// A = -exp(A_log) of a mixer that only runs.
    a: Option<Tensor>,
    d: Tensor,
    out_proj: Linear,
    d_inner: usize,
    d_state: usize,
    d_conv: usize,
    dt_rank: usize,
    /// Of the norms of dt, B and C, if there are such.
    rms_eps: Option<f32>,
}

impl Mamba {
    /// A mixer with the initial values of the original code; `prefix` keys the random draws.
    ///
    /// # Errors
    /// If the configuration's sizes do not make tensors.
    pub fn new(config: &MambaConfig, prefix: &str, init: &Initializer) -> Result<Self> {
        let (d, e, n, w, r) =
            (config.d_model, config.d_inner(), config.d_state, config.d_conv, config.dt_rank());
        let name = |field: &str| format!("{prefix}.{field}");
        let fan_in = |fan: usize| 1.0 / (fan as f64).sqrt();
        let out_scale = fan_in(e) / (config.n_layer as f64).sqrt();
        let bias = |width: usize| config.bias.then(|| init.constant(0.0, &[width])).transpose();
        let dt_size = (r as f64).powf(-0.5) * config.dt_scale;
        Ok(Self {
            in_proj: Linear {
                weight: init.uniform(&name("in_proj.weight"), fan_in(d), &[2 * e, d])?,
                bias: bias(2 * e)?,
            },
            conv_weight: init.uniform(&name("conv1d.weight"), fan_in(w), &[e, w])?,
            conv_bias: config
                .conv_bias
                .then(|| init.uniform(&name("conv1d.bias"), fan_in(w), &[e]))
                .transpose()?,
            x_proj: Linear {
                weight: init.uniform(&name("x_proj.weight"), fan_in(e), &[r + 2 * n, e])?,
                bias: None,
            },
            dt_proj: Linear {
                weight: match config.dt_init {
                    crate::DtInit::Random => {
                        init.uniform(&name("dt_proj.weight"), dt_size, &[e, r])?
                    }
                    crate::DtInit::Constant => init.constant(dt_size, &[e, r])?,
                },
                bias: Some(init.dt_bias(&name("dt_proj.bias"), config)?),
            },
            a_log: init.a_log(e, n)?,
            a: None,
            d: init.constant(1.0, &[e])?,
            out_proj: Linear {
                weight: init.uniform(&name("out_proj.weight"), out_scale, &[d, e])?,
                bias: bias(d)?,
            },
            d_inner: e,
            d_state: n,
            d_conv: w,
            dt_rank: r,
            rms_eps: config.mixer_rms_eps.map(|eps| eps as f32),
        })
    }
}

impl SequenceMixer for Mamba {
    fn forward(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        state: Option<LayerState>,
        context: &mut Context<'_>,
    ) -> Result<(Tensor, LayerState)> {
        let (conv_in, ssm_in) = match state {
            Some(mut state) => (Some(state.take(CONV_STATE)?), Some(state.take(SSM_STATE)?)),
            None => (None, None),
        };
        let xz = linear(x, &self.in_proj.weight, self.in_proj.bias.as_ref())?;
        context.tap("in_proj", &xz);
        let mut halves = xz.split(1, &[self.d_inner, self.d_inner])?;
        drop(xz);
        let (z, x) = (halves.remove(1), halves.remove(0));

        let (u, conv_state) = self.convolve(&x, sequences, conv_in, context.recompute())?;
        context.tap("conv1d", &u);
        let x_dbl = linear(&u, &self.x_proj.weight, None)?;
        context.tap("x_proj", &x_dbl);
        let mut parts = x_dbl.split(1, &[self.dt_rank, self.d_state, self.d_state])?;
        if let Some(eps) = self.rms_eps {
            for part in &mut parts {
                *part = rms_norm(part, None, None, eps)?.0;
            }
        }
        let delta = match context.recompute() {
            false => linear(&parts[0], &self.dt_proj.weight, None)?,
            true => rematerialize(&[&parts[0], &self.dt_proj.weight], |inputs| {
                Ok(vec![linear(&inputs[0], &inputs[1], None)?])
            })?
            .swap_remove(0),
        };
        context.tap("dt_proj", &delta);

        let a = match &self.a {
            Some(a) => a.clone(),
            None => neg_exp(&self.a_log)?,
        };
        let (b, c) = (parts[1].unsqueeze(1)?, parts[2].unsqueeze(1)?);
        let inputs = selective_scan::Inputs {
            u: &u,
            delta: &delta,
            a: &a,
            b: &b,
            c: &c,
            d: Some(&self.d),
            z: Some(&z),
            delta_bias: self.dt_proj.bias.as_ref(),
            delta_softplus: true,
            state: ssm_in.as_ref(),
        };
        let (weight, bias) = (&self.out_proj.weight, self.out_proj.bias.as_ref());
        let (y, output, ssm_state) = match context.recompute() {
            true => {
                let found = selective_scan_linear(&inputs, weight, bias, sequences)?;
                (found.y, found.output, found.state)
            }
            false => {
                let (y, state) = selective_scan(&inputs, sequences)?;
                let output = linear(&y, weight, bias)?;
                (y, output, state)
            }
        };
        context.tap("scan", &y);
        context.tap("out_proj", &output);
        let state = LayerState::new([
            (Cow::Borrowed(CONV_STATE), conv_state),
            (Cow::Borrowed(SSM_STATE), ssm_state),
        ]);
        Ok((output, state))
    }

    fn state_shapes(&self, slots: usize) -> Vec<(&'static str, Shape)> {
        vec![
            (CONV_STATE, Shape::new(&[slots, self.d_inner, self.d_conv - 1])),
            (SSM_STATE, Shape::new(&[slots, self.d_inner, self.d_state])),
        ]
    }

    fn run_only(&mut self, compute: DType) -> Result<()> {
        self.a = Some(no_grad(|| neg_exp(&self.a_log))?);
        [&mut self.in_proj, &mut self.x_proj, &mut self.dt_proj, &mut self.out_proj]
            .into_iter()
            .try_for_each(|projection| projection.keep_in(compute))
    }

    fn visit(&mut self, prefix: &str, visitor: &mut Visitor<'_>) -> Result<()> {
        // The visitor may change A_log.
        self.a = None;
        let name = |field: &str| format!("{prefix}.{field}");
        for (field, tensor, kind) in
            [("A_log", &mut self.a_log, Kind::Recurrence), ("D", &mut self.d, Kind::Skip)]
        {
            visitor(Parameter { name: name(field), tensor, kind, decay: false })?;
        }
        self.in_proj.visit(&name("in_proj"), visitor)?;
        visitor(Parameter {
            name: name("conv1d.weight"),
            tensor: &mut self.conv_weight,
            kind: Kind::Convolution,
            decay: true,
        })?;
        if let Some(bias) = &mut self.conv_bias {
            visitor(Parameter {
                name: name("conv1d.bias"),
                tensor: bias,
                kind: Kind::Bias,
                decay: false,
            })?;
        }
        self.x_proj.visit(&name("x_proj"), visitor)?;
        self.dt_proj.visit(&name("dt_proj"), &mut |parameter| {
            visitor(Parameter { kind: Kind::DeltaProjection, ..parameter })
        })?;
        self.out_proj.visit(&name("out_proj"), visitor)
    }
}

impl Mamba {
    /// u = silu(conv(x)), kept as a recipe or as values, and the last W-1 inputs of each sequence.
    fn convolve(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        state: Option<Tensor>,
        recompute: bool,
    ) -> Result<(Tensor, Tensor)> {
        if !recompute {
            let (weight, bias) = (&self.conv_weight, self.conv_bias.as_ref());
            let silu = Activation::Silu;
            return Ok(causal_conv1d(x, weight, bias, silu, sequences, state.as_ref())?);
        }
        let mut inputs = vec![x, &self.conv_weight];
        inputs.extend(self.conv_bias.as_ref());
        let with_bias = self.conv_bias.is_some();
        if let Some(state) = &state {
            inputs.push(state);
        }
        let with_state = state.is_some();
        let sequences = sequences.clone();
        let mut outputs = rematerialize(&inputs, move |inputs| {
            let bias = with_bias.then(|| &inputs[2]);
            let state = with_state.then(|| &inputs[inputs.len() - 1]);
            let (u, state) =
                causal_conv1d(&inputs[0], &inputs[1], bias, Activation::Silu, &sequences, state)?;
            Ok(vec![u, state])
        })?;
        let conv_state = outputs.swap_remove(1);
        Ok((outputs.swap_remove(0), conv_state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixer_that_only_runs_computes_the_same_and_sees_changed_parameters() {
        let config = MambaConfig { bias: true, ..MambaConfig::bytes(16, 1) };
        let mut mixer = Mamba::new(&config, "mixer", &Initializer::new(3)).unwrap();
        let x: Vec<f32> = (0..80u8).map(|i| f32::from(i % 7) - 3.0).collect();
        let x = Tensor::from_slice(&x, [5, 16]).unwrap();
        let run = |mixer: &Mamba| {
            let sequences = Sequences::fresh(&[5]);
            let (y, _) = mixer.forward(&x, &sequences, None, &mut Context::new()).unwrap();
            y.to_vec::<f32>().unwrap()
        };
        let before = run(&mixer);
        mixer.run_only(DType::F32).unwrap();
        assert_eq!(run(&mixer), before);
        let mut change = |parameter: Parameter<'_>| {
            if parameter.kind == Kind::Recurrence {
                *parameter.tensor = neg_exp(&parameter.tensor.detach())?;
            }
            Ok(())
        };
        mixer.visit("mixer", &mut change).unwrap();
        assert_ne!(run(&mixer), before);
    }

    #[test]
    fn retention_is_set_by_the_projection_to_delta_and_the_decay_alone() {
        let config = MambaConfig { bias: true, ..MambaConfig::bytes(16, 1) };
        let mut mixer = Mamba::new(&config, "mixer", &Initializer::zeros()).unwrap();
        let mut found = Vec::new();
        mixer
            .visit("mixer", &mut |parameter| {
                if parameter.kind.sets_retention() {
                    found.push((parameter.name, parameter.decay));
                }
                Ok(())
            })
            .unwrap();
        let expected = [("A_log", false), ("dt_proj.weight", true), ("dt_proj.bias", false)];
        assert_eq!(found, expected.map(|(field, decay)| (format!("mixer.{field}"), decay)));
    }
}
