use super::{Activation, causal_conv1d, reference::Arguments};
use crate::testing::{
    check_gradient, close, close_tensor, dot, on_threads, random, random_tensor, same_bits, widen,
};
use elapid_tensor::autograd::backward;
use elapid_tensor::{Sequence, Sequences, Tensor};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// Sequences of the given lengths, each continued or not, with slots in reverse and one slot unused.
fn batch(parts: &[(usize, bool)]) -> Sequences {
    let mut start = 0;
    let sequences = parts
        .iter()
        .enumerate()
        .map(|(i, &(len, continued))| {
            let slot = parts.len() - i;
            let sequence = Sequence { start, len, slot, continued, position: 0, id: i as u64 };
            start += len;
            sequence
        })
        .collect();
    Sequences::new(sequences, parts.len() + 1).unwrap()
}

struct Case {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    state: Option<Tensor>,
    activation: Activation,
    sequences: Sequences,
}

impl Case {
    fn new(seed: u64, channels: usize, width: usize, options: u8, sequences: Sequences) -> Self {
        let tokens = sequences.tokens();
        let state = random_tensor(seed ^ 4, [sequences.slots(), channels, width - 1]);
        let needed = sequences.any_continued() || options & 4 != 0;
        Self {
            // A view of the right half of a wider tensor, as the mixers give it.
            x: random_tensor(seed ^ 1, [tokens, 2 * channels])
                .narrow(1, channels, channels)
                .unwrap()
                .requires_grad(),
            weight: random_tensor(seed ^ 2, [channels, width]).requires_grad(),
            bias: (options & 1 != 0).then(|| random_tensor(seed ^ 3, [channels]).requires_grad()),
            state: needed.then(|| state.requires_grad()),
            activation: if options & 2 != 0 { Activation::Silu } else { Activation::None },
            sequences,
        }
    }

    fn run(&self) -> (Tensor, Tensor) {
        let (bias, state) = (self.bias.as_ref(), self.state.as_ref());
        causal_conv1d(&self.x, &self.weight, bias, self.activation, &self.sequences, state).unwrap()
    }

    /// Gradients of x, weight, bias, state.
    fn gradients(&self, dy: &Tensor, dstate: &Tensor) -> Vec<Option<Tensor>> {
        let (y, state_out) = self.run();
        let mut inputs = vec![&self.x, &self.weight];
        inputs.extend(&self.bias);
        inputs.extend(&self.state);
        let mut grads =
            backward(&[(&y, Some(dy.clone())), (&state_out, Some(dstate.clone()))], &inputs)
                .unwrap()
                .into_iter();
        let mut next = |present: bool| if present { grads.next().unwrap() } else { None };
        vec![next(true), next(true), next(self.bias.is_some()), next(self.state.is_some())]
    }

    fn reference(&self) -> Arguments {
        Arguments {
            x: self.x.to_f64_vec().unwrap(),
            weight: self.weight.to_f64_vec().unwrap(),
            bias: self.bias.as_ref().map(|t| t.to_f64_vec().unwrap()),
            state: self.state.as_ref().map(|t| t.to_f64_vec().unwrap()),
            channels: self.weight.dim(0),
            width: self.weight.dim(1),
            silu: self.activation == Activation::Silu,
            sequences: self.sequences.clone(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn agrees_with_reference(
        parts in prop::collection::vec((0usize..90, any::<bool>()), 0..6),
        channels in 1usize..40, width in 1usize..7, options in 0u8..8, seed: u64,
    ) {
        let case = Case::new(seed, channels, width, options, batch(&parts));
        let want = case.reference();
        let (y, state_out) = want.forward();
        let (got_y, got_state) = case.run();
        close_tensor("y", &got_y, &y, 2e-6);
        close_tensor("state", &got_state, &state_out, 0.0);

        let dy = random_tensor(seed ^ 5, got_y.shape());
        let dstate = random_tensor(seed ^ 6, got_state.shape());
        let grads = case.gradients(&dy, &dstate);
        let want = want.backward(&dy.to_f64_vec().unwrap(), &dstate.to_f64_vec().unwrap());
        for (name, grad, want) in [
            ("dx", &grads[0], &want.x),
            ("dweight", &grads[1], &want.weight),
            ("dbias", &grads[2], &want.bias),
            ("dstate", &grads[3], &want.state),
        ] {
            if let Some(grad) = grad {
                close_tensor(name, grad, want, 5e-6);
            }
        }
    }

    /// Cut one sequence anywhere and hand the state over: outputs, states and gradients as in one piece.
    #[test]
    fn a_split_changes_no_bit(len in 1usize..150, cut in 0usize..150, width in 1usize..6, options in 0u8..4, seed: u64) {
        let (cut, channels) = (cut.min(len), 11);
        let whole = Case::new(seed, channels, width, options | 4, Sequences::continued(&[len], &[0]).unwrap());
        let (y, last) = whole.run();
        let dy = random_tensor(seed ^ 5, y.shape());
        let dlast = random_tensor(seed ^ 6, last.shape());
        let grads = whole.gradients(&dy, &dlast);

        let part = |start: usize, len: usize, state: &Tensor| Case {
            x: whole.x.detach().narrow(0, start, len).unwrap().requires_grad(),
            weight: whole.weight.clone(),
            bias: whole.bias.clone(),
            state: Some(state.detach().requires_grad()),
            activation: whole.activation,
            sequences: Sequences::continued(&[len], &[start as u64]).unwrap(),
        };
        let first = part(0, cut, whole.state.as_ref().unwrap());
        let (y0, middle) = first.run();
        let second = part(cut, len - cut, &middle);
        let (y1, end) = second.run();
        same_bits("y", &Tensor::concat(&[&y0.detach(), &y1.detach()], 0).unwrap(), &y);
        same_bits("state", &end, &last);

        let grads1 = second.gradients(&dy.narrow(0, cut, len - cut).unwrap(), &dlast);
        let grads0 = first.gradients(&dy.narrow(0, 0, cut).unwrap(), grads1[3].as_ref().unwrap());
        let dx = Tensor::concat(&[grads0[0].as_ref().unwrap(), grads1[0].as_ref().unwrap()], 0).unwrap();
        same_bits("dx", &dx, grads[0].as_ref().unwrap());
        same_bits("dstate", grads0[3].as_ref().unwrap(), grads[3].as_ref().unwrap());
        let sum = |i: usize| -> Vec<f64> {
            let (a, b) = (&grads0[i].as_ref().unwrap(), &grads1[i].as_ref().unwrap());
            a.to_f64_vec().unwrap().iter().zip(b.to_f64_vec().unwrap()).map(|(a, b)| a + b).collect()
        };
        close_tensor("dweight", grads[1].as_ref().unwrap(), &sum(1), 5e-6);
    }

    /// Every sequence of a batch has the bits that it has alone, forward and backward.
    #[test]
    fn a_batch_is_its_sequences(
        parts in prop::collection::vec((0usize..70, any::<bool>()), 1..5),
        width in 1usize..6, options in 0u8..4, seed: u64,
    ) {
        let channels = 13;
        let case = Case::new(seed, channels, width, options | 4, batch(&parts));
        let (y, state_out) = case.run();
        let (dy, dstate) = (random_tensor(seed ^ 5, y.shape()), random_tensor(seed ^ 6, state_out.shape()));
        let grads = case.gradients(&dy, &dstate);
        for sequence in &case.sequences {
            let tokens = |t: &Tensor| t.detach().narrow(0, sequence.start, sequence.len).unwrap();
            let slot = |t: &Tensor| t.detach().narrow(0, sequence.slot, 1).unwrap();
            let own = Sequence { start: 0, slot: 0, ..*sequence };
            let alone = Case {
                x: tokens(&case.x).requires_grad(),
                weight: case.weight.clone(),
                bias: case.bias.clone(),
                state: case.state.as_ref().map(|t| slot(t).requires_grad()),
                activation: case.activation,
                sequences: Sequences::new(vec![own], 1).unwrap(),
            };
            let (y_alone, state_alone) = alone.run();
            same_bits("y", &y_alone, &tokens(&y));
            same_bits("state", &state_alone, &slot(&state_out));
            let alone = alone.gradients(&tokens(&dy), &slot(&dstate));
            same_bits("dx", alone[0].as_ref().unwrap(), &tokens(grads[0].as_ref().unwrap()));
            same_bits("dstate", alone[3].as_ref().unwrap(), &slot(grads[3].as_ref().unwrap()));
        }
    }
}

#[test]
fn reference_gradients_are_derivatives() {
    for silu in [false, true] {
        let sequences =
            batch(&[(5, false), (0, true), (1, true), (4, true), (0, false), (1, false)]);
        let (channels, width) = (2, 4);
        let arguments = Arguments {
            x: widen(&random(1, sequences.tokens() * channels)),
            weight: widen(&random(2, channels * width)),
            bias: Some(widen(&random(3, channels))),
            state: Some(widen(&random(4, sequences.slots() * channels * (width - 1)))),
            channels,
            width,
            silu,
            sequences,
        };
        let dy = widen(&random(5, arguments.x.len()));
        let dstate = widen(&random(6, arguments.state.as_ref().unwrap().len()));
        let grads = arguments.backward(&dy, &dstate);
        let loss = |arguments: Arguments| {
            let (y, state) = arguments.forward();
            dot(&y, &dy) + dot(&state, &dstate)
        };
        let a = &arguments;
        check_gradient("dx", &grads.x, &a.x, |x| loss(Arguments { x: x.to_vec(), ..a.clone() }));
        check_gradient("dw", &grads.weight, &a.weight, |w| {
            loss(Arguments { weight: w.to_vec(), ..a.clone() })
        });
        check_gradient("db", &grads.bias, a.bias.as_ref().unwrap(), |b| {
            loss(Arguments { bias: Some(b.to_vec()), ..a.clone() })
        });
        check_gradient("dstate", &grads.state, a.state.as_ref().unwrap(), |s| {
            loss(Arguments { state: Some(s.to_vec()), ..a.clone() })
        });
    }
}

/// A document full of NaN leaves every other document's outputs, states and input gradients as they were.
#[test]
fn not_a_number_stays_in_its_document() {
    let parts = [(5, false), (70, true), (3, false), (64, false), (2, true)];
    let run = |poison: Option<usize>| {
        let mut case = Case::new(9, 19, 4, 7, batch(&parts));
        let mut x = case.x.detach().contiguous().unwrap();
        let mut state = case.state.as_ref().unwrap().detach();
        if let Some(i) = poison {
            let sequence = case.sequences.as_slice()[i];
            let slot = 19 * 3;
            x.data_mut::<f32>().unwrap()[sequence.start * 19..][..sequence.len * 19].fill(f32::NAN);
            state.data_mut::<f32>().unwrap()[sequence.slot * slot..][..slot].fill(f32::NAN);
        }
        case.x = x.requires_grad();
        case.state = Some(state.requires_grad());
        let (y, state_out) = case.run();
        let grads =
            case.gradients(&random_tensor(5, y.shape()), &random_tensor(6, state_out.shape()));
        (case.sequences, y, state_out, grads)
    };
    let (sequences, y, state_out, grads) = run(None);
    for poisoned in 0..parts.len() {
        let (_, y_p, state_p, grads_p) = run(Some(poisoned));
        for (i, sequence) in sequences.iter().enumerate().filter(|(i, _)| *i != poisoned) {
            let tokens = |t: &Tensor| t.detach().narrow(0, sequence.start, sequence.len).unwrap();
            let slot = |t: &Tensor| t.detach().narrow(0, sequence.slot, 1).unwrap();
            same_bits(&format!("y of {i}"), &tokens(&y_p), &tokens(&y));
            same_bits("state", &slot(&state_p), &slot(&state_out));
            same_bits(
                "dx",
                &tokens(grads_p[0].as_ref().unwrap()),
                &tokens(grads[0].as_ref().unwrap()),
            );
            same_bits(
                "dstate",
                &slot(grads_p[3].as_ref().unwrap()),
                &slot(grads[3].as_ref().unwrap()),
            );
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    let case = Case::new(3, 96, 4, 7, batch(&[(300, true), (1, false), (700, false)]));
    let run = || {
        let (y, state) = case.run();
        case.gradients(&random_tensor(5, y.shape()), &random_tensor(6, state.shape()))
    };
    let (one, four) = (on_threads(1, run), on_threads(4, run));
    for (one, four) in one.iter().zip(&four) {
        same_bits("gradient", four.as_ref().unwrap(), one.as_ref().unwrap());
    }
}

/// packmamba.md (f) 6.
#[test]
fn packmamba_golden_values() {
    let x: Vec<f64> = (0..9).map(|t| (0.7 * f64::from(t) + 0.2).sin()).collect();
    let dy: Vec<f64> = (0..9).map(|t| 1.0 / (1.0 + f64::from(t))).collect();
    let arguments = Arguments {
        x,
        weight: vec![0.3, -0.2, 0.5, 0.7],
        bias: Some(vec![0.1]),
        state: None,
        channels: 1,
        width: 4,
        silu: true,
        sequences: Sequences::from_positions(&[0, 1, 2, 3, 0, 0, 1, 0, 1]).unwrap(),
    };
    let grads = arguments.backward(&dy, &[0.0; 12]);
    let y = [
        0.1337550400,
        0.5074163217,
        0.8750193600,
        0.7540783387,
        0.1092383710,
        -0.1172092971,
        -0.2521584276,
        -0.2007648484,
        -0.2301443178,
    ];
    let dx = [
        0.6487765072,
        0.4095121956,
        0.3432100485,
        0.1636336928,
        0.0838237794,
        0.0518498455,
        0.0127778136,
        0.0309913071,
        0.0140993041,
    ];
    close("y", &arguments.forward().0, &y, 1e-9);
    close("dx", &grads.x, &dx, 1e-9);
    close(
        "dweight",
        &grads.weight,
        &[0.0464414232, 0.2473475342, 0.5422258967, 0.8801991042],
        1e-9,
    );
    close("dbias", &grads.bias, &[1.8454165469], 1e-9);
}

fn tensor_f64(file: &SafeTensors<'_>, name: &str) -> Option<Vec<f64>> {
    let view = file.tensor(name).ok()?;
    let bytes = view.data();
    Some(match view.dtype() {
        safetensors::Dtype::F64 => {
            bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        safetensors::Dtype::I32 => bytes
            .chunks_exact(4)
            .map(|b| f64::from(i32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        other => panic!("{name} is {other:?}"),
    })
}

/// [B, E, L] as [B L, E].
fn channel_last(values: &[f64], rows: usize, channels: usize, len: usize) -> Vec<f64> {
    let at = |b: usize, t: usize, c: usize| values[(b * channels + c) * len + t];
    (0..rows * len).flat_map(|i| (0..channels).map(move |c| at(i / len, i % len, c))).collect()
}

#[test]
fn golden_cases() {
    const FILE: &[u8] = include_bytes!("../../tests/fixtures/golden/ops/causal_conv1d.safetensors");
    let file = SafeTensors::deserialize(FILE).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(FILE).unwrap();
    let cases: serde_json::Value =
        serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    let cases = cases.as_object().unwrap();
    assert_eq!(cases.len(), 12);
    for (name, case) in cases {
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let (rows, channels, width, len) = (size("B"), size("D"), size("W"), size("L"));
        let get = |tensor: &str| tensor_f64(&file, &format!("{name}.{tensor}"));
        let to_tensor = |values: &[f64], shape: &[usize]| {
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            Tensor::from_slice(&values, elapid_tensor::Shape::new(shape)).unwrap()
        };
        let tokens = |name: &str| channel_last(&get(name).unwrap(), rows, channels, len);
        let lengths: Vec<usize> = match case["rows"].as_array() {
            Some(rows) => rows
                .iter()
                .flat_map(|row| {
                    row.as_array().unwrap().iter().map(|l| l.as_u64().unwrap() as usize)
                })
                .collect(),
            None => vec![len; rows],
        };
        let init = get("init");
        let sequences = match &init {
            Some(_) => Sequences::continued(&lengths, &vec![0; lengths.len()]).unwrap(),
            None => Sequences::fresh(&lengths),
        };
        let state_shape = [lengths.len(), channels, width - 1];
        let run = Case {
            x: to_tensor(&tokens("x"), &[rows * len, channels]).requires_grad(),
            weight: to_tensor(&get("weight").unwrap(), &[channels, width]).requires_grad(),
            bias: get("bias").map(|b| to_tensor(&b, &[channels]).requires_grad()),
            state: init.map(|s| to_tensor(&s, &state_shape).requires_grad()),
            activation: if case["silu"] == true { Activation::Silu } else { Activation::None },
            sequences,
        };
        let (y, last) = run.run();
        close_tensor(&format!("{name}.out"), &y, &tokens("out"), 2e-6);
        close_tensor(&format!("{name}.final"), &last, &get("final").unwrap(), 1e-7);
        let dfinal = match get("dfinal") {
            Some(dfinal) => to_tensor(&dfinal, &state_shape),
            None => Tensor::zeros::<f32>(state_shape),
        };
        let grads = run.gradients(&to_tensor(&tokens("dout"), &[rows * len, channels]), &dfinal);
        close_tensor(&format!("{name}.dx"), grads[0].as_ref().unwrap(), &tokens("dx"), 5e-6);
        for (i, tensor) in [(1, "dweight"), (2, "dbias"), (3, "dinit")] {
            match (&grads[i], get(tensor)) {
                (Some(grad), Some(want)) => {
                    close_tensor(&format!("{name}.{tensor}"), grad, &want, 5e-6)
                }
                (None, None) => {}
                (grad, want) => panic!("{name}.{tensor}: {} {}", grad.is_some(), want.is_some()),
            }
        }
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let sequences = Sequences::fresh(&[3]);
    let (x, weight) = (random_tensor(1, [3, 4]), random_tensor(2, [4, 4]));
    let run = |x: &Tensor,
               weight: &Tensor,
               bias: Option<&Tensor>,
               sequences: &Sequences,
               state: Option<&Tensor>| {
        causal_conv1d(x, weight, bias, Activation::Silu, sequences, state)
    };
    assert!(run(&x, &weight, None, &sequences, None).is_ok());
    assert!(run(&x, &random_tensor(2, [5, 4]), None, &sequences, None).is_err());
    assert!(run(&x, &random_tensor(2, [4, 0]), None, &sequences, None).is_err());
    assert!(run(&x, &weight, Some(&random_tensor(2, [3])), &sequences, None).is_err());
    assert!(run(&x, &weight, None, &Sequences::fresh(&[4]), None).is_err());
    assert!(run(&x, &weight, None, &sequences, Some(&random_tensor(3, [1, 4, 4]))).is_err());
    let continued = Sequences::continued(&[3], &[7]).unwrap();
    let message = run(&x, &weight, None, &continued, None).unwrap_err().to_string();
    assert!(message.contains("expected a state"), "{message}");
    assert!(run(&Tensor::zeros::<f64>([3, 4]), &weight, None, &sequences, None).is_err());
}
