//! Writing a state dict as `torch.save` does: a pickle of protocol 2 that only rebuilds tensors (so it also opens
//! with `weights_only=True`), in a zip archive with the storages' bytes at multiples of 64.

use std::io::{self, Write};

use elapid_ops::blocks::Encoding;

use crate::outgoing::Outgoing;
use crate::zip::Writer;

/// The folder within the archive.
const ROOT: &str = "pytorch_model";

/// A tensor of the dict; several may name the same storage.
pub(crate) struct Tensor<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    /// Position in the list of storages.
    pub storage: usize,
}

/// Writes a dict of contiguous tensors.
///
/// # Errors
/// Those of the writer; if a size does not fit the format.
pub(crate) fn write_state_dict(
    out: &mut dyn Write,
    tensors: &[Tensor<'_>],
    storages: &[Outgoing],
) -> io::Result<()> {
    let pickle = pickle(tensors, storages)?;
    let mut archive = Writer::new(out);
    let text =
        |bytes: &'static [u8]| move |show: &mut dyn FnMut(&[u8]) -> io::Result<()>| show(bytes);
    archive.add(&format!("{ROOT}/data.pkl"), &|show| show(&pickle))?;
    archive.add(&format!("{ROOT}/byteorder"), &text(b"little"))?;
    for (key, storage) in storages.iter().enumerate() {
        archive.add(&format!("{ROOT}/data/{key}"), &|show| storage.pieces(show))?;
    }
    archive.add(&format!("{ROOT}/version"), &text(b"3\n"))?;
    archive.finish()
}

fn pickle(tensors: &[Tensor<'_>], storages: &[Outgoing]) -> io::Result<Vec<u8>> {
    let mut p = vec![0x80, 2];
    p.extend(b"ccollections\nOrderedDict\n)R(");
    for tensor in tensors {
        let storage = &storages[tensor.storage];
        text(&mut p, tensor.name)?;
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage")?;
        p.extend(match storage.encoding {
            Encoding::BF16 => &b"ctorch\nBFloat16Storage\n"[..],
            Encoding::F16 => b"ctorch\nHalfStorage\n",
            _ => b"ctorch\nFloatStorage\n",
        });
        text(&mut p, &tensor.storage.to_string())?;
        text(&mut p, "cpu")?;
        whole(&mut p, storage.tensor.elements())?;
        // The storage; offset 0.
        p.extend(b"tQK\0");
        p.push(b'(');
        for &extent in tensor.shape {
            whole(&mut p, extent)?;
        }
        p.extend(b"t(");
        for axis in 0..tensor.shape.len() {
            whole(&mut p, tensor.shape[axis + 1..].iter().product())?;
        }
        // Strides; no gradient; no hooks.
        p.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    p.extend(b"u.");
    Ok(p)
}

fn text(to: &mut Vec<u8>, text: &str) -> io::Result<()> {
    to.push(b'X');
    to.extend(u32::try_from(text.len()).map_err(io::Error::other)?.to_le_bytes());
    to.extend(text.as_bytes());
    Ok(())
}

fn whole(to: &mut Vec<u8>, number: usize) -> io::Result<()> {
    match i32::try_from(number) {
        Ok(number) => {
            to.push(b'J');
            to.extend(number.to_le_bytes());
        }
        Err(_) => {
            to.extend([0x8a, 8]);
            to.extend(i64::try_from(number).map_err(io::Error::other)?.to_le_bytes());
        }
    }
    Ok(())
}
