//! Compiled kernels on disk, found by the content of what they were compiled from.
//!
//! A file is its payload behind a checksum. It is written under another name and moved into place, so that
//! programs that start at the same time never see half a file; one that does not match its checksum counts as
//! absent and is written anew.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_128;

use super::error::{GpuError, Result};

/// The folder: ELAPID_CACHE_DIR, or the user's cache folder, or the system's temporary one.
fn folder() -> PathBuf {
    let own = std::env::var_os("ELAPID_CACHE_DIR").map(PathBuf::from);
    let user = || {
        std::env::var_os("XDG_CACHE_HOME")
            .or_else(|| std::env::var_os("LOCALAPPDATA"))
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
            .map(|folder| folder.join("elapid"))
    };
    own.or_else(user).unwrap_or_else(|| std::env::temp_dir().join("elapid")).join("kernels")
}

/// Where the result of compiling `parts` is kept.
pub(super) fn place(name: &str, parts: &[&str], extension: &str) -> PathBuf {
    let mut text = Vec::new();
    for part in parts {
        text.extend_from_slice(&(part.len() as u64).to_le_bytes());
        text.extend_from_slice(part.as_bytes());
    }
    folder().join(format!("{name}-{:032x}.{extension}", xxh3_128(&text)))
}

/// What is kept there, if it is whole.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let (sum, payload) = bytes.split_first_chunk::<16>()?;
    if xxh3_128(payload) != u128::from_le_bytes(*sum) {
        return None;
    }
    bytes.drain(..16);
    Some(bytes)
}

/// Keeps `payload` there.
pub(super) fn write(path: &Path, payload: &[u8]) -> Result<()> {
    let mut bytes = xxh3_128(payload).to_le_bytes().to_vec();
    bytes.extend_from_slice(payload);
    let temporary = temporary(path)?;
    std::fs::write(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| failed(path, &error))
}

/// A name beside `path` that no other thread or program uses; the folder is made.
pub(super) fn temporary(path: &Path) -> Result<PathBuf> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    }
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Ok(path.with_extension(format!("{}-{number}.part", std::process::id())))
}

pub(super) fn failed(path: &Path, error: &std::io::Error) -> GpuError {
    GpuError::Cache { path: path.display().to_string(), message: error.to_string() }
}
