//! A model's parameters as the engine uses them: projections and embedding in the encoding that they are stored in
//! or that was asked for, everything else in f32 and in the order of its use.

use elapid_formats::{Bytes, ModelSource, StoredTensor};
use elapid_models::{LanguageModel, MambaConfig, NormKind};
use elapid_ops::blocks::{Encoding, dequantize, quantize_into};
use elapid_ops::mamba_step::{Convolution, Normalization, Parameters, Scan};
use elapid_ops::quantized_linear::Weight;
use elapid_tensor::Tensor;

use crate::{Error, Result};

/// Elements converted at a time.
const PIECE: usize = 1 << 20;

/// A weight [rows, columns] and its bias.
pub(super) struct Matrix {
    pub encoding: Encoding,
    pub rows: usize,
    pub columns: usize,
    bytes: Bytes,
    pub bias: Option<Vec<f32>>,
}

impl Matrix {
    /// As products take it.
    pub(super) fn weight(&self) -> Weight<'_> {
        Weight::new(self.encoding, self.rows, self.columns, &self.bytes)
            .unwrap_or_else(|_| unreachable!("checked when it was made"))
    }

    /// Bytes in memory or in the file.
    pub(super) fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// One block.
pub(super) struct Layer {
    pub norm: Normalization,
    pub in_proj: Matrix,
    pub convolution: Convolution,
    pub x_proj: Matrix,
    pub scan: Scan,
    pub out_proj: Matrix,
}

/// All of them.
pub(super) struct Weights {
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub norm: Normalization,
    /// Of the norms of Δ's inputs, B and C, if there are such.
    pub rms_eps: Option<f32>,
    /// None if the head is the embedding.
    pub head: Option<Matrix>,
}

/// Where parameters come from, by their names in the Hugging Face layout.
type Get<'a> = dyn Fn(&str) -> Option<StoredTensor> + 'a;

impl Weights {
    /// From a model on disk; `encoding` converts projections and embedding, none takes them as they are stored.
    pub(super) fn from_source(source: &ModelSource, encoding: Option<Encoding>) -> Result<Self> {
        load(source.config(), &|name| source.get(name).cloned(), encoding)
    }

    /// From a model in memory, whose projections are copied.
    pub(super) fn from_model(
        model: &mut LanguageModel,
        encoding: Option<Encoding>,
    ) -> Result<Self> {
        let config = model.config().clone();
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        model.visit(&mut |parameter| {
            tensors.push((parameter.name.clone(), parameter.tensor.detach()));
            Ok(())
        })?;
        load(
            &config,
            &|name| {
                let (_, tensor) = tensors.iter().find(|(own, _)| own == name)?;
                let values = tensor.to_vec::<f32>().ok()?;
                let mut bytes = vec![0; values.len() * 4];
                quantize_into(Encoding::F32, values.len(), &values, &mut bytes).ok()?;
                let shape = (0..tensor.rank()).map(|axis| tensor.dim(axis)).collect();
                StoredTensor::new(Encoding::F32, shape, bytes.into()).ok()
            },
            encoding,
        )
    }

    /// Bytes of everything that a token reads.
    pub(super) fn size(&self) -> usize {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let layer = |layer: &Layer| {
            layer.in_proj.size() + layer.x_proj.size() + layer.out_proj.size() + layer.scan.bytes()
        };
        head.size() + self.layers.iter().map(layer).sum::<usize>()
    }
}

fn load(config: &MambaConfig, get: &Get<'_>, encoding: Option<Encoding>) -> Result<Weights> {
    let (d, e, n, r) = (config.d_model, config.d_inner(), config.d_state, config.dt_rank());
    let vocabulary = config.padded_vocab_size();
    let vector = |name: &str, len: usize| floats(get, name, len);
    let norm = |prefix: &str| -> Result<Normalization> {
        Ok(Normalization {
            weight: vector(&format!("{prefix}.weight"), d)?,
            bias: match config.norm {
                NormKind::Rms => None,
                NormKind::Layer => Some(vector(&format!("{prefix}.bias"), d)?),
            },
            eps: config.norm_eps as f32,
        })
    };
    let layer = |index: usize| -> Result<Layer> {
        let name = |field: &str| format!("backbone.layers.{index}.mixer.{field}");
        let projection = |field: &str, rows, columns, bias: bool| -> Result<Matrix> {
            let mut own = matrix(get, &name(&format!("{field}.weight")), rows, columns, encoding)?;
            if bias {
                own.bias = Some(vector(&name(&format!("{field}.bias")), rows)?);
            }
            Ok(own)
        };
        let taps = vector(&name("conv1d.weight"), e * config.d_conv)?;
        let bias = config.conv_bias.then(|| vector(&name("conv1d.bias"), e)).transpose()?;
        let parameters = [
            vector(&name("dt_proj.weight"), e * r)?,
            vector(&name("dt_proj.bias"), e)?,
            vector(&name("A_log"), e * n)?,
            vector(&name("D"), e)?,
        ];
        let [dt_weight, dt_bias, a_log, d_skip] = &parameters;
        Ok(Layer {
            norm: norm(&format!("backbone.layers.{index}.norm"))?,
            in_proj: projection("in_proj", 2 * e, d, config.bias)?,
            convolution: Convolution::new(e, config.d_conv, &taps, bias.as_deref()),
            x_proj: projection("x_proj", r + 2 * n, e, false)?,
            scan: Scan::new(e, n, r, Parameters { dt_weight, dt_bias, a_log, d: d_skip }),
            out_proj: projection("out_proj", d, e, config.bias)?,
        })
    };
    Ok(Weights {
        embedding: matrix(get, "backbone.embeddings.weight", vocabulary, d, encoding)?,
        layers: (0..config.n_layer).map(layer).collect::<Result<_>>()?,
        norm: norm("backbone.norm_f")?,
        rms_eps: config.mixer_rms_eps.map(|eps| eps as f32),
        head: (!config.tie_embeddings)
            .then(|| matrix(get, "lm_head.weight", vocabulary, d, encoding))
            .transpose()?,
    })
}

fn missing(name: &str, expected: String, found: String) -> Error {
    Error::Weight { name: name.into(), expected, found }
}

fn stored(get: &Get<'_>, name: &str, elements: usize) -> Result<StoredTensor> {
    let tensor = get(name)
        .ok_or_else(|| missing(name, format!("{elements} elements"), "no such tensor".into()))?;
    if tensor.elements() != elements {
        let found = format!("shape {:?}", tensor.shape);
        return Err(missing(name, format!("{elements} elements"), found));
    }
    Ok(tensor)
}

/// A parameter in f32, which must be finite.
fn floats(get: &Get<'_>, name: &str, elements: usize) -> Result<Vec<f32>> {
    let tensor = stored(get, name, elements)?;
    let mut values = vec![0.0; elements];
    tensor.read_f32(&mut values)?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => Err(missing(name, "finite values".into(), format!("{} at {at}", values[at]))),
    }
}

/// `wanted`, or what comes nearest for rows of that width: blocks of 256 give way to `q8_0`, all blocks to f32.
pub(super) fn fitting(wanted: Encoding, columns: usize) -> Encoding {
    [wanted, Encoding::Q8_0, Encoding::F32]
        .into_iter()
        .find(|encoding| encoding.divides(columns))
        .unwrap_or(Encoding::F32)
}

fn matrix(
    get: &Get<'_>,
    name: &str,
    rows: usize,
    columns: usize,
    encoding: Option<Encoding>,
) -> Result<Matrix> {
    let tensor = stored(get, name, rows * columns)?;
    let encoding = encoding.map_or(tensor.encoding, |wanted| fitting(wanted, columns));
    let bytes = if encoding == tensor.encoding {
        tensor.bytes.clone()
    } else {
        convert(&tensor, name, rows, columns, encoding)?
    };
    // Rows of whole blocks: the stored shape may be another with as many elements.
    Weight::new(encoding, rows, columns, &bytes)?;
    Ok(Matrix { encoding, rows, columns, bytes, bias: None })
}

/// The same values in another encoding, piece by piece.
fn convert(
    tensor: &StoredTensor,
    name: &str,
    rows: usize,
    columns: usize,
    encoding: Encoding,
) -> Result<Bytes> {
    let (from, to) = (tensor.encoding.row_bytes(columns)?, encoding.row_bytes(columns)?);
    let mut bytes = vec![0; rows * to];
    let step = (PIECE / columns.max(1)).max(1);
    let mut values = vec![0.0; step.min(rows) * columns];
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let values = &mut values[..count * columns];
        dequantize(tensor.encoding, &tensor.bytes[first * from..][..count * from], values)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let found = format!("{} at {}", values[at], first * columns + at);
            return Err(missing(name, "finite values".into(), found));
        }
        quantize_into(encoding, columns, values, &mut bytes[first * to..][..count * to])?;
    }
    Ok(bytes.into())
}
