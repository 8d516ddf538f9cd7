//! A model's parameters as the engine uses them: projections and embedding in the encoding that they are stored in
//! or that was asked for, everything else in f32 and in the order of its use.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use elapid_formats::{Bytes, ModelSource, StoredTensor};
use elapid_models::{LanguageModel, MambaConfig, NormKind};
use elapid_ops::blocks::{Encoding, are_finite, dequantize, quantize_into};
use elapid_ops::mamba_step::{Convolution, Normalization, Parameters, Scan};
use elapid_ops::quantized_linear::Weight;
use elapid_tensor::Tensor;

use super::pool::Pool;
use crate::{Error, Result};

/// Fewer bytes of a file are not worth a call of the system, and the pages come back when the self-check reads them.
const WORTH_GIVING_BACK: usize = 256 << 10;

/// Elements converted or looked at at a time by one thread: input and output stay in the second-level cache.
const PIECE: usize = 1 << 14;

/// A weight [rows, columns] and its bias.
pub(super) struct Matrix {
    /// In the Hugging Face layout.
    pub name: String,
    pub encoding: Encoding,
    pub rows: usize,
    pub columns: usize,
    bytes: Bytes,
    pub bias: Option<Vec<f32>>,
    /// True if its values are known to be finite, as they were read to be converted.
    pub finite: bool,
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

    /// Values of a row.
    pub(super) fn read_row(&self, row: usize, values: &mut [f32]) -> Result<()> {
        Ok(dequantize(self.encoding, self.weight().row(row), values)?)
    }

    /// Reads every value on all threads.
    ///
    /// # Errors
    /// With the first that is infinite or no number.
    pub(super) fn check_finite(&self, pool: &mut Pool) -> Result<()> {
        let weight = self.weight();
        let step = (PIECE / self.columns.max(1)).max(1);
        in_pieces(pool, self.rows, step, &|rows, values: &mut Vec<f32>| {
            for row in rows.clone() {
                if are_finite(self.encoding, weight.row(row)) {
                    continue;
                }
                values.resize(self.columns, 0.0);
                dequantize(self.encoding, weight.row(row), values)?;
                finite(&self.name, values, row * self.columns)?;
            }
            Ok(())
        })
    }
}

/// Works off `count` units on all threads, at most `step` of them at a time, each thread with room of its own.
///
/// # Errors
/// The first that is met.
fn in_pieces<R: Default>(
    pool: &mut Pool,
    count: usize,
    step: usize,
    work: &(dyn Fn(Range<usize>, &mut R) -> Result<()> + Sync),
) -> Result<()> {
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    pool.run(&|member| {
        let own = member.share(count);
        let mut room = R::default();
        for first in own.clone().step_by(step) {
            if let Err(error) = work(first..own.end.min(first + step), &mut room) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Refuses values of which one is infinite or no number; the first is element `offset` of its tensor.
fn finite(name: &str, values: &[f32], offset: usize) -> Result<()> {
    // All at once first, so that the usual case runs at the speed of memory.
    if values.iter().fold(true, |all, value| all & value.is_finite()) {
        return Ok(());
    }
    let at = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Err(missing(name, "finite values".into(), format!("{} at {}", values[at], offset + at)))
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

/// Is told how many bytes of how many of projections and embedding have been read.
pub(super) type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// What parameters are read with.
pub(super) struct Reader<'a> {
    get: &'a Get<'a>,
    encoding: Option<Encoding>,
    pool: &'a mut Pool,
    /// Bytes of projections and embedding as they are stored, and of those that have been converted.
    pub all: u64,
    pub done: u64,
    progress: &'a mut Progress<'a>,
}

impl Weights {
    /// From a model on disk; `encoding` converts projections and embedding, none takes them as they are stored.
    pub(super) fn from_source<'a>(
        source: &ModelSource,
        encoding: Option<Encoding>,
        pool: &'a mut Pool,
        progress: &'a mut Progress<'a>,
    ) -> Result<Self> {
        let all = source.names().filter_map(|name| source.get(name));
        let all = all.map(|tensor| tensor.bytes.len() as u64).sum();
        let get = |name: &str| source.get(name).cloned();
        load(source.config(), &mut Reader { get: &get, encoding, pool, all, done: 0, progress })
    }

    /// From a model in memory, whose projections are copied.
    pub(super) fn from_model(
        model: &mut LanguageModel,
        encoding: Option<Encoding>,
        pool: &mut Pool,
    ) -> Result<Self> {
        let config = model.config().clone();
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        model.visit(&mut |parameter| {
            tensors.push((parameter.name.clone(), parameter.tensor.detach()));
            Ok(())
        })?;
        Self::from_tensors(
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
            pool,
        )
    }

    /// From tensors that `get` makes, each asked for once.
    pub(super) fn from_tensors(
        config: &MambaConfig,
        get: &Get<'_>,
        encoding: Option<Encoding>,
        pool: &mut Pool,
    ) -> Result<Self> {
        let progress = &mut |_, _| {};
        load(config, &mut Reader { get, encoding, pool, all: 0, done: 0, progress })
    }

    /// Projections, embedding and head.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter().flat_map(|l| [&l.in_proj, &l.x_proj, &l.out_proj]);
        std::iter::once(&self.embedding).chain(layers).chain(&self.head)
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

fn load(config: &MambaConfig, reader: &mut Reader<'_>) -> Result<Weights> {
    let (d, e, n, r) = (config.d_model, config.d_inner(), config.d_state, config.dt_rank());
    let vocabulary = config.padded_vocab_size();
    let norm = |reader: &mut Reader<'_>, prefix: &str| -> Result<Normalization> {
        Ok(Normalization {
            weight: reader.floats(&format!("{prefix}.weight"), d)?,
            bias: match config.norm {
                NormKind::Rms => None,
                NormKind::Layer => Some(reader.floats(&format!("{prefix}.bias"), d)?),
            },
            eps: config.norm_eps as f32,
        })
    };
    let embedding = reader.matrix("backbone.embeddings.weight", vocabulary, d)?;
    let mut layers = Vec::with_capacity(config.n_layer);
    for index in 0..config.n_layer {
        let name = |field: &str| format!("backbone.layers.{index}.mixer.{field}");
        let projection = |reader: &mut Reader<'_>, field: &str, rows, columns, bias: bool| {
            let mut own = reader.matrix(&name(&format!("{field}.weight")), rows, columns)?;
            if bias {
                own.bias = Some(reader.floats(&name(&format!("{field}.bias")), rows)?);
            }
            Ok::<_, Error>(own)
        };
        let taps = reader.floats(&name("conv1d.weight"), e * config.d_conv)?;
        let bias = match config.conv_bias {
            true => Some(reader.floats(&name("conv1d.bias"), e)?),
            false => None,
        };
        let parameters = [
            reader.floats(&name("dt_proj.weight"), e * r)?,
            reader.floats(&name("dt_proj.bias"), e)?,
            reader.floats(&name("A_log"), e * n)?,
            reader.floats(&name("D"), e)?,
        ];
        let [dt_weight, dt_bias, a_log, d_skip] = &parameters;
        layers.push(Layer {
            norm: norm(reader, &format!("backbone.layers.{index}.norm"))?,
            in_proj: projection(reader, "in_proj", 2 * e, d, config.bias)?,
            convolution: Convolution::new(e, config.d_conv, &taps, bias.as_deref()),
            x_proj: projection(reader, "x_proj", r + 2 * n, e, false)?,
            scan: Scan::new(e, n, r, Parameters { dt_weight, dt_bias, a_log, d: d_skip }),
            out_proj: projection(reader, "out_proj", d, e, config.bias)?,
        });
    }
    Ok(Weights {
        embedding,
        layers,
        norm: norm(reader, "backbone.norm_f")?,
        rms_eps: config.mixer_rms_eps.map(|eps| eps as f32),
        head: match config.tie_embeddings {
            true => None,
            false => Some(reader.matrix("lm_head.weight", vocabulary, d)?),
        },
    })
}

fn missing(name: &str, expected: String, found: String) -> Error {
    Error::Weight { name: name.into(), expected, found }
}

/// Lets the memory of a tensor go of which the engine has its own copy.
fn give_back(tensor: &StoredTensor) {
    if tensor.bytes.len() >= WORTH_GIVING_BACK {
        tensor.bytes.release();
    }
}

/// `wanted`, or what comes nearest for rows of that width: blocks of 256 give way to `q8_0`, all blocks to f32.
pub(super) fn fitting(wanted: Encoding, columns: usize) -> Encoding {
    [wanted, Encoding::Q8_0, Encoding::F32]
        .into_iter()
        .find(|encoding| encoding.divides(columns))
        .unwrap_or(Encoding::F32)
}

impl Reader<'_> {
    fn stored(&self, name: &str, elements: usize) -> Result<StoredTensor> {
        let expected = || format!("{elements} elements");
        let tensor =
            (self.get)(name).ok_or_else(|| missing(name, expected(), "no such tensor".into()))?;
        if tensor.elements() != elements {
            return Err(missing(name, expected(), format!("shape {:?}", tensor.shape)));
        }
        Ok(tensor)
    }

    /// A parameter in f32, which must be finite.
    fn floats(&self, name: &str, elements: usize) -> Result<Vec<f32>> {
        let tensor = self.stored(name, elements)?;
        let mut values = vec![0.0; elements];
        tensor.read_f32(&mut values)?;
        give_back(&tensor);
        finite(name, &values, 0)?;
        Ok(values)
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let tensor = self.stored(name, rows * columns)?;
        let encoding = self.encoding.map_or(tensor.encoding, |wanted| fitting(wanted, columns));
        let finite = encoding != tensor.encoding;
        let bytes = if finite {
            let bytes = self.convert(&tensor, name, rows, columns, encoding)?;
            give_back(&tensor);
            self.done += tensor.bytes.len() as u64;
            (self.progress)(self.done, self.all);
            bytes
        } else {
            tensor.bytes.clone()
        };
        // Rows of whole blocks: the stored shape may be another with as many elements.
        Weight::new(encoding, rows, columns, &bytes)?;
        Ok(Matrix { name: name.into(), encoding, rows, columns, bytes, bias: None, finite })
    }

    /// The same values in another encoding, piece by piece.
    fn convert(
        &mut self,
        tensor: &StoredTensor,
        name: &str,
        rows: usize,
        columns: usize,
        encoding: Encoding,
    ) -> Result<Bytes> {
        let (from, to) = (tensor.encoding.row_bytes(columns)?, encoding.row_bytes(columns)?);
        let mut bytes = vec![0; rows * to];
        let target = Target(bytes.as_mut_ptr());
        let stored: &[u8] = &tensor.bytes;
        let step = (PIECE / columns.max(1)).max(1);
        in_pieces(self.pool, rows, step, &|part, values: &mut Vec<f32>| {
            values.resize(part.len() * columns, 0.0);
            dequantize(tensor.encoding, &stored[part.start * from..part.end * from], values)?;
            finite(name, values, part.start * columns)?;
            // SAFETY: these rows lie inside `bytes` and are this thread's.
            let target = unsafe {
                std::slice::from_raw_parts_mut(target.row(part.start * to), part.len() * to)
            };
            quantize_into(encoding, columns, values, target)?;
            Ok(())
        })?;
        Ok(bytes.into())
    }
}

/// Memory that threads fill, each its own rows.
struct Target(*mut u8);

// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// # Safety
    /// `offset` must lie inside.
    unsafe fn row(&self, offset: usize) -> *mut u8 {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}
