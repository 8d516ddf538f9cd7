//! The computation of a Mamba language model in plain f64 loops, each module from the activations that the pass had
//! before it: so an error shows where it is made, not where it ends, and layers are looked at side by side.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use elapid_formats::{ModelSource, StoredTensor};
use elapid_models::MambaConfig;
use elapid_ops::blocks::Encoding;
use elapid_ops::quantized_linear::rounding_block;
use elapid_tensor::{DType, Tensor};
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

use super::{Checked, Rows, Trace};
use crate::{Error, Result};

/// Differences that rounding explains, as a share of the sum of magnitudes.
fn tolerance(compute: DType) -> f64 {
    match compute {
        // Inputs, weights and outputs have eight bits.
        DType::BF16 => 2e-2,
        _ => 2e-5,
    }
}

/// Parameters by their names in the Hugging Face layout, as f32.
pub(crate) trait Parameters: Sync {
    /// Number of elements; none if there is no such parameter.
    fn elements(&self, name: &str) -> Option<usize>;

    /// Elements of one that is there.
    ///
    /// # Errors
    /// If they cannot be read.
    fn read(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [f32]>>;

    /// How the weight of a product is stored, which says how its inputs are rounded.
    fn encoding(&self, _name: &str) -> Encoding {
        Encoding::F32
    }
}

impl Parameters for BTreeMap<String, Tensor> {
    fn elements(&self, name: &str) -> Option<usize> {
        self.get(name).map(Tensor::elements)
    }

    fn read(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let values = self.get(name).ok_or_else(|| missing(name))?.data::<f32>()?;
        Ok(Cow::Borrowed(&values[range]))
    }
}

impl Parameters for &ModelSource {
    fn elements(&self, name: &str) -> Option<usize> {
        self.get(name).map(StoredTensor::elements)
    }

    fn read(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let tensor = self.get(name).ok_or_else(|| missing(name))?;
        Ok(Cow::Owned(tensor.read_part(range)?))
    }
}

pub(crate) struct Reference<'a> {
    config: &'a MambaConfig,
    weights: &'a dyn Parameters,
    trace: &'a Trace,
    tolerance: f64,
    rows: Rows,
    layer: usize,
    pub checked: Checked,
}

impl<'a> Reference<'a> {
    pub(crate) fn new(
        config: &'a MambaConfig,
        weights: &'a dyn Parameters,
        trace: &'a Trace,
        compute: DType,
        rows: Rows,
    ) -> Self {
        let tolerance = tolerance(compute);
        Self { config, weights, trace, tolerance, rows, layer: 0, checked: Checked::default() }
    }

    pub(crate) fn run(&mut self, tokens: &[u32]) -> Result<()> {
        self.embeddings(tokens)?;
        // Each layer starts from what the pass had there, so none waits for another.
        let start = &*self;
        let layers: Vec<Result<Checked>> = (0..self.config.n_layer)
            .into_par_iter()
            .map(|layer| {
                let mut own = Self { checked: Checked::default(), ..*start };
                own.layer(layer)?;
                Ok(own.checked)
            })
            .collect();
        // The first that is wrong is told.
        for layer in layers {
            self.checked.add(layer?);
        }
        self.head()
    }

    pub(crate) fn embeddings(&mut self, tokens: &[u32]) -> Result<()> {
        let d = self.config.d_model;
        let found = (EMBEDDINGS, self.values(EMBEDDINGS)?);
        for (t, id) in tokens.iter().enumerate() {
            let row = self.part(EMBEDDINGS_WEIGHT, *id as usize * d..(*id as usize + 1) * d)?;
            for c in 0..d {
                let expected = f64::from(row[c]);
                self.same(EMBEDDINGS_WEIGHT, found, t * d + c, expected, expected.abs())?;
            }
        }
        Ok(())
    }

    pub(crate) fn layer(&mut self, layer: usize) -> Result<()> {
        self.layer = layer;
        let prefix = layer_name(layer);
        let residual = format!("{prefix}.residual");
        let (before, hidden) = before_layer(layer);
        self.sum(&residual, before.as_deref(), &hidden)?;
        self.norm(&format!("{prefix}.norm"), &residual)?;
        self.mixer(&prefix)
    }

    pub(crate) fn head(&mut self) -> Result<()> {
        self.layer = 0;
        let (residual, hidden) = before_layer(self.config.n_layer);
        self.last_norm(residual.as_deref(), &hidden)?;
        let head = match self.config.tie_embeddings {
            true => EMBEDDINGS_WEIGHT,
            false => "lm_head.weight",
        };
        // The head computes in f32 on every device, from what the last norm gave.
        let last = self.values("backbone.norm_f")?;
        self.linear(head, None, last, self.config.d_model, "logits")
    }

    /// A whole parameter.
    fn weight(&self, name: &str) -> Result<Cow<'a, [f32]>> {
        self.part(name, 0..self.elements(name)?)
    }

    fn part(&self, name: &str, range: Range<usize>) -> Result<Cow<'a, [f32]>> {
        if range.end > self.elements(name)? {
            return Err(missing(name));
        }
        self.weights.read(name, range)
    }

    fn elements(&self, name: &str) -> Result<usize> {
        self.weights.elements(name).ok_or_else(|| missing(name))
    }

    /// A parameter that not every model has.
    fn optional(&self, name: &str) -> Result<Option<Cow<'a, [f32]>>> {
        self.weights.elements(name).map(|count| self.weights.read(name, 0..count)).transpose()
    }

    fn values(&self, name: &str) -> Result<&'a [f64]> {
        self.trace.get(name).map(Vec::as_slice).ok_or_else(|| missing(name))
    }

    /// Compares one of the `values` of an activation; `size` is the sum of the magnitudes that it was made of.
    fn same(
        &mut self,
        tensor: &str,
        (activation, values): (&str, &[f64]),
        index: usize,
        expected: f64,
        size: f64,
    ) -> Result<()> {
        let found = values.get(index).copied().unwrap_or(f64::NAN);
        let (off, most) = ((found - expected).abs(), self.tolerance * size + 1e-30);
        self.checked.values += 1;
        // A NaN on either side is not below anything.
        if off <= most {
            if off > self.checked.worst * most {
                self.checked.worst = off / most;
            }
            return Ok(());
        }
        Err(Error::SelfCheck {
            tensor: tensor.into(),
            place: format!("{activation}[{index}]"),
            expected,
            found,
        })
    }

    /// The residual stream.
    fn sum(&mut self, output: &str, residual: Option<&str>, hidden: &str) -> Result<()> {
        let x = self.values(hidden)?;
        let none = vec![0.0; x.len()];
        let residual = residual.map_or(Ok(none.as_slice()), |name| self.values(name))?;
        let found = (output, self.values(output)?);
        for (i, (x, r)) in x.iter().zip(residual).enumerate() {
            self.same(output, found, i, x + r, x.abs() + r.abs())?;
        }
        Ok(())
    }

    /// RMSNorm, or LayerNorm where there is a bias, of an activation.
    fn norm(&mut self, name: &str, input: &str) -> Result<()> {
        let x = self.values(input)?.to_vec();
        self.norm_of(name, &x)
    }

    /// The last norm's input is not shown: it is the sum of what is.
    fn last_norm(&mut self, residual: Option<&str>, hidden: &str) -> Result<()> {
        let mut x = self.values(hidden)?.to_vec();
        if let Some(residual) = residual {
            x.iter_mut().zip(self.values(residual)?).for_each(|(x, r)| *x += r);
        }
        self.norm_of("backbone.norm_f", &x)
    }

    fn norm_of(&mut self, name: &str, x: &[f64]) -> Result<()> {
        let d = self.config.d_model;
        let weight_name = format!("{name}.weight");
        let weight = self.weight(&weight_name)?;
        let bias = self.optional(&format!("{name}.bias"))?;
        let found = (name, self.values(name)?);
        for (t, x) in x.chunks(d).enumerate() {
            let mean = bias.as_ref().map_or(0.0, |_| x.iter().sum::<f64>() / d as f64);
            let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            let scale = 1.0 / (square + self.config.norm_eps).sqrt();
            for (c, x) in x.iter().enumerate() {
                let normed = (x - mean) * scale * f64::from(weight[c]);
                let b = bias.as_ref().map_or(0.0, |bias| f64::from(bias[c]));
                let size = (x.abs() + mean.abs()) * scale * f64::from(weight[c]).abs() + b.abs();
                // Each value is as exact as the norm of all is.
                self.same(&weight_name, found, t * d + c, normed + b, size + 1e-6)?;
            }
        }
        Ok(())
    }

    /// Some rows of a product with an input [T, width].
    fn linear(
        &mut self,
        weight_name: &str,
        bias_name: Option<&str>,
        input: &[f64],
        width: usize,
        output: &str,
    ) -> Result<()> {
        let bias = bias_name.map_or(Ok(None), |name| self.optional(name))?;
        let count = self.elements(weight_name)? / width;
        let found = (output, self.values(output)?);
        let rounded = rounded(input, width, rounding_block(self.weights.encoding(weight_name)));
        for row in self.rows.of(count, self.layer) {
            let w = self.part(weight_name, row * width..(row + 1) * width)?;
            let b = bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
            for (t, x) in rounded.chunks(width).enumerate() {
                let (sum, size) = dot(&w, x);
                self.same(weight_name, found, t * count + row, b + sum, b.abs() + size)?;
            }
        }
        Ok(())
    }

    fn mixer(&mut self, prefix: &str) -> Result<()> {
        let (d, e, r) = (self.config.d_model, self.config.d_inner(), self.config.dt_rank());
        let name = |field: &str| format!("{prefix}.mixer.{field}");
        let weight = |module: &str| format!("{prefix}.mixer.{module}.weight");
        let normed = self.values(&format!("{prefix}.norm"))?;
        let bias = name("in_proj.bias");
        self.linear(&weight("in_proj"), Some(&bias), normed, d, &name("in_proj"))?;
        self.convolution(&name("in_proj"), &name("conv1d"))?;
        let u = self.values(&name("conv1d"))?;
        self.linear(&weight("x_proj"), None, u, e, &name("x_proj"))?;
        let parts = self.parts(&name("x_proj"))?;
        // Where the projection of Δ is part of the scan, its values are not shown.
        if self.trace.contains_key(&name("dt_proj")) {
            let dt: Vec<f64> = parts.iter().flat_map(|[dt, ..]| dt.iter().copied()).collect();
            self.linear(&weight("dt_proj"), None, &dt, r, &name("dt_proj"))?;
        }
        self.scan(prefix, &parts)?;
        let y = self.values(&name("scan"))?;
        self.linear(&weight("out_proj"), Some(&name("out_proj.bias")), y, e, &name("out_proj"))
    }

    /// Δ's low rank, B and C of each token, normalised in FalconMamba.
    fn parts(&self, x_proj: &str) -> Result<Vec<[Vec<f64>; 3]>> {
        let (n, r) = (self.config.d_state, self.config.dt_rank());
        let values = self.values(x_proj)?;
        let eps = self.config.mixer_rms_eps;
        let norm = |part: &[f64]| -> Vec<f64> {
            let Some(eps) = eps else { return part.to_vec() };
            let square = part.iter().map(|x| x * x).sum::<f64>() / part.len() as f64;
            part.iter().map(|x| x / (square + eps).sqrt()).collect()
        };
        let rows = values.chunks_exact(r + 2 * n);
        Ok(rows.map(|row| [&row[..r], &row[r..r + n], &row[r + n..]].map(norm)).collect())
    }

    /// silu(conv(x)) of the first half of what the input projection gave. A state of fewer channels repeats.
    fn convolution(&mut self, input: &str, output: &str) -> Result<()> {
        let (e, taps) = (self.config.d_inner(), self.config.d_conv);
        let weight_name = format!("{output}.weight");
        let bias = self.optional(&format!("{output}.bias"))?;
        let x = self.values(input)?;
        let before = self.trace.get(&output.replace("conv1d", "conv_state"));
        let found = (output, self.values(output)?);
        for c in self.rows.of(e, self.layer) {
            let weight = self.part(&weight_name, c * taps..(c + 1) * taps)?;
            let b = bias.as_ref().map_or(0.0, |bias| f64::from(bias[c]));
            for t in 0..x.len() / (2 * e) {
                let (mut sum, mut size) = (b, b.abs());
                for back in 0..taps {
                    let x = match (t.checked_sub(back), before) {
                        (Some(t), _) => x[t * 2 * e + c],
                        // The state ends with the token before the first.
                        (None, Some(state)) => {
                            let own = c % (state.len() / (taps - 1));
                            state[(own + 1) * (taps - 1) + t - back]
                        }
                        (None, None) => break,
                    };
                    // The last tap meets the present token.
                    let product = f64::from(weight[taps - 1 - back]) * x;
                    sum += product;
                    size += product.abs();
                }
                self.same(&weight_name, found, t * e + c, silu(sum), size)?;
            }
        }
        Ok(())
    }

    /// h = exp(Δ A) h + Δ B u; y = (C h + D u) silu(z). A state of fewer channels repeats.
    fn scan(&mut self, prefix: &str, parts: &[[Vec<f64>; 3]]) -> Result<()> {
        let (e, n, r) = (self.config.d_inner(), self.config.d_state, self.config.dt_rank());
        let name = |field: &str| format!("{prefix}.mixer.{field}");
        let a_log_name = name("A_log");
        let skip = self.weight(&name("D"))?;
        let dt_bias = self.optional(&name("dt_proj.bias"))?;
        let u = self.values(&name("conv1d"))?;
        let projected = self.trace.get(&name("dt_proj"));
        let before = self.trace.get(&name("ssm_state"));
        let xz = self.values(&name("in_proj"))?;
        let output = name("scan");
        let found = (output.as_str(), self.values(&output)?);
        for c in self.rows.of(e, self.layer) {
            let a_log = self.part(&a_log_name, c * n..(c + 1) * n)?;
            let dt_weight = match projected {
                Some(_) => None,
                None => Some(self.part(&name("dt_proj.weight"), c * r..(c + 1) * r)?),
            };
            let mut h = before
                .map_or(vec![0.0; n], |state| state[c % (state.len() / n) * n..][..n].to_vec());
            let mut sizes: Vec<f64> = h.iter().map(|h| h.abs()).collect();
            for (t, [dt, b, into]) in parts.iter().enumerate() {
                let mut step = dt_bias.as_ref().map_or(0.0, |bias| f64::from(bias[c]));
                // An error of Δ is a share of what it was added up from.
                let mut share = 1.0;
                match (&dt_weight, projected) {
                    (Some(weight), _) => {
                        share += step.abs();
                        for (w, dt) in weight.iter().zip(dt) {
                            step += f64::from(*w) * dt;
                            share += (f64::from(*w) * dt).abs();
                        }
                    }
                    (None, Some(delta)) => step += delta[t * e + c],
                    (None, None) => {}
                }
                let step = if step > 20.0 { step } else { step.exp().ln_1p() };
                let u = u[t * e + c];
                let mut y = f64::from(skip[c]) * u;
                let mut size = y.abs();
                for s in 0..n {
                    let decay = (-f64::from(a_log[s]).exp() * step).exp();
                    h[s] = decay * h[s] + step * b[s] * u;
                    sizes[s] = share * (decay * sizes[s] + (step * b[s] * u).abs());
                    y += into[s] * h[s];
                    size += (into[s] * sizes[s]).abs();
                }
                let gate = silu(xz[t * 2 * e + e + c]);
                self.same(&a_log_name, found, t * e + c, y * gate, size * gate.abs())?;
            }
        }
        Ok(())
    }
}

const EMBEDDINGS: &str = "backbone.embeddings";
const EMBEDDINGS_WEIGHT: &str = "backbone.embeddings.weight";

pub(crate) fn layer_name(layer: usize) -> String {
    format!("backbone.layers.{layer}")
}

/// Names of what a layer adds up: the residual stream before it, but for the first, and what came last.
fn before_layer(layer: usize) -> (Option<String>, String) {
    match layer.checked_sub(1).map(layer_name) {
        None => (None, EMBEDDINGS.into()),
        Some(last) => (Some(format!("{last}.residual")), format!("{last}.mixer.out_proj")),
    }
}

/// The sum of products, and that of their magnitudes.
fn dot(w: &[f32], x: &[f64]) -> (f64, f64) {
    Arch::new().dispatch(Dot { w, x })
}

struct Dot<'a> {
    w: &'a [f32],
    x: &'a [f64],
}

impl NullaryFnOnce for Dot<'_> {
    type Output = (f64, f64);

    #[inline(always)]
    fn call(self) -> (f64, f64) {
        // Sums that do not wait for each other.
        const LANES: usize = 8;
        let (mut sums, mut sizes) = ([0.0; LANES], [0.0; LANES]);
        let (w, w_end) = self.w.as_chunks::<LANES>();
        let (x, x_end) = self.x.as_chunks::<LANES>();
        for (w, x) in w.iter().zip(x) {
            for lane in 0..LANES {
                let product = f64::from(w[lane]) * x[lane];
                sums[lane] += product;
                sizes[lane] += product.abs();
            }
        }
        for (lane, (w, x)) in w_end.iter().zip(x_end).enumerate() {
            let product = f64::from(*w) * x;
            sums[lane] += product;
            sizes[lane] += product.abs();
        }
        (sums.iter().sum(), sizes.iter().sum())
    }
}

/// Rows of inputs as a product takes them: rounded to eight bits under the scale of each block, ties to even; as
/// they are for blocks of 0.
fn rounded(x: &[f64], width: usize, block: usize) -> Cow<'_, [f64]> {
    if block == 0 {
        return Cow::Borrowed(x);
    }
    let mut values = vec![0.0; x.len()];
    Arch::new().dispatch(Rounding { x, width, block, values: &mut values });
    Cow::Owned(values)
}

struct Rounding<'a> {
    x: &'a [f64],
    width: usize,
    block: usize,
    values: &'a mut [f64],
}

impl NullaryFnOnce for Rounding<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { x, width, block, values } = self;
        for (x, values) in x.chunks(width).zip(values.chunks_mut(width)) {
            for (x, values) in x.chunks(block).zip(values.chunks_mut(block)) {
                let mut largest = 0.0f32;
                for x in x {
                    largest = largest.max(x.abs() as f32);
                }
                let (scale, inverse) = (largest / 127.0, 127.0 / largest);
                let (scale, inverse) =
                    if inverse.is_finite() { (scale, inverse) } else { (0.0, 0.0) };
                for (x, value) in x.iter().zip(values) {
                    let rounded = (*x as f32 * inverse).round_ties_even();
                    *value = f64::from(rounded) * f64::from(scale);
                }
            }
        }
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// A model whose parts are not those of the reference.
fn missing(name: &str) -> Error {
    Error::SelfCheck {
        tensor: name.into(),
        place: "the pass".into(),
        expected: f64::NAN,
        found: f64::NAN,
    }
}
