//! NumPy's `.npz`: a zip archive with one `.npy` file a tensor.
//!
//! Elements are `<f4`, `<f2` or `<f8`. bfloat16, which NumPy does not know, is two raw bytes (`|V2`), as NumPy
//! itself writes arrays of such a type from outside. The configuration is an entry `config.json` of the archive or
//! lies beside it. Compressed archives are read as long as they unpack to at most eight times their size.

mod header;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use elapid_tensor::DType;

use self::header::Header;
use crate::hf::CONFIG_FILE;
use crate::model_source::{Contents, floats, not_floats};
use crate::outgoing::Outgoing;
use crate::strided::View;
use crate::zip::{Archive, Writer};
use crate::{Error, Result, hf};

/// The end of the name of an entry that is a tensor.
const TENSOR: &str = ".npy";

/// True if an archive has a tensor of NumPy's.
pub(crate) fn is_archive(archive: &Archive) -> bool {
    archive.entries.iter().any(|entry| entry.name.ends_with(TENSOR))
}

/// Reads the tensors of an archive.
///
/// # Errors
/// That name the entry.
pub(crate) fn read_archive(path: &Path, mut archive: Archive) -> Result<Contents> {
    let mut tensors = Vec::new();
    let mut config = None;
    for index in 0..archive.entries.len() {
        let entry = archive.entries[index].name.clone();
        let bytes = archive.unpack(index).map_err(|message| Error::format(path, message))?;
        if entry == CONFIG_FILE {
            let inside = path.join(CONFIG_FILE);
            config = Some(hf::parse_config(&inside, &bytes)?);
            continue;
        }
        let Some(name) = entry.strip_suffix(TENSOR) else { continue };
        let wrong = |message: String| Error::format(path, format!("{name}: {message}"));
        let Header { kind, fortran_order, shape, len } = Header::read(&bytes).map_err(wrong)?;
        let data = bytes.slice(len..bytes.len()).ok_or_else(|| wrong("truncated".into()))?;
        let dtype = match kind.as_str() {
            "<f4" => DType::F32,
            "<f2" => DType::F16,
            "<f8" => DType::F64,
            "|V2" | "<V2" => DType::BF16,
            other => return Err(not_floats(path, name, &shape, other)),
        };
        let data = if fortran_order {
            let mut step = 1usize;
            let mut strides = Vec::new();
            for &extent in &shape {
                strides.push(step);
                step = step.saturating_mul(extent);
            }
            let view = View { offset: 0, shape: shape.clone(), strides };
            view.of(&data, dtype).map_err(wrong)?
        } else {
            data
        };
        let tensor = floats(dtype, shape.clone(), data)
            .ok_or_else(|| not_floats(path, name, &shape, &kind))?;
        tensors.push((name.to_owned(), tensor.map_err(wrong)?));
    }
    Ok(Contents { tensors, metadata: BTreeMap::new(), config })
}

/// Writes tensors and a configuration.
///
/// # Errors
/// Those of the writer.
pub(crate) fn write_archive(
    out: &mut dyn Write,
    config: &str,
    tensors: &[Outgoing],
) -> io::Result<()> {
    let mut archive = Writer::new(out);
    archive.add(CONFIG_FILE, &|show| show(config.as_bytes()))?;
    for tensor in tensors {
        let kind = match tensor.dtype() {
            DType::BF16 => "|V2",
            DType::F16 => "<f2",
            _ => "<f4",
        };
        let header = Header::write(kind, &tensor.tensor.shape);
        archive.add(&format!("{}{TENSOR}", tensor.name), &|show| {
            show(&header)?;
            tensor.pieces(show)
        })?;
    }
    archive.finish()
}
