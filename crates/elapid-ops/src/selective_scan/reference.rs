//! The selective scan in plain f64 loops: the definition that every fast version is tested against.
//!
//! Per channel c and state n, over the tokens t of one sequence (Mamba, arXiv 2312.00752, section 3 and
//! algorithm 2, with the simplified input map ΔB of the released code):
//!
//! ```text
//! Δ_t = softplus(δ_t + bias)
//! h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
//! y_t = Σ_n C_t h_t + D u_t             (complex: 2 Re Σ_n C_t h_t + D u_t)
//! o_t = y_t silu(z_t)
//! ```
//!
//! Backward, with G_t the gradient by h_t and `*` the conjugate (nothing for real numbers):
//!
//! ```text
//! G_t  = k C_t* dy_t + exp(Δ_{t+1} A)* G_{t+1}          k = 1, complex 2; at the end dlast_state
//! dC_t = k dy_t h_t*          dB_t = Δ_t u_t G_t
//! dΔ_t = Σ_n Re((B_t u_t + A w_t)* G_t),  w_t = exp(Δ_t A) h_{t-1}
//! dA   = Σ_t Δ_t w_t* G_t     du_t = D dy_t + Δ_t Σ_n Re(B_t* G_t)
//! ```

use super::arguments::{Arguments, Gradients, Projection};

/// A complex number; real scans leave the imaginary part 0.
#[derive(Clone, Copy)]
struct Number {
    re: f64,
    im: f64,
}

impl Number {
    const ZERO: Self = Self { re: 0.0, im: 0.0 };

    fn exp(self) -> Self {
        let size = self.re.exp();
        Self { re: size * self.im.cos(), im: size * self.im.sin() }
    }
    fn conj(self) -> Self {
        Self { re: self.re, im: -self.im }
    }
    fn scale(self, r: f64) -> Self {
        Self { re: r * self.re, im: r * self.im }
    }
    fn add(self, o: Self) -> Self {
        Self { re: self.re + o.re, im: self.im + o.im }
    }
    fn mul(self, o: Self) -> Self {
        Self { re: self.re * o.re - self.im * o.im, im: self.re * o.im + self.im * o.re }
    }
}

/// Reads number `i` of an array of `parts`-tuples.
fn get(values: &[f64], parts: usize, i: usize) -> Number {
    match parts {
        1 => Number { re: values[i], im: 0.0 },
        _ => Number { re: values[2 * i], im: values[2 * i + 1] },
    }
}

/// Adds `term` to number `i` of an array of `parts`-tuples.
fn add(values: &mut [f64], parts: usize, i: usize, term: Number) {
    values[parts * i] += term.re;
    if parts == 2 {
        values[2 * i + 1] += term.im;
    }
}

/// B or C of token `t`, channel `c`, state `n`, and its place in the gradient.
fn project(
    p: &Projection<'_, f64>,
    x: &Arguments<'_, f64>,
    t: usize,
    c: usize,
    n: usize,
) -> (Number, usize) {
    match p {
        Projection::Token { rows, groups } => {
            let i = c / (x.channels / groups) * x.states + n;
            (get(rows.row(t), x.parts(), i), t * groups * x.states + i)
        }
        Projection::Constant(values) => {
            let i = c * x.states + n;
            (get(values, x.parts(), i), i)
        }
    }
}

fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

/// Δ and its derivative by δ.
fn step(x: &Arguments<'_, f64>, t: usize, c: usize) -> (f64, f64) {
    let v = x.delta.row(t)[c] + x.delta_bias.map_or(0.0, |bias| bias[c]);
    match x.delta_softplus {
        true if v <= 20.0 => (v.exp().ln_1p(), sigmoid(v)),
        _ => (v, 1.0),
    }
}

/// The output `[T, E]` and the states `[slots, E, N]` after the batch.
pub fn forward(x: &Arguments<'_, f64>) -> (Vec<f64>, Vec<f64>) {
    let parts = x.parts();
    let k = parts as f64;
    let mut out = vec![0.0; x.sequences.tokens() * x.channels];
    let mut last = x.h0.map_or_else(|| vec![0.0; x.state_len()], <[f64]>::to_vec);
    for sequence in x.sequences {
        for c in 0..x.channels {
            let first = (sequence.slot * x.channels + c) * x.states;
            let mut h = start(x, sequence.continued, first);
            for t in sequence.tokens() {
                let u = x.u.row(t)[c];
                let (delta, _) = step(x, t, c);
                let mut y = x.d.map_or(0.0, |d| d[c] * u);
                for (n, h) in h.iter_mut().enumerate() {
                    let a = get(x.a, parts, c * x.states + n).scale(delta).exp();
                    let (b, _) = project(&x.b, x, t, c, n);
                    *h = a.mul(*h).add(b.scale(delta * u));
                    y += k * project(&x.c, x, t, c, n).0.mul(*h).re;
                }
                let gate = x.z.map_or(1.0, |z| z.row(t)[c] * sigmoid(z.row(t)[c]));
                out[t * x.channels + c] = y * gate;
            }
            for (n, h) in h.iter().enumerate() {
                let at = parts * (first + n);
                last[at] = h.re;
                if parts == 2 {
                    last[at + 1] = h.im;
                }
            }
        }
    }
    (out, last)
}

/// The state before the first token; a fresh sequence does not look at its slot.
fn start(x: &Arguments<'_, f64>, continued: bool, first: usize) -> Vec<Number> {
    match x.h0 {
        Some(h0) if continued => (0..x.states).map(|n| get(h0, x.parts(), first + n)).collect(),
        _ => vec![Number::ZERO; x.states],
    }
}

/// The gradients of `Σ out dout + Σ last_state dlast`.
pub fn backward(
    x: &Arguments<'_, f64>,
    dout: &[f64],
    dlast: Option<&[f64]>,
) -> Gradients<Vec<f64>> {
    let (parts, tokens) = (x.parts(), x.sequences.tokens());
    let k = parts as f64;
    let projection_len = |p: &Projection<'_, f64>| match p {
        Projection::Token { groups, .. } => tokens * groups * x.states * parts,
        Projection::Constant(_) => x.matrix_len(),
    };
    let mut grad = Gradients {
        u: vec![0.0; tokens * x.channels],
        delta: vec![0.0; tokens * x.channels],
        a: vec![0.0; x.matrix_len()],
        b: vec![0.0; projection_len(&x.b)],
        c: vec![0.0; projection_len(&x.c)],
        d: vec![0.0; x.d.map_or(0, <[f64]>::len)],
        z: vec![0.0; x.z.map_or(0, |_| tokens * x.channels)],
        delta_bias: vec![0.0; x.delta_bias.map_or(0, <[f64]>::len)],
        // Slots that no sequence changes hand their gradient through.
        h0: match (x.h0, dlast) {
            (Some(_), Some(dlast)) => dlast.to_vec(),
            (Some(_), None) => vec![0.0; x.state_len()],
            (None, _) => Vec::new(),
        },
    };
    for sequence in x.sequences {
        for c in 0..x.channels {
            let first = (sequence.slot * x.channels + c) * x.states;
            // h_{-1}, h_0, .., h_{L-1}
            let mut h = vec![start(x, sequence.continued, first)];
            for (i, t) in sequence.tokens().enumerate() {
                let (delta, _) = step(x, t, c);
                let next = (0..x.states).map(|n| {
                    let a = get(x.a, parts, c * x.states + n).scale(delta).exp();
                    let b = project(&x.b, x, t, c, n).0.scale(delta * x.u.row(t)[c]);
                    a.mul(h[i][n]).add(b)
                });
                let next = next.collect();
                h.push(next);
            }
            // exp(Δ_{t+1} A)* G_{t+1}
            let mut carry: Vec<Number> = (0..x.states)
                .map(|n| dlast.map_or(Number::ZERO, |dlast| get(dlast, parts, first + n)))
                .collect();
            for (i, t) in sequence.tokens().enumerate().rev() {
                let u = x.u.row(t)[c];
                let (delta, slope) = step(x, t, c);
                let at = t * x.channels + c;
                let mut dy = dout[at];
                if let Some(z) = x.z {
                    let z = z.row(t)[c];
                    let s = sigmoid(z);
                    let y = (0..x.states)
                        .map(|n| k * project(&x.c, x, t, c, n).0.mul(h[i + 1][n]).re)
                        .sum::<f64>()
                        + x.d.map_or(0.0, |d| d[c] * u);
                    grad.z[at] = dy * y * s * (1.0 + z * (1.0 - s));
                    dy *= z * s;
                }
                let mut by_delta = 0.0;
                let mut by_u = 0.0;
                if let Some(d) = x.d {
                    by_u += d[c] * dy;
                    grad.d[c] += dy * u;
                }
                for n in 0..x.states {
                    let rate = get(x.a, parts, c * x.states + n);
                    let a = rate.scale(delta).exp();
                    let (b, b_at) = project(&x.b, x, t, c, n);
                    let (cc, c_at) = project(&x.c, x, t, c, n);
                    let g = cc.conj().scale(k * dy).add(carry[n]);
                    let w = a.mul(h[i][n]);
                    add(&mut grad.c, parts, c_at, h[i + 1][n].conj().scale(k * dy));
                    add(&mut grad.b, parts, b_at, g.scale(delta * u));
                    add(&mut grad.a, parts, c * x.states + n, w.conj().mul(g).scale(delta));
                    by_delta += b.scale(u).add(rate.mul(w)).conj().mul(g).re;
                    by_u += delta * b.conj().mul(g).re;
                    carry[n] = a.conj().mul(g);
                }
                grad.u[at] = by_u;
                grad.delta[at] = by_delta * slope;
                if x.delta_bias.is_some() {
                    grad.delta_bias[c] += by_delta * slope;
                }
            }
            if x.h0.is_some() {
                for (n, carry) in carry.iter().enumerate() {
                    let value = if sequence.continued { *carry } else { Number::ZERO };
                    let at = parts * (first + n);
                    grad.h0[at] = value.re;
                    if parts == 2 {
                        grad.h0[at + 1] = value.im;
                    }
                }
            }
        }
    }
    grad
}
