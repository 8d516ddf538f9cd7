//! One file over a network that breaks: into `BLOB.incomplete`, on from there at the next try or in the next
//! process, and checked against the size and hash that the hub announced before it is believed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use ring::digest;

use super::client::{Client, Metadata, is_hash, passes};
use super::{HubError, Progress};
use crate::{Error, Result};

/// Read and written at a time.
const BUFFER: usize = 1 << 18;

/// Downloads a file; the number of bytes that came over the network.
pub(super) fn download(
    client: &Client,
    url: &str,
    name: &str,
    metadata: &Metadata,
    blob: &Path,
    progress: &mut dyn Progress,
) -> Result<u64> {
    let mut incomplete = blob.as_os_str().to_owned();
    incomplete.push(".incomplete");
    let path = Path::new(&incomplete);
    let mut received = 0;
    loop {
        let mut partial = Partial::open(path, metadata)?;
        let resumed = partial.length > 0;
        progress.file(name, metadata.size, partial.length);
        received += partial.fill(client, url, metadata.size, progress)?;
        match partial.check(name, metadata) {
            Ok(()) => break,
            // What an earlier time left may have been damaged: once more from nothing.
            Err(problem) if resumed => {
                progress.note(&format!("{problem}: {name} is downloaded again"));
                remove(path)?;
            }
            Err(problem) => {
                remove(path)?;
                return Err(problem.into());
            }
        }
    }
    fs::rename(path, blob).map_err(Error::io("rename", path))?;
    progress.done();
    Ok(received)
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(Error::io("remove", path))
}

/// A file of which the beginning is there.
struct Partial<'a> {
    path: &'a Path,
    file: File,
    length: u64,
    hash: Option<digest::Context>,
}

impl<'a> Partial<'a> {
    /// What is there, read once for its hash.
    fn open(path: &'a Path, metadata: &Metadata) -> Result<Self> {
        let io = Error::io("open", path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(&io)?;
        let there = file.metadata().map_err(&io)?;
        if !there.is_file() {
            return Err(Error::format(path, "expected the beginning of a file, found no file"));
        }
        if there.len() > metadata.size {
            file.set_len(0).map_err(&io)?;
        }
        let mut hash = start(metadata);
        let mut buffer = vec![0; BUFFER];
        let mut length = 0;
        loop {
            let read = file.read(&mut buffer).map_err(Error::io("read", path))?;
            if read == 0 {
                break;
            }
            length += read as u64;
            if let Some(hash) = &mut hash {
                hash.update(&buffer[..read]);
            }
        }
        Ok(Self { path, file, length, hash })
    }

    fn restart(&mut self, metadata_size: u64) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("empty", self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(Error::io("empty", self.path))?;
        self.length = 0;
        if let Some(hash) = &mut self.hash {
            *hash = begin(hash.algorithm(), metadata_size);
        }
        Ok(())
    }

    /// Reads until it is complete, trying again as long as there is progress, and some times without.
    fn fill(
        &mut self,
        client: &Client,
        url: &str,
        size: u64,
        progress: &mut dyn Progress,
    ) -> Result<u64> {
        let (mut received, mut tries) = (0, 0);
        while self.length < size {
            let before = self.length;
            let outcome = self.once(client, url, size, progress)?;
            received += self.length.saturating_sub(before);
            let Err(error) = outcome else { continue };
            if self.length > before {
                tries = 0;
            }
            if !passes(&error) || tries >= client.retries {
                return Err(error.into());
            }
            progress.note(&format!("{error}; trying again from byte {}", self.length));
            std::thread::sleep(client.wait * 2u32.pow(tries));
            tries += 1;
        }
        self.file.sync_all().map_err(Error::io("write", self.path))?;
        Ok(received)
    }

    /// One connection. The outer error is of the disk, the inner one of the network.
    fn once(
        &mut self,
        client: &Client,
        url: &str,
        size: u64,
        progress: &mut dyn Progress,
    ) -> Result<Result<(), HubError>> {
        let response = match client.open(url, self.length) {
            Ok(response) => response,
            Err(error) => return Ok(Err(error)),
        };
        let from = match response.status().as_u16() {
            206 => {
                let range = response.headers().get("content-range");
                let range = range.and_then(|range| range.to_str().ok()).unwrap_or_default();
                let from = range.strip_prefix("bytes ").and_then(|range| range.split_once('-'));
                from.and_then(|(from, _)| from.parse().ok()).unwrap_or(self.length)
            }
            // The other side cannot go on from there.
            _ => 0,
        };
        if from != self.length || response.status().as_u16() == 416 {
            self.restart(size)?;
            progress.at(0);
            if from != 0 || response.status().as_u16() == 416 {
                let message = "it cannot be gone on with".into();
                return Ok(Err(HubError::Network { url: url.to_owned(), message }));
            }
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER];
        while self.length < size {
            let most = usize::try_from(size - self.length).unwrap_or(BUFFER).min(BUFFER);
            let read = match body.read(&mut buffer[..most]) {
                Ok(0) => Err("the connection ended early".to_owned()),
                Ok(read) => Ok(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error.to_string()),
            };
            let read = match read {
                Ok(read) => read,
                Err(message) => {
                    return Ok(Err(HubError::Network { url: url.to_owned(), message }));
                }
            };
            self.file.write_all(&buffer[..read]).map_err(Error::io("write", self.path))?;
            if let Some(hash) = &mut self.hash {
                hash.update(&buffer[..read]);
            }
            self.length += read as u64;
            progress.at(self.length);
        }
        Ok(Ok(()))
    }

    /// Whether it is what was announced.
    fn check(self, name: &str, metadata: &Metadata) -> Result<(), HubError> {
        let damaged = |what, expected: String, found: String| {
            Err(HubError::Damaged { file: name.to_owned(), what, expected, found })
        };
        if self.length != metadata.size {
            return damaged("size", metadata.size.to_string(), self.length.to_string());
        }
        let Some(hash) = self.hash else { return Ok(()) };
        let found: String =
            hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if !found.eq_ignore_ascii_case(&metadata.etag) {
            return damaged("checksum", metadata.etag.clone(), found);
        }
        Ok(())
    }
}

/// The hash that an ETag is: SHA-256 of large files, git's of others; none if it is something else.
fn start(metadata: &Metadata) -> Option<digest::Context> {
    let algorithm = if is_hash(&metadata.etag, 64) {
        &digest::SHA256
    } else if is_hash(&metadata.etag, 40) {
        &digest::SHA1_FOR_LEGACY_USE_ONLY
    } else {
        return None;
    };
    Some(begin(algorithm, metadata.size))
}

fn begin(algorithm: &'static digest::Algorithm, size: u64) -> digest::Context {
    let mut hash = digest::Context::new(algorithm);
    if algorithm == &digest::SHA1_FOR_LEGACY_USE_ONLY {
        hash.update(format!("blob {size}\0").as_bytes());
    }
    hash
}
