//! `training.json`: what a checkpoint consists of, and the hashes that prove it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::MANIFEST_FILE;
use crate::fingerprint::{from_hex, hex};
use crate::{Error, Result, atomic, json, tensor_file};

const FORMAT: &str = "elapid-checkpoint";
const VERSION: u64 = 1;

/// Length and hash of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub bytes: u64,
    pub hash: u128,
}

/// The content of `training.json`.
#[derive(Debug)]
pub(super) struct Manifest {
    pub step: u64,
    pub meta: Value,
    pub files: BTreeMap<String, Sum>,
}

impl Manifest {
    /// Everything but the checksum over it.
    fn body(&self) -> Map<String, Value> {
        let files: Map<String, Value> = self
            .files
            .iter()
            .map(|(name, sum)| {
                (name.clone(), json!({ "bytes": sum.bytes, "xxh3_128": hex(sum.hash) }))
            })
            .collect();
        let mut body = Map::new();
        body.insert("format".into(), FORMAT.into());
        body.insert("version".into(), VERSION.into());
        body.insert("step".into(), self.step.into());
        body.insert("meta".into(), self.meta.clone());
        body.insert("files".into(), files.into());
        body
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let mut body = self.body();
        body.insert("checksum".into(), hex(checksum(&body)).into());
        let text = format!("{:#}\n", Value::Object(body));
        atomic::write_file(&folder.join(MANIFEST_FILE), |out| out.write_all(text.as_bytes()))
    }

    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST_FILE);
        let mut body = json::read_object(&path)?;
        let damaged = |what: &str| Error::format(&path, format!("damaged: {what}"));
        if body.get("format").and_then(Value::as_str) != Some(FORMAT) {
            return Err(damaged("no checkpoint of this program"));
        }
        let version = body.get("version").and_then(Value::as_u64);
        if version != Some(VERSION) {
            return Err(Error::Mismatch {
                path: path.clone(),
                what: "version of the checkpoint",
                expected: VERSION.to_string(),
                found: version.map_or("none".into(), |version| version.to_string()),
            });
        }
        let expected = body
            .remove("checksum")
            .and_then(|value| from_hex(value.as_str()?))
            .ok_or_else(|| damaged("no checksum"))?;
        let found = checksum(&body);
        if found != expected {
            return Err(Error::Mismatch {
                path: path.clone(),
                what: "damaged: checksum",
                expected: hex(expected),
                found: hex(found),
            });
        }
        let step = body.get("step").and_then(Value::as_u64).ok_or_else(|| damaged("no step"))?;
        let listed = body.get("files").and_then(Value::as_object);
        let mut files = BTreeMap::new();
        for (name, value) in listed.ok_or_else(|| damaged("no list of files"))? {
            let sum = (|| {
                let hash = from_hex(value.get("xxh3_128")?.as_str()?)?;
                Some(Sum { bytes: value.get("bytes")?.as_u64()?, hash })
            })();
            files.insert(name.clone(), sum.ok_or_else(|| damaged("the list of files"))?);
        }
        Ok(Self { step, meta: body.remove("meta").unwrap_or(Value::Null), files })
    }

    /// Compares every file with its hash.
    pub(super) fn verify(&self, folder: &Path) -> Result<()> {
        for (name, expected) in &self.files {
            let path = folder.join(name);
            let found = sum_of(&path)?;
            let mismatch = |what, expected: String, found: String| {
                Err(Error::Mismatch { path: path.clone(), what, expected, found })
            };
            if found.bytes != expected.bytes {
                let text = |bytes: u64| format!("{bytes} bytes");
                return mismatch("damaged: length", text(expected.bytes), text(found.bytes));
            }
            if found.hash != expected.hash {
                return mismatch("damaged: checksum", hex(expected.hash), hex(found.hash));
            }
        }
        Ok(())
    }
}

/// Keys are sorted and white space is left out, so that the hash is that of the meaning.
fn checksum(body: &Map<String, Value>) -> u128 {
    let sorted: BTreeMap<&String, &Value> = body.iter().collect();
    xxh3_128(json!(sorted).to_string().as_bytes())
}

fn sum_of(path: &Path) -> Result<Sum> {
    let mut file: File = tensor_file::open_regular(path)?;
    let mut hash = Xxh3::new();
    let mut bytes = 0;
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut piece).map_err(Error::io("read", path))?;
        if read == 0 {
            return Ok(Sum { bytes, hash: hash.digest128() });
        }
        hash.update(&piece[..read]);
        bytes += read as u64;
    }
}
