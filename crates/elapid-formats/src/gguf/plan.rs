//! What a GGUF file of a model will hold: the encoding of each tensor, decided before anything is written.
//!
//! | tensor | plain floats asked for | blocks asked for |
//! |---|---|---|
//! | embedding, head, projections (in, x, out) | as asked | as asked |
//! | Δ projection | as asked | f32: it decides how long a state is kept, and is 1 to 2 % of the weights |
//! | convolution, A, D, biases, norms | f32 | f32 |
//!
//! This is llama.cpp's choice except for the Δ projection, which it takes for one of the projections. Rows that are no
//! whole number of blocks of 256 get blocks of 32 with 8 bits (llama.cpp: 5 bits, a layout that is not among ours), and
//! f16 if 32 does not divide them either.

use std::fmt;

use elapid_models::{Kind, parameter_outlines};
use elapid_ops::blocks::Encoding;

use super::names::{MAMBA, from_hugging_face};
use crate::model_source::ModelSource;
use crate::{Error, Result};

/// The encodings that are asked for; none keeps what the source has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightTypes {
    /// Of the projections, and of the embedding unless that has its own.
    pub projections: Option<Encoding>,
    /// Of the embedding and the head.
    pub embedding: Option<Encoding>,
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name in the Hugging Face layout.
    pub name: String,
    /// Its name in the file.
    pub file_name: String,
    /// What it is.
    pub kind: Kind,
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// The encoding in the source.
    pub from: Encoding,
    /// The encoding in the file.
    pub to: Encoding,
    /// The encoding that its rows were too short for.
    pub instead_of: Option<Encoding>,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes in the file.
    pub bytes: u64,
}

impl PlannedTensor {
    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
}

impl fmt::Display for PlannedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {} to {}", self.file_name, self.shape, self.from, self.to)?;
        match self.instead_of {
            None => Ok(()),
            Some(asked) => write!(
                f,
                " (rows of {} are no multiple of {}, as {asked} needs)",
                self.columns(),
                asked.block_len()
            ),
        }
    }
}

/// All tensors of a file, in the order of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The tensors.
    pub tensors: Vec<PlannedTensor>,
}

impl Plan {
    /// Decides every tensor's encoding.
    ///
    /// # Errors
    /// If the source lacks a tensor.
    pub fn new(source: &ModelSource, types: WeightTypes) -> Result<Self> {
        let mut tensors = Vec::new();
        for outline in parameter_outlines(source.config()) {
            let stored = source.get(&outline.name);
            let file_name = from_hugging_face(MAMBA, &outline.name);
            let (Some(stored), Some(file_name)) = (stored, file_name) else {
                return Err(Error::format(
                    source.path(),
                    format!("has no tensor {:?}", outline.name),
                ));
            };
            // The model's shape has the taps as [E, W], as the file wants them.
            let shape = outline.shape.to_vec();
            let is_head = outline.kind == Kind::Embedding || outline.name == crate::hf::HEAD;
            let asked = match outline.kind {
                _ if is_head => types.embedding.or(types.projections).unwrap_or(stored.encoding),
                Kind::Projection => types.projections.unwrap_or(stored.encoding),
                Kind::DeltaProjection if shape.len() == 2 => {
                    let asked = types.projections.unwrap_or(stored.encoding);
                    if asked.is_quantized() { Encoding::F32 } else { asked }
                }
                _ => Encoding::F32,
            };
            let to = fitting(asked, shape.last().copied().unwrap_or(1));
            let row = to.row_bytes(shape.last().copied().unwrap_or(1))? as u64;
            let rows: usize = shape.iter().rev().skip(1).product();
            tensors.push(PlannedTensor {
                name: outline.name,
                file_name,
                kind: outline.kind,
                from: stored.encoding,
                to,
                instead_of: (to != asked).then_some(asked),
                bytes_before: stored.bytes.len() as u64,
                bytes: row * rows as u64,
                shape,
            });
        }
        Ok(Self { tensors })
    }

    /// Bytes of all tensors in the file.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// Bytes of all tensors in the source.
    pub fn bytes_before(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes_before).sum()
    }

    /// Tensors whose rows were too short for what was asked for.
    pub fn fallbacks(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.tensors.iter().filter(|tensor| tensor.instead_of.is_some())
    }

    /// The encoding of most weights.
    pub fn main_encoding(&self) -> Encoding {
        let bytes_of = |encoding: Encoding| -> usize {
            self.tensors
                .iter()
                .filter(|tensor| tensor.to == encoding)
                .map(|tensor| tensor.shape.iter().product::<usize>())
                .sum()
        };
        Encoding::ALL
            .into_iter()
            .max_by_key(|&encoding| bytes_of(encoding))
            .unwrap_or(Encoding::F32)
    }
}

/// The encoding, or the next one that rows of that length have whole blocks of.
fn fitting(asked: Encoding, columns: usize) -> Encoding {
    [asked, Encoding::Q8_0]
        .into_iter()
        .find(|encoding| encoding.divides(columns))
        .unwrap_or(Encoding::F16)
}
