//! The parameters of a model as decode steps want them.

use std::collections::HashMap;

use elapid_formats::ModelSource;
use elapid_models::{LanguageModel, NormKind};
use elapid_ops::blocks::{self, q8_0};
use elapid_ops::decode_step::{Encoding, LayerWeights, NormWeights, Packed, Source, Weights};
use elapid_tensor::cuda::{DeviceBuffer, Gpu};
use elapid_tensor::{DType, Tensor};

use crate::{Error, Result};

/// How a matrix is kept that is stored so, if nothing else is `wanted`: blocks of integers as int8.
pub(super) fn kept(stored: Option<blocks::Encoding>, wanted: Option<Encoding>) -> Encoding {
    let own = match stored {
        Some(stored) if stored.is_quantized() => Encoding::Q8,
        _ => Encoding::Bf16,
    };
    wanted.unwrap_or(own)
}

/// Packs the weights of a model that is on `gpu`. Where `source`, which it was loaded from, has blocks that int8 can keep as
/// they are, these are taken.
pub(super) fn weights(
    gpu: &Gpu,
    model: &mut LanguageModel,
    source: Option<&ModelSource>,
    wanted: Option<Encoding>,
) -> Result<Weights> {
    let config = model.config().clone();
    let mut tensors = HashMap::new();
    model.visit(&mut |parameter| {
        tensors.insert(parameter.name, parameter.tensor.detach());
        Ok(())
    })?;
    let parameters = Parameters { gpu, tensors, source };
    let (d, e, n, r) = (config.d_model, config.d_inner(), config.d_state, config.dt_rank());
    let classes = config.padded_vocab_size();
    let norm = |name: &str| -> Result<NormWeights> {
        Ok(NormWeights {
            weight: parameters.array(&format!("{name}.weight"))?,
            bias: match config.norm {
                NormKind::Rms => None,
                NormKind::Layer => Some(parameters.array(&format!("{name}.bias"))?),
            },
        })
    };
    let layer = |index: usize| -> Result<LayerWeights> {
        let layer = format!("backbone.layers.{index}");
        let name = |field: &str| format!("{layer}.mixer.{field}");
        let matrix = |field: &str, rows: usize, terms: usize, first: usize, wanted| {
            parameters.matrix(&name(field), (rows, terms), first, wanted)
        };
        let a = parameters.get(&name("A_log"))?;
        let a = elapid_ops::elementwise::neg_exp(a)?;
        Ok(LayerWeights {
            norm: norm(&format!("{layer}.norm"))?,
            input: matrix("in_proj.weight", 2 * e, d, e, wanted)?,
            input_bias: parameters.optional(&name("in_proj.bias"))?,
            taps: parameters.array(&name("conv1d.weight"))?,
            tap_bias: parameters.optional(&name("conv1d.bias"))?,
            selection: matrix("x_proj.weight", r + 2 * n, e, r + 2 * n, wanted)?,
            delta: matrix("dt_proj.weight", e, r, e, Some(Encoding::Bf16))?,
            delta_bias: parameters.optional(&name("dt_proj.bias"))?,
            a: a.device_slice::<f32>()?.duplicate(gpu)?,
            d: parameters.array(&name("D"))?,
            output: matrix("out_proj.weight", d, e, d, wanted)?,
            output_bias: parameters.optional(&name("out_proj.bias"))?,
        })
    };
    let head = match config.tie_embeddings {
        true => None,
        false => Some(parameters.matrix("lm_head.weight", (classes, d), classes, wanted)?),
    };
    Ok(Weights {
        embedding: parameters.matrix(
            "backbone.embeddings.weight",
            (classes, d),
            classes,
            wanted,
        )?,
        layers: (0..config.n_layer).map(layer).collect::<Result<_>>()?,
        norm: norm("backbone.norm_f")?,
        head,
    })
}

/// The model's parameters by name.
struct Parameters<'a> {
    gpu: &'a Gpu,
    tensors: HashMap<String, Tensor>,
    source: Option<&'a ModelSource>,
}

impl Parameters<'_> {
    fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::Option {
            name: "model",
            expected: "the parameters of a Mamba language model",
            found: format!("none of the name {name}"),
        })
    }

    fn array(&self, name: &str) -> Result<DeviceBuffer<f32>> {
        Ok(self.get(name)?.device_slice::<f32>()?.duplicate(self.gpu)?)
    }

    fn optional(&self, name: &str) -> Result<Option<DeviceBuffer<f32>>> {
        match self.tensors.contains_key(name) {
            true => Ok(Some(self.array(name)?)),
            false => Ok(None),
        }
    }

    fn matrix(
        &self,
        name: &str,
        shape: (usize, usize),
        first_rows: usize,
        wanted: Option<Encoding>,
    ) -> Result<Packed> {
        let tensor = self.get(name)?.cast(DType::F32)?;
        let stored = self.source.and_then(|source| source.get(name));
        let encoding = kept(stored.map(|stored| stored.encoding), wanted);
        let blocks = stored
            .filter(|_| encoding == Encoding::Q8)
            .and_then(|stored| q8_0::exactly(stored.encoding, &stored.bytes))
            .map(|blocks| self.gpu.upload(&blocks))
            .transpose()?;
        let source = match &blocks {
            Some(blocks) => Source::Q8_0(blocks.slice()),
            None => Source::F32(tensor.device_slice::<f32>()?),
        };
        Ok(Packed::new(self.gpu, source, shape, first_rows, encoding)?)
    }
}

#[cfg(test)]
mod tests {
    use elapid_formats::gguf::{Plan, WeightTypes, save_gguf, vocabulary_of};
    use elapid_formats::hf;
    use elapid_models::MambaConfig;
    use elapid_tensor::{DType, Device};

    use super::*;

    /// A file whose projections are blocks that nobody would get by rounding the values that they stand for.
    fn file(folder: &std::path::Path, blocks: blocks::Encoding) -> ModelSource {
        let config = MambaConfig { tie_embeddings: false, ..MambaConfig::bytes(32, 1) };
        let (from, to) = (folder.join("hf"), folder.join("model.gguf"));
        hf::save_model(&from, &mut LanguageModel::new(&config, 5).unwrap(), DType::F32).unwrap();
        let source = ModelSource::open(&from).unwrap();
        let types = WeightTypes { projections: Some(blocks), embedding: None };
        let plan = Plan::new(&source, types).unwrap();
        let vocabulary = vocabulary_of(&source).unwrap();
        save_gguf(&source, &plan, vocabulary, &to, &mut |_| {}).unwrap();
        let mut bytes = std::fs::read(&to).unwrap();
        let written = ModelSource::open(&to).unwrap();
        for name in written.names() {
            let tensor = written.get(name).unwrap();
            if tensor.encoding != blocks::Encoding::Q8_0 {
                continue;
            }
            let own: &[u8] = &tensor.bytes;
            let at = bytes.windows(own.len()).position(|window| window == own).unwrap();
            for block in bytes[at..at + own.len()].chunks_mut(q8_0::BYTES) {
                // No number is the largest, some are the smallest that there is.
                for (i, number) in block[2..].iter_mut().enumerate() {
                    let smaller = i32::from(*number as i8) * 90 / 127;
                    *number = if i == 7 && smaller < -60 { -128 } else { smaller } as i8 as u8;
                }
            }
        }
        std::fs::write(&to, bytes).unwrap();
        ModelSource::open(&to).unwrap()
    }

    #[test]
    fn blocks_of_a_file_are_kept_as_they_are() {
        let gpu = match Gpu::emulated() {
            Ok(gpu) => gpu,
            Err(error) => {
                eprintln!("SKIPPED: blocks of a file on the emulation: {error}");
                return;
            }
        };
        for stored in [blocks::Encoding::Q8_0, blocks::Encoding::Q4_0] {
            let folder = tempfile::tempdir().unwrap();
            let source = file(folder.path(), stored);
            let mut model = source.load().unwrap();
            model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
            let own = weights(&gpu, &mut model, Some(&source), None).unwrap();
            let rounded = weights(&gpu, &mut model, None, Some(Encoding::Q8)).unwrap();
            let layer = |field: &str| format!("backbone.layers.0.mixer.{field}.weight");
            let pick = |all: &Weights| {
                let layer = &all.layers[0];
                let packed = [&all.embedding, &layer.input, &layer.selection, &layer.output];
                packed.into_iter().chain(&all.head).map(|p| p.read().unwrap()).collect::<Vec<_>>()
            };
            let names = [
                ("backbone.embeddings.weight".to_owned(), (256, 32), 256),
                (layer("in_proj"), (128, 32), 64),
                (layer("x_proj"), (34, 64), 34),
                (layer("out_proj"), (32, 64), 32),
                ("lm_head.weight".to_owned(), (256, 32), 256),
            ];
            for ((name, shape, first_rows), (own, rounded)) in
                names.into_iter().zip(pick(&own).into_iter().zip(pick(&rounded)))
            {
                let tensor = source.get(&name).unwrap();
                assert_eq!(tensor.encoding, stored, "{name}");
                let blocks = q8_0::exactly(stored, &tensor.bytes).unwrap();
                let blocks = gpu.upload(&blocks).unwrap();
                let from = Source::Q8_0(blocks.slice());
                let expected = Packed::new(&gpu, from, shape, first_rows, Encoding::Q8).unwrap();
                assert!(own == expected.read().unwrap(), "{name}");
                assert!(own != rounded, "{name}");
            }
            // In bf16, their values.
            let narrow = weights(&gpu, &mut model, Some(&source), Some(Encoding::Bf16)).unwrap();
            let values = weights(&gpu, &mut model, None, Some(Encoding::Bf16)).unwrap();
            assert!(pick(&narrow) == pick(&values));
        }
    }
}
