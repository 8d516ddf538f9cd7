//! Whether decode steps compute what the model does, which has been checked against the reference: a few tokens, one by
//! one, against the same tokens read at once. The packed weights and the kernels of steps are seen through the states that
//! they leave in each layer, first to last, and the logits. What other numbers of sequences run through, other cuts and other
//! kernels, has the bits of one sequence or is wrong.

use std::ops::ControlFlow;

use elapid_models::State;
use elapid_tensor::{DType, Sequence, Sequences, Tensor};
use rayon::prelude::*;

use super::GpuEngine;
use crate::{Error, Logits, ModelRunner, Result, Runner};

/// What rounding of weights and activations explains, as a share of the norm of what is expected: several times what deep
/// models show. Values of a wrong kernel or of other weights are off by about all of it.
const TOLERANCE: f64 = 0.25;

/// By how much a right layer multiplies at most what is off before it, where that is more than [`TOLERANCE`] explains: with
/// weights as large as those of models that nobody trained, rounding grows from layer to layer (2.8 times at most once it
/// shows, in such a model of 12 layers). A wrong layer behind right ones is off by far more; what comes after a quarter of
/// the norm is off cannot be judged any more.
const GROWTH: f64 = 4.0;

/// Sequences of the steps that must have the bits of one: of one to a few tiles of columns, and of kernels for many.
const SEVERAL: [usize; 4] = [3, 9, 17, 40];

impl GpuEngine<'_> {
    /// As [`GpuEngine::check`], and steps of several and of many sequences, for which kernels of their own are loaded.
    ///
    /// # Errors
    /// As [`GpuEngine::check`].
    pub fn check_all(&mut self) -> Result<usize> {
        let mut values = self.check()?;
        let last = self.model.config().vocab_size.saturating_sub(1);
        let id = u32::try_from(last / 2).unwrap_or(0);
        let (alone, alone_state) = self.equal_sequences(1, id)?;
        for count in SEVERAL {
            let (logits, state) = self.equal_sequences(count, id)?;
            for (slot, own) in logits.chunks_exact(alone.len().max(1)).enumerate() {
                same_bits("logits", slot, count, own, &alone)?;
            }
            for (layer, (own, expected)) in state.layers.iter().zip(&alone_state.layers).enumerate()
            {
                for name in ["conv_state", "ssm_state"] {
                    let (Some(own), Some(expected)) = (own.get(name), expected.get(name)) else {
                        continue;
                    };
                    let expected = expected.to_vec::<f32>()?;
                    let tensor = format!("backbone.layers.{layer}.mixer.{name}");
                    let own = own.to_vec::<f32>()?;
                    for (slot, own) in own.chunks_exact(expected.len().max(1)).enumerate() {
                        same_bits(&tensor, slot, count, own, &expected)?;
                    }
                    values += own.len();
                }
            }
            values += logits.len();
        }
        self.steps = None;
        Ok(values)
    }

    /// Logits and states of two steps of so many sequences with the same token.
    fn equal_sequences(&mut self, count: usize, id: u32) -> Result<(Vec<f32>, State)> {
        let (mut logits, mut state) = (Vec::new(), self.fresh_state(count)?);
        self.steps = None;
        for position in 0..2 {
            let one = |slot| Sequence {
                start: slot,
                len: 1,
                slot,
                continued: true,
                position,
                id: slot as u64,
            };
            let sequences: Vec<Sequence> = (0..count).map(one).collect();
            (logits, state) = self.logits(&vec![id; count], &sequences, state)?;
        }
        Ok((logits, state))
    }

    /// Compares decode steps with the model; returns how many values were compared. Steps that were made before are
    /// forgotten.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] with the first layer whose steps are wrong, or if the GPU fails.
    pub fn check(&mut self) -> Result<usize> {
        let last = self.model.config().vocab_size.saturating_sub(1);
        // So many that each tap of the convolution reads one.
        let count = self.model.config().d_conv.max(2);
        let ids: Vec<u32> =
            (0..count).map(|i| u32::try_from(last / (i + 2)).unwrap_or(0)).collect();
        let mut logits = Vec::new();
        let mut receive = |given: Logits<'_>| {
            logits = given.values.to_vec();
            ControlFlow::Continue(())
        };
        let at_once = Sequences::fresh(&[count]);
        let mut model = ModelRunner::new(self.model);
        let expected = model.run(&ids, &at_once, None, &[count - 1], &mut receive)?;

        let (mut state, mut own) = (self.fresh_state(1)?, Vec::new());
        for (position, id) in ids.iter().enumerate() {
            let position = position as u64;
            let one = Sequence { start: 0, len: 1, slot: 0, continued: true, position, id: 0 };
            (own, state) = self.logits(std::slice::from_ref(id), &[one], state)?;
        }
        self.steps = None;
        let mut comparison = Comparison::default();
        comparison.of_states(&state, &expected)?;
        comparison.judge("logits", "the last token", &Difference::between(&own, &logits))?;
        Ok(comparison.values)
    }
}

/// # Errors
/// [`Error::SelfCheck`] with the first value of one of `count` equal sequences that is not that of one alone.
fn same_bits(
    tensor: &str,
    slot: usize,
    count: usize,
    found: &[f32],
    expected: &[f32],
) -> Result<()> {
    let mut pairs = found.iter().zip(expected).enumerate();
    match pairs.find(|(_, (found, expected))| found.to_bits() != expected.to_bits()) {
        None => Ok(()),
        Some((at, (found, expected))) => Err(Error::SelfCheck {
            tensor: tensor.into(),
            place: format!("sequence {slot} of {count} equal ones, index {at}"),
            expected: f64::from(*expected),
            found: f64::from(*found),
        }),
    }
}

/// What was compared, first to last.
#[derive(Debug, Default)]
struct Comparison {
    /// Number of values.
    values: usize,
    /// The largest difference so far, as a share of the norm of what was expected.
    worst: f64,
}

impl Comparison {
    fn of_states(&mut self, found: &State, expected: &State) -> Result<()> {
        let (mut places, mut tensors) = (Vec::new(), Vec::new());
        for (layer, (found, expected)) in found.layers.iter().zip(&expected.layers).enumerate() {
            // The convolution's comes before the scan's.
            for name in ["conv_state", "ssm_state"] {
                let (Some(found), Some(expected)) = (found.get(name), expected.get(name)) else {
                    continue;
                };
                places.push((layer, name));
                tensors.extend([found.cast(DType::F32)?, expected.cast(DType::F32)?]);
            }
        }
        let tensors = Tensor::all_to_host(&tensors)?;
        let values = tensors.iter().map(Tensor::data::<f32>).collect::<Result<Vec<_>, _>>()?;
        let compared: Vec<Difference<'_>> =
            values.par_chunks_exact(2).map(|pair| Difference::between(pair[0], pair[1])).collect();
        for ((layer, name), difference) in places.iter().zip(&compared) {
            self.judge(&format!("backbone.layers.{layer}.mixer"), name, difference)?;
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::SelfCheck`] if values are off by more than rounding explains.
    fn judge(&mut self, tensor: &str, what: &str, difference: &Difference<'_>) -> Result<()> {
        let Difference { found, expected, off, norm } = *difference;
        // False also if one of them is no number.
        let near = off <= TOLERANCE.max(GROWTH * self.worst) * norm;
        if near && found.len() == expected.len() {
            self.values += found.len();
            // Nothing differs from zeros that are expected.
            self.worst = self.worst.max(if norm == 0.0 { 0.0 } else { off / norm });
            return Ok(());
        }
        let (at, found, expected) = difference.worst();
        let place = format!("{what} of decode steps, index {at}");
        Err(Error::SelfCheck { tensor: tensor.into(), place, expected, found })
    }
}

/// Values beside those that are expected.
struct Difference<'a> {
    found: &'a [f32],
    expected: &'a [f32],
    /// Norm of the difference.
    off: f64,
    /// Norm of what is expected.
    norm: f64,
}

impl<'a> Difference<'a> {
    fn between(found: &'a [f32], expected: &'a [f32]) -> Self {
        let (mut off, mut norm) = (0.0, 0.0);
        for pair in found.iter().zip(expected) {
            off += square_off(pair);
            norm += f64::from(*pair.1).powi(2);
        }
        Self { found, expected, off: off.sqrt(), norm: norm.sqrt() }
    }

    /// Index of the pair that is furthest off, and what was found and expected there.
    fn worst(&self) -> (usize, f64, f64) {
        let worst = self.found.iter().zip(self.expected).enumerate().max_by(|(_, a), (_, b)| {
            let [a, b] = [a, b].map(|pair| square_off(*pair));
            // What is no number is the worst.
            a.is_nan().cmp(&b.is_nan()).then(a.total_cmp(&b))
        });
        worst.map_or((0, 0.0, 0.0), |(at, (f, e))| (at, f64::from(*f), f64::from(*e)))
    }
}

fn square_off((found, expected): (&f32, &f32)) -> f64 {
    (f64::from(*found) - f64::from(*expected)).powi(2)
}

#[cfg(test)]
mod tests {
    use elapid_models::{LanguageModel, MambaConfig, NormKind};
    use elapid_ops::decode_step::{Encoding, Packed, Source};
    use elapid_tensor::Device;
    use elapid_tensor::cuda::Gpu;

    use super::*;

    /// Projections as transformers draws them for a model that nobody trained: rounding grows from layer to layer.
    #[test]
    fn sound_steps_of_a_model_whose_rounding_grows_pass() {
        let Ok(gpu) = Gpu::emulated() else {
            eprintln!("SKIPPED: the check of decode steps on the emulation: no compiler");
            return;
        };
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 12), 7).unwrap();
        model
            .visit(&mut |parameter| {
                if parameter.name.contains("proj") && parameter.tensor.shape().len() == 2 {
                    let values = parameter.tensor.to_vec::<f32>()?;
                    let values: Vec<f32> = values.iter().map(|value| 5.0 * value).collect();
                    *parameter.tensor = Tensor::from_slice(&values, parameter.tensor.shape())?;
                }
                Ok(())
            })
            .unwrap();
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        let mut engine = GpuEngine::new(&mut model, Encoding::Bf16).unwrap();
        engine.check().unwrap();
    }

    #[test]
    fn sound_steps_pass_and_those_of_other_weights_are_found() {
        let gpu = match Gpu::emulated() {
            Ok(gpu) => gpu,
            Err(error) => {
                eprintln!("SKIPPED: the check of decode steps on the emulation: {error}");
                return;
            }
        };
        let bytes = MambaConfig::bytes(32, 3);
        let layer_norm = MambaConfig { norm: NormKind::Layer, bias: true, ..bytes.clone() };
        let normed = MambaConfig { mixer_rms_eps: Some(1e-6), ..bytes.clone() };
        for (config, encoding, state) in [
            (&bytes, Encoding::Bf16, DType::F32),
            (&bytes, Encoding::Q8, DType::BF16),
            (&layer_norm, Encoding::Q8, DType::F32),
            (&normed, Encoding::Bf16, DType::F32),
        ] {
            let mut model = LanguageModel::new(config, 7).unwrap();
            model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
            let engine = GpuEngine::new(&mut model, encoding).unwrap();
            let mut engine = engine.with_state(state).unwrap();
            let once = engine.check().unwrap();
            assert!(once > 3 * 64 * (3 + 16));
            let sequences: usize = SEVERAL.iter().sum();
            assert!(engine.check_all().unwrap() > once + sequences * 3 * 64 * (3 + 16));
            // W_x of the second layer, and the head, as they would be damaged.
            let other = |rows: usize, terms: usize, value: f32| {
                let values = gpu.upload(&vec![value; rows * terms]).unwrap();
                let from = Source::F32(values.slice());
                Packed::new(&gpu, from, (rows, terms), rows, encoding).unwrap()
            };
            let own =
                std::mem::replace(&mut engine.weights.layers[1].selection, other(34, 64, 0.1));
            let error = engine.check().unwrap_err().to_string();
            let words = ["self-check", "backbone.layers.1.mixer", "ssm_state of decode steps"];
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
            engine.weights.layers[1].selection = own;
            engine.check().unwrap();
            engine.weights.head = Some(other(256, 32, f32::NAN));
            let error = engine.check().unwrap_err().to_string();
            assert!(error.contains("logits is wrong"), "{error}");
        }
    }
}
