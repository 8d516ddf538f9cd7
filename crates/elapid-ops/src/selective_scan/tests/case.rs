//! Arguments of a scan as owned arrays, and the results of running it.

use elapid_tensor::{RowView, Sequence, Sequences};
use proptest::prelude::*;

use super::super::{
    Arguments, Gradients, Projection, backward_cpu, chunk_states_len, forward_cpu, reference,
};
use crate::testing::random;

/// A scan with the weights of its outputs in a loss.
#[derive(Debug, Clone)]
pub(crate) struct Case<T> {
    pub channels: usize,
    pub states: usize,
    pub complex: bool,
    /// Groups of B and C, none if constant.
    pub groups: [Option<usize>; 2],
    pub sequences: Sequences,
    pub u: Vec<T>,
    pub delta: Vec<T>,
    pub a: Vec<T>,
    pub b: Vec<T>,
    pub c: Vec<T>,
    pub d: Option<Vec<T>>,
    pub z: Option<Vec<T>>,
    pub bias: Option<Vec<T>>,
    pub softplus: bool,
    pub h0: Option<Vec<T>>,
    pub dy: Vec<T>,
    pub dlast: Option<Vec<T>>,
}

/// Everything that a scan and its gradient compute.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Results<T> {
    pub y: Vec<T>,
    pub last: Vec<T>,
    pub grad: Gradients<Vec<T>>,
}

impl<T> Case<T> {
    pub(crate) fn arguments(&self) -> Arguments<'_, T> {
        let tokens = self.sequences.tokens();
        let view = |data, width| RowView { data, rows: tokens, width, stride: width };
        let numbers = self.states * if self.complex { 2 } else { 1 };
        let project = |data, groups| match groups {
            Some(groups) => Projection::Token { rows: view(data, groups * numbers), groups },
            None => Projection::Constant(data),
        };
        Arguments {
            channels: self.channels,
            states: self.states,
            complex: self.complex,
            u: view(&self.u, self.channels),
            delta: view(&self.delta, self.channels),
            a: &self.a,
            b: project(&self.b, self.groups[0]),
            c: project(&self.c, self.groups[1]),
            d: self.d.as_deref(),
            z: self.z.as_deref().map(|z| view(z, self.channels)),
            delta_bias: self.bias.as_deref(),
            delta_softplus: self.softplus,
            h0: self.h0.as_deref(),
            sequences: &self.sequences,
        }
    }
}

impl Case<f32> {
    /// Random arguments with all options on.
    pub(crate) fn random(
        seed: u64,
        sequences: Sequences,
        channels: usize,
        states: usize,
        groups: [Option<usize>; 2],
        complex: bool,
    ) -> Self {
        let parts = if complex { 2 } else { 1 };
        let tokens = sequences.tokens();
        let matrix = channels * states * parts;
        let draw = |stream: u64, count| random(seed * 97 + stream, count);
        let mut a = draw(0, matrix);
        for (i, a) in a.iter_mut().enumerate() {
            *a *= 4.0;
            if i % parts == 0 {
                *a = -a.abs() - 0.05;
            }
        }
        let length = |groups: Option<usize>| groups.map_or(matrix, |g| tokens * g * states * parts);
        Self {
            u: draw(1, tokens * channels),
            delta: draw(2, tokens * channels),
            a,
            b: draw(3, length(groups[0])),
            c: draw(4, length(groups[1])),
            d: Some(draw(5, channels)),
            z: Some(draw(6, tokens * channels)),
            bias: Some(draw(7, channels).iter().map(|v| v - 1.5).collect()),
            softplus: true,
            h0: Some(draw(8, sequences.slots() * matrix)),
            dy: draw(9, tokens * channels),
            dlast: Some(draw(10, sequences.slots() * matrix)),
            channels,
            states,
            complex,
            groups,
            sequences,
        }
    }

    pub(crate) fn widen(&self) -> Case<f64> {
        let widen = |values: &Vec<f32>| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        Case {
            channels: self.channels,
            states: self.states,
            complex: self.complex,
            groups: self.groups,
            sequences: self.sequences.clone(),
            u: widen(&self.u),
            delta: widen(&self.delta),
            a: widen(&self.a),
            b: widen(&self.b),
            c: widen(&self.c),
            d: self.d.as_ref().map(widen),
            z: self.z.as_ref().map(widen),
            bias: self.bias.as_ref().map(widen),
            softplus: self.softplus,
            h0: self.h0.as_ref().map(widen),
            dy: widen(&self.dy),
            dlast: self.dlast.as_ref().map(widen),
        }
    }

    /// Output and states, without what backward needs.
    pub(crate) fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let x = self.arguments();
        // NaN, so that anything not written shows.
        let mut y = vec![f32::NAN; self.u.len()];
        let mut last = vec![f32::NAN; x.state_len()];
        forward_cpu(&x, &mut y, &mut last, None);
        (y, last)
    }

    /// Everything, by the CPU code.
    pub(crate) fn run(&self) -> Results<f32> {
        let x = self.arguments();
        let mut y = vec![f32::NAN; self.u.len()];
        let mut last = vec![f32::NAN; x.state_len()];
        let mut saved = vec![f32::NAN; chunk_states_len(&x)];
        forward_cpu(&x, &mut y, &mut last, Some(&mut saved));
        let dy = RowView {
            data: &self.dy[..],
            rows: self.sequences.tokens(),
            width: self.channels,
            stride: self.channels,
        };
        let grad = backward_cpu(&x, &saved, dy, self.dlast.as_deref());
        let grad = Gradients {
            u: grad.u.to_vec(),
            delta: grad.delta.to_vec(),
            a: grad.a.to_vec(),
            b: grad.b.to_vec(),
            c: grad.c.to_vec(),
            d: grad.d.to_vec(),
            z: grad.z.to_vec(),
            delta_bias: grad.delta_bias.to_vec(),
            h0: grad.h0.to_vec(),
        };
        Results { y, last, grad }
    }

    /// The arguments of one sequence alone, in a batch of its own.
    pub(crate) fn alone(&self, index: usize) -> Self {
        let s = self.sequences.as_slice()[index];
        let parts = if self.complex { 2 } else { 1 };
        let matrix = self.channels * self.states * parts;
        let cut = |values: &[f32], width: usize| {
            values[s.start * width..(s.start + s.len) * width].to_vec()
        };
        let project = |values: &[f32], groups: Option<usize>| match groups {
            Some(groups) => cut(values, groups * self.states * parts),
            None => values.to_vec(),
        };
        let slot = |values: &Vec<f32>| values[s.slot * matrix..(s.slot + 1) * matrix].to_vec();
        let sequences =
            Sequences::new(vec![Sequence { start: 0, slot: 0, ..s }], 1).expect("one sequence");
        Self {
            u: cut(&self.u, self.channels),
            delta: cut(&self.delta, self.channels),
            b: project(&self.b, self.groups[0]),
            c: project(&self.c, self.groups[1]),
            z: self.z.as_ref().map(|z| cut(z, self.channels)),
            h0: self.h0.as_ref().map(slot),
            dy: cut(&self.dy, self.channels),
            dlast: self.dlast.as_ref().map(slot),
            sequences,
            ..self.clone()
        }
    }
}

impl Case<f64> {
    /// Everything, by the reference.
    pub(crate) fn run(&self) -> Results<f64> {
        let x = self.arguments();
        let (y, last) = reference::forward(&x);
        Results { y, last, grad: reference::backward(&x, &self.dy, self.dlast.as_deref()) }
    }
}

impl<T> Results<T> {
    /// The arrays with their names.
    pub(crate) fn named(&self) -> [(&'static str, &[T]); 11] {
        let g = &self.grad;
        [
            ("y", &self.y),
            ("last", &self.last),
            ("du", &g.u),
            ("ddelta", &g.delta),
            ("dA", &g.a),
            ("dB", &g.b),
            ("dC", &g.c),
            ("dD", &g.d),
            ("dz", &g.z),
            ("dbias", &g.delta_bias),
            ("dh0", &g.h0),
        ]
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0f64, |m, w| m.max(w.abs()))
}

/// `max|got - want| <= tolerance max|want|`.
pub(super) fn near(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    near_as(name, got, want, tolerance, largest(want));
}

fn near_as(name: &str, got: &[f64], want: &[f64], tolerance: f64, largest: f64) {
    assert_eq!(got.len(), want.len(), "{name}: number of values");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(
            error <= tolerance * largest,
            "{name}[{i}]: {got} instead of {want}, {:.2e} of the largest",
            error / largest
        );
    }
}

impl Results<f32> {
    pub(super) fn widen(&self) -> Results<f64> {
        let widen = |values: &Vec<f32>| values.iter().map(|&v| f64::from(v)).collect();
        let g = &self.grad;
        Results {
            y: widen(&self.y),
            last: widen(&self.last),
            grad: Gradients {
                u: widen(&g.u),
                delta: widen(&g.delta),
                a: widen(&g.a),
                b: widen(&g.b),
                c: widen(&g.c),
                d: widen(&g.d),
                z: widen(&g.z),
                delta_bias: widen(&g.delta_bias),
                h0: widen(&g.h0),
            },
        }
    }

    /// Compares with the reference.
    pub(crate) fn near(&self, want: &Results<f64>, tolerance: f64) {
        let terms = largest(&want.grad.delta);
        for ((name, got), (_, want)) in self.widen().named().iter().zip(want.named()) {
            let largest = match *name {
                // A sum of Δ's gradients, which may all but cancel, is no more exact than they are.
                "dbias" => largest(want).max(terms),
                _ => largest(want),
            };
            near_as(name, got, want, tolerance, largest);
        }
    }
}

/// Sequences of the given lengths in scattered slots, of which two are unused; some continue.
pub(super) fn scattered(lengths: &[(usize, bool)]) -> Sequences {
    let count = lengths.len();
    let mut start = 0;
    let list = lengths.iter().enumerate().map(|(i, &(len, continued))| {
        let s = Sequence { start, len, slot: count - i, continued, position: 0, id: i as u64 };
        start += len;
        s
    });
    Sequences::new(list.collect(), count + 2).expect("slots are distinct")
}

/// Random shapes: sequences (also empty ones), channels, states, groups.
pub(super) fn any_case(max_len: usize) -> impl Strategy<Value = Case<f32>> {
    let lengths = prop::collection::vec((0..max_len, any::<bool>()), 1..5);
    let sizes =
        (1usize..20, 1usize..3, prop::sample::select(vec![1usize, 2, 3, 4, 5, 8, 9, 13, 16]));
    (lengths, sizes, any::<[bool; 2]>(), any::<[bool; 6]>(), any::<u16>()).prop_map(
        |(lengths, (width, groups, states), constant, flags, seed)| {
            let groups = constant.map(|constant| (!constant).then_some(groups));
            let channels = width * groups.iter().flatten().max().unwrap_or(&1);
            let [d, z, bias, softplus, dlast, complex] = flags;
            let mut case =
                Case::random(seed.into(), scattered(&lengths), channels, states, groups, complex);
            case.softplus = softplus;
            if !softplus {
                // Without softplus Δ must be positive by itself.
                case.bias = case.bias.map(|bias| bias.iter().map(|v| v.abs() + 0.6).collect());
                case.delta.iter_mut().for_each(|v| *v = v.abs() * 0.1 + 0.02);
            }
            case.d = case.d.filter(|_| d);
            case.z = case.z.filter(|_| z);
            case.bias = case.bias.filter(|_| bias);
            case.dlast = case.dlast.filter(|_| dlast);
            case
        },
    )
}
