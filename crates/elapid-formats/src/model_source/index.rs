//! The index of a model that lies in several files: which shard holds which tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::{Error, Result};

/// The index of a model of a thousand layers has about a megabyte.
const LARGEST: usize = 16 << 20;

/// The shards in the order of their names, and the tensors that each should hold.
pub(crate) struct Index {
    pub shards: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct File {
    weight_map: Option<Index>,
}

impl Index {
    /// Reads the text of an index; `path` is for errors.
    ///
    /// # Errors
    /// If it is no such JSON, or a shard is not the name of a file in the folder itself.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        if text.len() > LARGEST {
            return Err(Error::format(path, format!("larger than {LARGEST} bytes")));
        }
        let file: File = serde_json::from_slice(text)
            .map_err(|error| Error::format(path, format!("no usable index: {error}")))?;
        let index = file.weight_map.ok_or_else(|| Error::format(path, "has no \"weight_map\""))?;
        for (shard, names) in &index.shards {
            // Whatever the index says; "a/" and "a/." would be other names of "a".
            if Path::new(shard).file_name().is_none_or(|name| name != shard.as_str()) {
                let name = names.first().map_or("", String::as_str);
                let message = format!("{name}: expected a file name, found {shard:?}");
                return Err(Error::format(path, message));
            }
        }
        Ok(index)
    }
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Index;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Index, A::Error> {
                let mut shards = BTreeMap::<String, Vec<String>>::new();
                while let Some((name, shard)) = entries.next_entry::<String, String>()? {
                    shards.entry(shard).or_default().push(name);
                }
                Ok(Index { shards })
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Index> {
        Index::parse(Path::new("model.safetensors.index.json"), text.as_bytes())
    }

    #[test]
    fn tensors_by_shard() {
        let text =
            r#"{"metadata": {"total_size": 12}, "weight_map": {"b": "2", "a": "1", "c": "2"}}"#;
        let shards: Vec<_> = parse(text).unwrap().shards.into_iter().collect();
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(shards, [("1".into(), names(&["a"])), ("2".into(), names(&["b", "c"]))]);
    }

    #[test]
    fn what_is_no_index_is_refused() {
        for (text, word) in [
            ("", "no usable index"),
            ("[]", "no usable index"),
            ("{}", "weight_map"),
            (r#"{"weight_map": null}"#, "weight_map"),
            (r#"{"weight_map": []}"#, "object of tensor names"),
            (r#"{"weight_map": {"a": 1}}"#, "string"),
            (r#"{"weight_map": {"a": ""}}"#, "a: expected a file name"),
        ] {
            let error = parse(text).err().expect(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        for shard in ["..", ".", "/etc/passwd", "a/b", "../a", "./a", "a/", "a//", "a/."] {
            let error = parse(&format!(r#"{{"weight_map": {{"t": "{shard}"}}}}"#)).err();
            let error = error.expect(shard).to_string();
            assert!(error.contains("t: expected a file name") && error.contains(shard), "{error}");
        }
    }
}
