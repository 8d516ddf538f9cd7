//! The parameters of a model as decode steps want them.

use std::collections::HashMap;

use elapid_models::{LanguageModel, NormKind};
use elapid_ops::decode_step::{Encoding, LayerWeights, NormWeights, Packed, Source, Weights};
use elapid_tensor::Tensor;
use elapid_tensor::cuda::{DeviceBuffer, Gpu};

use crate::{Error, Result};

/// Packs the weights of a model that is on `gpu`.
pub(super) fn weights(gpu: &Gpu, model: &mut LanguageModel, encoding: Encoding) -> Result<Weights> {
    let config = model.config().clone();
    let mut tensors = HashMap::new();
    model.visit(&mut |parameter| {
        tensors.insert(parameter.name, parameter.tensor.detach());
        Ok(())
    })?;
    let parameters = Parameters { gpu, tensors };
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
        let matrix = |field: &str, rows: usize, terms: usize, first: usize, encoding: Encoding| {
            parameters.matrix(&name(field), (rows, terms), first, encoding)
        };
        let a = parameters.get(&name("A_log"))?;
        let a = elapid_ops::elementwise::neg_exp(a)?;
        Ok(LayerWeights {
            norm: norm(&format!("{layer}.norm"))?,
            input: matrix("in_proj.weight", 2 * e, d, e, encoding)?,
            input_bias: parameters.optional(&name("in_proj.bias"))?,
            taps: parameters.array(&name("conv1d.weight"))?,
            tap_bias: parameters.optional(&name("conv1d.bias"))?,
            selection: matrix("x_proj.weight", r + 2 * n, e, r + 2 * n, encoding)?,
            delta: matrix("dt_proj.weight", e, r, e, Encoding::Bf16)?,
            delta_bias: parameters.optional(&name("dt_proj.bias"))?,
            a: a.device_slice::<f32>()?.duplicate(gpu)?,
            d: parameters.array(&name("D"))?,
            output: matrix("out_proj.weight", d, e, d, encoding)?,
            output_bias: parameters.optional(&name("out_proj.bias"))?,
        })
    };
    let head = match config.tie_embeddings {
        true => None,
        false => Some(parameters.matrix("lm_head.weight", (classes, d), classes, encoding)?),
    };
    Ok(Weights {
        embedding: parameters.matrix(
            "backbone.embeddings.weight",
            (classes, d),
            classes,
            encoding,
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
        encoding: Encoding,
    ) -> Result<Packed> {
        let source = Source::F32(self.get(name)?.device_slice::<f32>()?);
        Ok(Packed::new(self.gpu, source, shape, first_rows, encoding)?)
    }
}
