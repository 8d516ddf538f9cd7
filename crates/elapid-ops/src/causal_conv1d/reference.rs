//! The definition in f64 (mamba.md b2 step 2 and b6, packmamba.md b2 and b3): plain loops, forward and backward.

use elapid_tensor::Sequences;

/// The arguments of the convolution in f64, all contiguous.
#[derive(Debug, Clone)]
pub struct Arguments {
    /// [T, E]
    pub x: Vec<f64>,
    /// [E, W]
    pub weight: Vec<f64>,
    /// [E]
    pub bias: Option<Vec<f64>>,
    /// [slots, E, W - 1], oldest first.
    pub state: Option<Vec<f64>>,
    /// E
    pub channels: usize,
    /// W
    pub width: usize,
    /// SiLU after the sum.
    pub silu: bool,
    /// The ragged batch.
    pub sequences: Sequences,
}

/// Gradients of all inputs, in the layouts of [`Arguments`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// [T, E]
    pub x: Vec<f64>,
    /// [E, W]
    pub weight: Vec<f64>,
    /// [E]
    pub bias: Vec<f64>,
    /// [slots, E, W - 1]
    pub state: Vec<f64>,
}

impl Arguments {
    /// Where the input at `time` (negative: before the batch) of a sequence is: in x, in the state, or nowhere.
    fn at(&self, sequence: &elapid_tensor::Sequence, time: isize, c: usize) -> Place {
        if time >= 0 {
            return Place::X((sequence.start + time as usize) * self.channels + c);
        }
        let history = self.width - 1;
        if !sequence.continued {
            return Place::Nowhere;
        }
        let column = (time + history as isize) as usize;
        Place::State((sequence.slot * self.channels + c) * history + column)
    }

    fn value(&self, place: Place) -> f64 {
        match place {
            Place::X(i) => self.x[i],
            Place::State(i) => self.state.as_ref().map_or(0.0, |state| state[i]),
            Place::Nowhere => 0.0,
        }
    }

    /// The sum before the activation at token `t` of a sequence.
    fn sum(&self, sequence: &elapid_tensor::Sequence, t: usize, c: usize) -> f64 {
        let mut sum = self.bias.as_ref().map_or(0.0, |bias| bias[c]);
        for w in 0..self.width {
            let time = t as isize - (self.width - 1 - w) as isize;
            sum += self.weight[c * self.width + w] * self.value(self.at(sequence, time, c));
        }
        sum
    }

    /// `y` [T, E] and the state after the batch [slots, E, W - 1].
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let history = self.width - 1;
        let mut y = vec![0.0; self.x.len()];
        let zeros = || vec![0.0; self.sequences.slots() * self.channels * history];
        let mut state_out = self.state.clone().unwrap_or_else(zeros);
        for sequence in &self.sequences {
            for c in 0..self.channels {
                for t in 0..sequence.len {
                    let sum = self.sum(sequence, t, c);
                    y[(sequence.start + t) * self.channels + c] =
                        if self.silu { sum / (1.0 + (-sum).exp()) } else { sum };
                }
                for j in 0..history {
                    let time = sequence.len as isize - history as isize + j as isize;
                    state_out[(sequence.slot * self.channels + c) * history + j] =
                        self.value(self.at(sequence, time, c));
                }
            }
        }
        (y, state_out)
    }

    /// Gradients of `Σ y dy + Σ state_out dstate`.
    pub fn backward(&self, dy: &[f64], dstate: &[f64]) -> Gradients {
        let history = self.width - 1;
        let mut grads = Gradients {
            x: vec![0.0; self.x.len()],
            weight: vec![0.0; self.weight.len()],
            bias: vec![0.0; self.channels],
            // Slots that no sequence writes hand their state, and so its gradient, through.
            state: dstate.to_vec(),
        };
        for sequence in &self.sequences {
            let base = sequence.slot * self.channels * history;
            grads.state[base..base + self.channels * history].fill(0.0);
        }
        let add = |grads: &mut Gradients, place: Place, value: f64| match place {
            Place::X(i) => grads.x[i] += value,
            Place::State(i) => grads.state[i] += value,
            Place::Nowhere => {}
        };
        for sequence in &self.sequences {
            for c in 0..self.channels {
                for t in 0..sequence.len {
                    let mut g = dy[(sequence.start + t) * self.channels + c];
                    if self.silu {
                        let sum = self.sum(sequence, t, c);
                        let s = 1.0 / (1.0 + (-sum).exp());
                        g *= s * (1.0 + sum * (1.0 - s));
                    }
                    grads.bias[c] += g;
                    for w in 0..self.width {
                        let place =
                            self.at(sequence, t as isize - (self.width - 1 - w) as isize, c);
                        grads.weight[c * self.width + w] += g * self.value(place);
                        add(&mut grads, place, g * self.weight[c * self.width + w]);
                    }
                }
                for j in 0..history {
                    let time = sequence.len as isize - history as isize + j as isize;
                    let place = self.at(sequence, time, c);
                    add(
                        &mut grads,
                        place,
                        dstate[(sequence.slot * self.channels + c) * history + j],
                    );
                }
            }
        }
        grads
    }
}

#[derive(Debug, Clone, Copy)]
enum Place {
    X(usize),
    State(usize),
    Nowhere,
}
