//! The bytes of one file: mapped into memory if it is plain, decompressed if its name ends in `.gz`,
//! `.zst` or `.zstd`. The name decides and never the content, since any bytes may be training data.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Deref;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use memmap2::Mmap;

use crate::{Error, Result};

/// The bytes of one opened file.
#[derive(Debug)]
pub(crate) struct FileBytes {
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Opens and, if it is compressed, reads a file.
    ///
    /// # Errors
    /// The file is missing, not readable, neither a regular file nor a pipe, or does not decompress.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let unreadable = |source| Error::Unreadable { path: path.into(), source };
        // Asked before opening, since opening a pipe waits for its writer and opening a device may act.
        let kind = std::fs::metadata(path).map_err(|source| missing_or_unreadable(path, source))?;
        if !kind.is_file() && !is_pipe(&kind) {
            return Err(Error::NotAFile { path: path.into() });
        }
        let mut file = File::open(path).map_err(unreadable)?;
        if let Some(compression) = Compression::of(path) {
            let bytes = compression.decompress(file).map_err(|source| Error::Corrupt {
                path: path.into(),
                format: compression.name(),
                source,
            })?;
            return Ok(Self { bytes: Bytes::Owned(bytes) });
        }
        // Files that the kernel makes up (/proc, pipes) have length 0 but may have content.
        if kind.len() == 0 {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(unreadable)?;
            return Ok(Self { bytes: Bytes::Owned(bytes) });
        }
        // SAFETY: the mapping is private and read-only and lives as long as the `Mmap`. Another process
        // that truncates the file meanwhile would end this one with a bus error, never with wrong memory;
        // that training data stays in place while it is trained on is part of the contract.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        Ok(Self { bytes: Bytes::Mapped(map) })
    }

    /// Bytes that are in memory already.
    pub(crate) fn from_memory(bytes: Vec<u8>) -> Self {
        Self { bytes: Bytes::Owned(bytes) }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// `NotFound` if nothing is there, else `Unreadable`.
pub(super) fn missing_or_unreadable(path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => Error::NotFound { path: path.into() },
        _ => Error::Unreadable { path: path.into(), source },
    }
}

#[cfg(unix)]
fn is_pipe(kind: &std::fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_fifo(&kind.file_type())
}

#[cfg(not(unix))]
fn is_pipe(_: &std::fs::Metadata) -> bool {
    false
}

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// By the extension of `path`.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "gz" => Some(Self::Gzip),
            "zst" | "zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// All members (gzip) or frames (zstd) of the file, end to end.
    fn decompress(self, file: File) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            Self::Gzip => {
                MultiGzDecoder::new(io::BufReader::new(file)).read_to_end(&mut bytes)?;
            }
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(file)?;
                // Accepts every window that `zstd --long` can make.
                decoder.window_log_max(if cfg!(target_pointer_width = "64") { 31 } else { 30 })?;
                decoder.read_to_end(&mut bytes)?;
            }
        }
        bytes.shrink_to_fit();
        Ok(bytes)
    }
}
