//! A model into a GGUF file, tensor by tensor and row by row: neither the model nor a tensor is in memory as a whole.

use std::io::{self, Write};
use std::path::Path;

use elapid_models::Kind;
use elapid_ops::blocks::{Encoding, dequantize, quantize};

use super::a_log::{Exact, a_from_log};
use super::config::config_metadata;
use super::element::ElementType;
use super::names::{MAMBA, split_layer};
use super::plan::{Plan, PlannedTensor};
use super::read::GgufFile;
use super::value::Value;
use super::write::{Planned, write_gguf};
use crate::model_source::{Format, ModelSource, StoredTensor};
use crate::{Result, atomic};

/// Elements that are converted at a time, at least one row.
const PIECE: usize = 1 << 20;

/// Writes a model to a GGUF file, atomically. `vocabulary` is metadata about its tokens ([`super::vocabulary_of`]).
/// `progress` is told the bytes written so far.
///
/// # Errors
/// If the system refuses, or a weight cannot be written as planned, naming its tensor.
pub fn save_gguf(
    source: &ModelSource,
    plan: &Plan,
    vocabulary: Vec<(String, Value)>,
    path: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let original = match source.format() {
        Format::Gguf => Some(GgufFile::open(source.path())?),
        _ => None,
    };
    let mut metadata = general(source, plan, path);
    metadata.extend(config_metadata(source.config()));
    metadata.extend(exact_logs(source, plan)?);
    metadata.extend(vocabulary);
    let planned: Vec<Planned> = plan
        .tensors
        .iter()
        .map(|tensor| Planned {
            name: tensor.file_name.clone(),
            shape: tensor.shape.clone(),
            element: ElementType::from(tensor.to),
            bytes: tensor.bytes,
        })
        .collect();
    let mut done = 0;
    atomic::write_file(path, |out| {
        write_gguf(out, &metadata, &planned, |number, out| {
            let tensor = &plan.tensors[number];
            let mut told = |bytes: usize| {
                done += bytes as u64;
                progress(done);
            };
            write_tensor(source, original.as_ref(), tensor, out, &mut told)
        })
    })
}

/// What a file says about itself.
fn general(source: &ModelSource, plan: &Plan, path: &Path) -> Vec<(String, Value)> {
    let name = path.file_stem().map(|name| name.to_string_lossy().into_owned());
    let main = plan.main_encoding();
    // llama.cpp's number for the mixture of types that a file of this name has.
    let file_type = match main {
        Encoding::F32 => 0u32,
        Encoding::F16 => 1,
        Encoding::Q4_0 => 2,
        Encoding::Q8_0 => 7,
        Encoding::Q4_K => 14,
        Encoding::Q6_K => 18,
        Encoding::BF16 => 32,
    };
    let mut entries = vec![
        ("general.architecture".to_owned(), Value::from(MAMBA)),
        ("general.type".to_owned(), Value::from("model")),
        ("general.name".to_owned(), Value::Text(name.unwrap_or_default())),
        ("general.file_type".to_owned(), Value::U32(file_type)),
    ];
    if plan.tensors.iter().any(|tensor| tensor.to.is_quantized()) {
        entries.push(("general.quantization_version".to_owned(), Value::U32(2)));
    }
    let count = source.config().parameter_count() as u64;
    entries.push(("general.parameter_count".to_owned(), Value::U64(count)));
    entries
}

/// Exact values of A_log that the file's A cannot give back.
fn exact_logs(source: &ModelSource, plan: &Plan) -> Result<Vec<(String, Value)>> {
    let layer = source.config().d_inner() as u64 * source.config().d_state as u64;
    let mut exact = Exact::default();
    for tensor in plan.tensors.iter().filter(|tensor| tensor.kind == Kind::Recurrence) {
        if let (Some((index, _)), Some(stored)) =
            (split_layer(&tensor.file_name, "blk."), source.get(&tensor.name))
        {
            exact.add(index as u64 * layer, &values(stored)?);
        }
    }
    Ok(exact.into_metadata())
}

fn values(stored: &StoredTensor) -> Result<Vec<f32>> {
    let mut values = vec![0.0; stored.elements()];
    stored.read_f32(&mut values)?;
    Ok(values)
}

fn write_tensor(
    source: &ModelSource,
    original: Option<&GgufFile>,
    tensor: &PlannedTensor,
    out: &mut dyn Write,
    told: &mut dyn FnMut(usize),
) -> io::Result<()> {
    let stored = source
        .get(&tensor.name)
        .ok_or_else(|| io::Error::other(format!("the model has no tensor {:?}", tensor.name)))?;
    if tensor.kind == Kind::Recurrence {
        // A file of the same kind has A itself.
        let own = original.and_then(|file| {
            let info = file.tensors().iter().find(|info| info.name == tensor.file_name)?;
            (info.element == ElementType::from(tensor.to)).then(|| file.bytes(info))
        });
        let bytes = match own {
            Some(bytes) => bytes.map_err(io::Error::other)?.to_vec(),
            None => {
                let logs = values(stored).map_err(io::Error::other)?;
                logs.iter().flat_map(|&log| a_from_log(log).to_le_bytes()).collect()
            }
        };
        out.write_all(&bytes)?;
        told(bytes.len());
        return Ok(());
    }
    if stored.encoding == tensor.to {
        for piece in stored.bytes.chunks(4 * PIECE) {
            out.write_all(piece)?;
            told(piece.len());
        }
        return Ok(());
    }
    let columns = tensor.columns();
    let rows = (PIECE / columns.max(1)).max(1);
    let named = |error: elapid_tensor::Error| io::Error::other(format!("{}: {error}", tensor.name));
    let row_bytes = stored.encoding.row_bytes(columns).map_err(named)?;
    let mut values = Vec::new();
    for piece in stored.bytes.chunks((rows * row_bytes).max(1)) {
        values.resize(piece.len() / row_bytes * columns, 0.0);
        dequantize(stored.encoding, piece, &mut values).map_err(named)?;
        let bytes = quantize(tensor.to, columns, &values).map_err(named)?;
        out.write_all(&bytes)?;
        told(bytes.len());
    }
    Ok(())
}
