//! One step of a Mamba language model in plain f64 loops (arXiv 2312.00752, section 3.4 and algorithm 2, with L = 1).
//! What the kernels hand to one another in bf16 is rounded to it here too.

use elapid_tensor::DType;

use super::Sizes;

/// The parameters of a layer, row by row.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// Scale and bias of the norm.
    pub norm: [Vec<f64>; 2],
    pub input: Vec<f64>,
    pub input_bias: Vec<f64>,
    pub taps: Vec<f64>,
    pub tap_bias: Vec<f64>,
    pub selection: Vec<f64>,
    pub delta: Vec<f64>,
    pub delta_bias: Vec<f64>,
    pub a: Vec<f64>,
    pub d: Vec<f64>,
    pub output: Vec<f64>,
    pub output_bias: Vec<f64>,
}

/// The parameters of a model.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub sizes: Sizes,
    pub embedding: Vec<f64>,
    pub layers: Vec<Layer>,
    pub norm: [Vec<f64>; 2],
}

/// Tail [E, W - 1] and state [E, N] of each layer.
pub(super) type State = Vec<(Vec<f64>, Vec<f64>)>;

fn product(weights: &[f64], x: &[f64]) -> Vec<f64> {
    weights.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Rounded to bf16.
fn kept(x: f64) -> f64 {
    f64::from(elapid_tensor::bf16::from_f32(x as f32).to_f32())
}

fn norm(x: &[f64], weights: &[Vec<f64>; 2], sizes: &Sizes) -> Vec<f64> {
    let count = x.len() as f64;
    let mean = if sizes.centred { x.iter().sum::<f64>() / count } else { 0.0 };
    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    let factor = 1.0 / (square + f64::from(sizes.eps)).sqrt();
    let [weight, bias] = weights;
    match sizes.centred {
        true => (0..x.len()).map(|i| kept((x[i] - mean) * factor * weight[i] + bias[i])).collect(),
        // RMSNorm's factor comes after the product.
        false => (0..x.len()).map(|i| kept(x[i] * weight[i]) * factor).collect(),
    }
}

fn add(values: &mut [f64], terms: &[f64]) {
    values.iter_mut().zip(terms).for_each(|(value, term)| *value += term);
}

impl Model {
    /// The state of a sequence that has seen nothing.
    pub fn fresh(&self) -> State {
        let Sizes { inner, taps, states, .. } = self.sizes;
        self.layers
            .iter()
            .map(|_| (vec![0.0; inner * (taps - 1)], vec![0.0; inner * states]))
            .collect()
    }

    /// Logits [V] after a token.
    pub fn step(&self, id: usize, state: &mut State) -> Vec<f64> {
        let width = self.sizes.width;
        let mut residual = self.embedding[id * width..(id + 1) * width].to_vec();
        for (layer, state) in self.layers.iter().zip(state) {
            let y = layer.mix(&self.sizes, &norm(&residual, &layer.norm, &self.sizes), state);
            add(&mut residual, &y);
        }
        product(&self.embedding, &norm(&residual, &self.norm, &self.sizes))
    }
}

impl Layer {
    fn mix(&self, sizes: &Sizes, x: &[f64], (tail, h): &mut (Vec<f64>, Vec<f64>)) -> Vec<f64> {
        let Sizes { inner, states, rank, taps, .. } = *sizes;
        let mut xz = product(&self.input, x);
        add(&mut xz, &self.input_bias);
        let (x, z) = xz.split_at(inner);
        let u: Vec<f64> = (0..inner)
            .map(|e| {
                let tail = &mut tail[e * (taps - 1)..(e + 1) * (taps - 1)];
                let inputs: Vec<f64> = tail.iter().copied().chain([x[e]]).collect();
                let weights = &self.taps[e * taps..(e + 1) * taps];
                tail.copy_from_slice(&inputs[1..]);
                let sum = inputs.iter().zip(weights).map(|(x, w)| x * w).sum::<f64>();
                kept(silu(self.tap_bias[e] + sum))
            })
            .collect();
        let mut selection = product(&self.selection, &u);
        if let Some(eps) = sizes.selection_eps {
            let mut start = 0;
            for len in [rank, states, states] {
                let part = &mut selection[start..start + len];
                let square = part.iter().map(|x| x * x).sum::<f64>() / len as f64;
                part.iter_mut().for_each(|x| *x /= (square + f64::from(eps)).sqrt());
                start += len;
            }
        }
        let (dt, bc) = selection.split_at(rank);
        let (b, c) = bc.split_at(states);
        let dt: Vec<f64> = dt.iter().map(|&dt| kept(dt)).collect();
        let mut delta = product(&self.delta, &dt);
        add(&mut delta, &self.delta_bias);
        let y: Vec<f64> = (0..inner)
            .map(|e| {
                let delta = delta[e].exp().ln_1p();
                let mut y = self.d[e] * u[e];
                for n in 0..states {
                    let h = &mut h[e * states + n];
                    let next = (delta * self.a[e * states + n]).exp() * *h + delta * b[n] * u[e];
                    y += c[n] * next;
                    *h = if sizes.state == DType::BF16 { kept(next) } else { next };
                }
                kept(y * kept(silu(z[e])))
            })
            .collect();
        let mut y = product(&self.output, &y);
        add(&mut y, &self.output_bias);
        y
    }
}
