//! Decode steps against the f64 reference, and the bits of a batch against those of its sequences alone.

use elapid_tensor::cuda::{DeviceBuffer, Gpu};
use elapid_tensor::{DType, Tensor, bf16};

use super::reference::{Layer, Model, State};
use super::{
    Encoding, LayerState, LayerWeights, NormWeights, Packed, Sizes, Source, Step, Weights,
};
use crate::blocks::dequantize;
use crate::testing::{gpus, random};

fn plain() -> Sizes {
    Sizes {
        width: 48,
        inner: 80,
        states: 16,
        rank: 5,
        taps: 4,
        classes: 70,
        centred: false,
        eps: 1e-5,
        selection_eps: None,
        state: DType::F32,
    }
}

/// A state in bf16.
fn narrow() -> Sizes {
    Sizes { state: DType::BF16, ..plain() }
}

/// LayerNorm, norms of the selection, sizes that fill no tile and states that no power of two divides.
fn odd() -> Sizes {
    Sizes {
        width: 37,
        inner: 74,
        states: 6,
        rank: 34,
        taps: 3,
        classes: 19,
        centred: true,
        eps: 1e-5,
        selection_eps: Some(1e-6),
        state: DType::F32,
    }
}

/// Rounds as the card keeps it.
fn rounded(values: &[f32], terms: usize, encoding: Encoding) -> Vec<f32> {
    match encoding {
        Encoding::Bf16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
        Encoding::Q8 => values
            .chunks(terms)
            .flat_map(|row| row.chunks(32))
            .flat_map(|block| {
                let scale = block.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let kept = half::f16::from_f32(scale).to_f32();
                block.iter().map(move |v| (v * inverse).round() * kept).collect::<Vec<_>>()
            })
            .collect(),
    }
}

/// A model on a GPU, and its reference with the same rounded weights.
struct Case {
    sizes: Sizes,
    weights: Weights,
    model: Model,
}

struct Maker<'a> {
    gpu: &'a Gpu,
    seed: u64,
    /// Matrices in int8 come as blocks of a file.
    blocks: bool,
}

impl Maker<'_> {
    fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        self.seed += 1;
        random(self.seed, len).iter().map(|v| v * scale).collect()
    }

    fn array(&mut self, len: usize, map: impl Fn(f32) -> f32) -> (DeviceBuffer<f32>, Vec<f64>) {
        let values: Vec<f32> = self.values(len, 1.0).into_iter().map(map).collect();
        (self.gpu.upload(&values).unwrap(), values.iter().map(|&v| f64::from(v)).collect())
    }

    fn matrix(
        &mut self,
        rows: usize,
        terms: usize,
        first_rows: usize,
        encoding: Encoding,
    ) -> (Packed, Vec<f64>) {
        if self.blocks && encoding == Encoding::Q8 {
            return self.matrix_of_blocks(rows, terms, first_rows);
        }
        let values = self.values(rows * terms, 1.6 / (terms as f32).sqrt());
        let buffer = self.gpu.upload(&values).unwrap();
        let source = Source::F32(buffer.slice());
        let packed = Packed::new(self.gpu, source, (rows, terms), first_rows, encoding).unwrap();
        (packed, rounded(&values, terms, encoding).iter().map(|&v| f64::from(v)).collect())
    }

    /// Blocks as a file may have them: of any numbers, -128 too, and scales of both signs.
    fn matrix_of_blocks(
        &mut self,
        rows: usize,
        terms: usize,
        first_rows: usize,
    ) -> (Packed, Vec<f64>) {
        let mut blocks = Vec::new();
        for scale in self.values(rows * terms / 32, 0.03 / (terms as f32).sqrt()) {
            blocks.extend(half::f16::from_f32(scale).to_le_bytes());
            let numbers = self.values(32, 60.0).into_iter().map(|v| v as i8);
            blocks.extend(numbers.map(|v| if v.abs() == 9 { -128i8 } else { v } as u8));
        }
        let buffer = self.gpu.upload(&blocks).unwrap();
        let from = Source::Q8_0(buffer.slice());
        let packed = Packed::new(self.gpu, from, (rows, terms), first_rows, Encoding::Q8).unwrap();
        let mut values = vec![0.0; rows * terms];
        dequantize(crate::blocks::Encoding::Q8_0, &blocks, &mut values).unwrap();
        (packed, values.into_iter().map(f64::from).collect())
    }
}

impl Case {
    fn new(gpu: &Gpu, sizes: Sizes, encoding: Encoding) -> Self {
        Self::made(Maker { gpu, seed: 100, blocks: false }, sizes, [encoding; 2])
    }

    /// With W_x, and the other matrices, in an encoding.
    fn made(mut make: Maker<'_>, sizes: Sizes, [small, encoding]: [Encoding; 2]) -> Self {
        let Sizes { width: d, inner: e, states: n, rank: r, taps: w, classes: v, .. } = sizes;
        let norm = |make: &mut Maker<'_>| {
            let (weight, weight_values) = make.array(d, |v| 1.0 + 0.3 * v);
            let (bias, bias_values) = make.array(d, |v| 0.2 * v);
            let (bias, bias_values) =
                if sizes.centred { (Some(bias), bias_values) } else { (None, vec![0.0; d]) };
            (NormWeights { weight, bias }, [weight_values, bias_values])
        };
        let (embedding, embedding_values) = make.matrix(v, d, v, encoding);
        let (mut layers, mut references) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let (norm, norm_values) = norm(&mut make);
            let (input, input_values) = make.matrix(2 * e, d, e, encoding);
            let (selection, selection_values) = make.matrix(r + 2 * n, e, r + 2 * n, small);
            let (delta, delta_values) = make.matrix(e, r, e, Encoding::Bf16);
            let (output, output_values) = make.matrix(d, e, d, encoding);
            let (taps, taps_values) = make.array(e * w, |v| v);
            let (input_bias, input_bias_values) = make.array(2 * e, |v| 0.3 * v);
            let (tap_bias, tap_bias_values) = make.array(e, |v| 0.3 * v);
            let (delta_bias, delta_bias_values) = make.array(e, |v| v - 1.0);
            let (output_bias, output_bias_values) = make.array(d, |v| 0.3 * v);
            let (a, a_values) = make.array(e * n, |v| -0.5 - v.abs());
            let (d, d_values) = make.array(e, |v| v);
            layers.push(LayerWeights {
                norm,
                input,
                input_bias: Some(input_bias),
                taps,
                tap_bias: Some(tap_bias),
                selection,
                delta,
                delta_bias: Some(delta_bias),
                a,
                d,
                output,
                output_bias: Some(output_bias),
            });
            references.push(Layer {
                norm: norm_values,
                input: input_values,
                input_bias: input_bias_values,
                taps: taps_values,
                tap_bias: tap_bias_values,
                selection: selection_values,
                delta: delta_values,
                delta_bias: delta_bias_values,
                a: a_values,
                d: d_values,
                output: output_values,
                output_bias: output_bias_values,
            });
        }
        let (norm, norm_values) = norm(&mut make);
        Self {
            sizes,
            weights: Weights { embedding, layers, norm, head: None },
            model: Model {
                sizes,
                embedding: embedding_values,
                layers: references,
                norm: norm_values,
            },
        }
    }

    fn fresh(&self, gpu: &Gpu, slots: usize) -> Vec<LayerState> {
        let fresh = || LayerState::fresh(gpu, &self.sizes, slots).unwrap();
        self.weights.layers.iter().map(|_| fresh()).collect()
    }
}

/// Steps of sequences in a batch; `slots[i]` is the slot of column i.
struct Running<'a> {
    gpu: &'a Gpu,
    case: &'a Case,
    step: Step,
    states: Vec<LayerState>,
    slots: DeviceBuffer<i32>,
    columns: usize,
}

impl<'a> Running<'a> {
    fn new(gpu: &'a Gpu, case: &'a Case, slots: &[i32], slot_count: usize) -> Self {
        Self {
            gpu,
            case,
            step: Step::new(gpu, &case.sizes, slots.len()).unwrap(),
            states: case.fresh(gpu, slot_count),
            slots: gpu.upload(slots).unwrap(),
            columns: slots.len(),
        }
    }

    /// Logits [columns, V].
    fn next(&mut self, ids: &[u32]) -> Vec<f32> {
        let ids = self.gpu.upload(ids).unwrap();
        // SAFETY: the slots are below the number of slots and differ.
        unsafe {
            self.step
                .run(&self.case.weights, &self.states, &ids, &self.slots, self.columns)
                .unwrap();
        }
        let logits = self.step.logits().read().unwrap();
        logits[..self.columns * self.case.sizes.classes].to_vec()
    }
}

fn id_of(sequence: usize, step: usize, classes: usize) -> u32 {
    ((sequence * 31 + step * 17 + 5) % classes) as u32
}

fn floats(state: &Tensor) -> Vec<f32> {
    state.cast(DType::F32).unwrap().to_vec().unwrap()
}

/// Norm of the difference over the norm of what is wanted.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let squares: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
    (squares / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
}

#[test]
fn cuda_packed_blocks_keep_their_numbers_and_scales() {
    for gpu in gpus() {
        // Two parts of rows that fill no tile.
        let (rows, terms, first_rows) = (41, 96, 19);
        let blocks: Vec<u8> =
            random(3, rows * terms / 32 * 34).iter().map(|v| (v * 1e4) as i32 as u8).collect();
        let buffer = gpu.upload(&blocks).unwrap();
        let from = Source::Q8_0(buffer.slice());
        let packed = Packed::new(&gpu, from, (rows, terms), first_rows, Encoding::Q8).unwrap();
        let packed = packed.read().unwrap();
        for (at, block) in blocks.chunks(34).enumerate() {
            let (row, block_of_row) = (at / (terms / 32), at % (terms / 32));
            let row = if row < first_rows { row } else { row - first_rows + 32 };
            let (tile, r) = (row / 16, row % 16);
            let own = &packed[(tile * (terms / 32) + block_of_row) * 544..][..544];
            // layout.cuh; a scale that is no number is one still.
            let scale = 512 + r % 8 * 4 + r / 8 * 2;
            let half = |bytes: &[u8]| half::f16::from_le_bytes([bytes[0], bytes[1]]);
            let (kept, given) = (half(&own[scale..]), half(block));
            assert!(kept.to_bits() == given.to_bits() || kept.is_nan() && given.is_nan());
            for (k, &number) in block[2..].iter().enumerate() {
                let lane = r % 8 * 4 + k / 8;
                let byte = k % 2 * 2 + k % 4 / 2;
                assert_eq!(own[lane * 16 + (k % 8 / 4 * 2 + r / 8) * 4 + byte], number);
            }
        }
    }
}

#[test]
fn cuda_steps_follow_the_reference() {
    for gpu in gpus() {
        // A file's blocks beside floats.
        let whole = Sizes { width: 64, inner: 96, ..plain() };
        let make = Maker { gpu: &gpu, seed: 100, blocks: true };
        let of_file = Case::made(make, whole, [Encoding::Bf16, Encoding::Q8]);
        let made = [(plain(), Encoding::Bf16), (narrow(), Encoding::Q8), (odd(), Encoding::Bf16)]
            .map(|(sizes, encoding)| Case::new(&gpu, sizes, encoding));
        for case in made.into_iter().chain([of_file]) {
            let (sizes, encoding) = (case.sizes, case.weights.embedding.encoding());
            let mut running = Running::new(&gpu, &case, &[2, 0, 3], 4);
            let mut states: Vec<State> = (0..3).map(|_| case.model.fresh()).collect();
            for step in 0..3 {
                let ids: Vec<u32> = (0..3).map(|s| id_of(s, step, sizes.classes)).collect();
                let logits = running.next(&ids);
                for (s, state) in states.iter_mut().enumerate() {
                    let want = case.model.step(ids[s] as usize, state);
                    let got = &logits[s * sizes.classes..(s + 1) * sizes.classes];
                    // Some activations lie so near to the middle of two bf16 that f32 rounds them the other way.
                    let off = distance(got, &want);
                    assert!(off < 1e-3, "{encoding:?}, step {step}, sequence {s}: {off:e}");
                }
            }
            for (layer, state) in running.states.iter().enumerate() {
                let (tail, h) = (state.tail.to_vec::<f32>().unwrap(), floats(&state.state));
                for (sequence, slot) in [2, 0, 3].into_iter().enumerate() {
                    let (tail_want, h_want) = &states[sequence][layer];
                    let part = |values: &[f32], len: usize| values[slot * len..][..len].to_vec();
                    let off = distance(&part(&tail, tail_want.len()), tail_want);
                    assert!(off < 1e-3, "tail of layer {layer}: {off:e}");
                    let off = distance(&part(&h, h_want.len()), h_want);
                    assert!(off < 1e-3, "state of layer {layer}: {off:e}");
                }
                // The slot of nobody is left alone.
                let inner = sizes.inner;
                assert!(
                    h[inner * sizes.states..][..inner * sizes.states].iter().all(|&v| v == 0.0)
                );
            }
        }
    }
}

/// Logits of the first two steps of some sequences, each alone.
fn alone(gpu: &Gpu, case: &Case, sequences: &[usize]) -> Vec<Vec<Vec<f32>>> {
    let of = |&sequence: &usize| {
        let mut running = Running::new(gpu, case, &[0], 1);
        (0..2).map(|step| running.next(&[id_of(sequence, step, case.sizes.classes)])).collect()
    };
    sequences.iter().map(of).collect()
}

/// How a step of many multiplies.
#[derive(Debug, Clone, Copy)]
enum Way {
    OfTheCard,
    WithoutGroups,
    /// In blocks as large as they can be.
    LargeBlocks,
}

/// Steps the first `columns` sequences together and compares some with what they were alone.
fn expect_bits_of_alone(
    gpu: &Gpu,
    case: &Case,
    columns: usize,
    way: Way,
    sequences: &[usize],
    alone: &[Vec<Vec<f32>>],
) {
    let classes = case.sizes.classes;
    // One column in seven has no sequence.
    let slots: Vec<i32> =
        (0..columns as i32).map(|c| if c % 7 == 6 { -1 } else { columns as i32 - 1 - c }).collect();
    let mut running = Running::new(gpu, case, &slots, columns);
    running.step = match way {
        Way::OfTheCard => running.step,
        Way::WithoutGroups => running.step.without_groups(),
        Way::LargeBlocks => running.step.on_one_multiprocessor(),
    };
    for step in 0..2 {
        let ids: Vec<u32> = (0..columns).map(|s| id_of(s, step, classes)).collect();
        let logits = running.next(&ids);
        for (&sequence, alone) in sequences.iter().zip(alone).filter(|(s, _)| **s < columns) {
            let got = &logits[sequence * classes..(sequence + 1) * classes];
            let same = got.iter().zip(&alone[step]).all(|(a, b)| a.to_bits() == b.to_bits());
            let encoding = case.weights.embedding.encoding();
            assert!(same, "{encoding}, {way:?}: sequence {sequence} of {columns}, step {step}");
        }
    }
}

#[test]
fn cuda_steps_of_a_batch_have_the_bits_of_each_sequence_alone() {
    for gpu in gpus() {
        for encoding in [Encoding::Bf16, Encoding::Q8] {
            let case = Case::new(&gpu, plain(), encoding);
            let sequences = [0, 9, 39];
            let alone = alone(&gpu, &case, &sequences);
            // Each number of columns cuts the products in another way.
            use Way::{LargeBlocks, OfTheCard, WithoutGroups};
            let all: &[(usize, Way)] = match encoding {
                Encoding::Bf16 => &[
                    (2, OfTheCard),
                    (11, OfTheCard),
                    (25, OfTheCard),
                    (40, OfTheCard),
                    (40, WithoutGroups),
                    (72, LargeBlocks),
                ],
                Encoding::Q8 => &[(40, OfTheCard), (40, WithoutGroups)],
            };
            for &(columns, way) in all {
                expect_bits_of_alone(&gpu, &case, columns, way, &sequences, &alone);
            }
        }
    }
}

/// Sums of many terms, in stages of three blocks and through warps' rings; a Δ of high rank, tiles that are not full, three
/// taps and norms of the selection with many sequences; on a card, real models' sizes.
#[test]
fn cuda_steps_of_long_sums_have_the_bits_of_each_sequence_alone() {
    let small = |width, inner| Sizes { width, inner, states: 4, ..plain() };
    let real = |width, rank| Sizes { width, inner: 2 * width, rank, classes: 3000, ..plain() };
    for gpu in gpus() {
        let cases: &[(Sizes, &[usize], &[Encoding])] = match gpu.is_emulated() {
            true => &[
                (small(768, 64), &[33], &[Encoding::Bf16]),
                (
                    Sizes { rank: 100, taps: 3, selection_eps: Some(1e-6), ..small(64, 70) },
                    &[35],
                    &[Encoding::Bf16],
                ),
                (small(1056, 96), &[12], &[Encoding::Bf16]),
                (small(1056, 96), &[25], &[Encoding::Q8]),
            ],
            false => &[
                (real(768, 48), &[8, 33, 64, 128, 200], &[Encoding::Bf16, Encoding::Q8]),
                (real(2560, 160), &[8, 16, 32, 64, 128, 256], &[Encoding::Bf16, Encoding::Q8]),
                (real(2048, 128), &[200], &[Encoding::Bf16]),
            ],
        };
        for &(sizes, columns, encodings) in cases {
            for &encoding in encodings {
                let case = Case::new(&gpu, sizes, encoding);
                let most = columns.iter().copied().max().unwrap_or(0);
                let sequences = [0, 5, 32, 121, 198].into_iter().filter(|&s| s < most);
                let sequences: Vec<usize> = sequences.collect();
                let alone = alone(&gpu, &case, &sequences);
                for &columns in columns {
                    expect_bits_of_alone(&gpu, &case, columns, Way::OfTheCard, &sequences, &alone);
                }
            }
        }
    }
}

#[test]
fn cuda_weights_of_another_size_are_refused() {
    for gpu in gpus() {
        let case = Case::new(&gpu, plain(), Encoding::Bf16);
        let wrong = Sizes { rank: 6, ..case.sizes };
        let error = case.weights.check(&wrong).unwrap_err().to_string();
        assert!(error.contains("x_proj") && error.contains("[38, 80]"), "{error}");
        let running = Running::new(&gpu, &case, &[0], 1);
        let ids = gpu.upload(&[1u32, 2]).unwrap();
        // SAFETY: refused before anything is launched.
        let outcome =
            unsafe { running.step.run(&case.weights, &running.states, &ids, &running.slots, 2) };
        assert!(outcome.unwrap_err().to_string().contains("2 columns, room for 1"));
    }
}
