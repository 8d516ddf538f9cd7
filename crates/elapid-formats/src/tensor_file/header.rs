//! The header of a safetensors file. The crate's own reading keeps every value in a tree first, many times as large as the
//! text.

use std::collections::{HashMap, HashSet};
use std::fmt;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

/// Axes that a tensor may have, whatever reads it.
const MOST_AXES: usize = 32;

/// Where the data starts, and the header. Sizes are compared here rather than by the crate, whose own sum
/// can overflow.
pub(super) fn parse(file: &[u8]) -> Result<(usize, Metadata), String> {
    let (length, rest) =
        file.split_first_chunk::<8>().ok_or("truncated: no header length".to_owned())?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| {
        format!(
            "truncated or not a safetensors file: the header should have {length} bytes, {} are left",
            rest.len()
        )
    })?;
    let damaged = |error: String| format!("damaged header: {error}");
    let text = std::str::from_utf8(header).map_err(|error| damaged(error.to_string()))?;
    let Header { metadata, mut tensors } =
        serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let metadata = Metadata::new(metadata, tensors).map_err(|error| damaged(error.to_string()))?;
    let data = rest.len() - header.len();
    if metadata.data_len() != data {
        return Err(format!(
            "truncated or damaged: the header describes {} bytes of data, {data} are there",
            metadata.data_len()
        ));
    }
    Ok((8 + header.len(), metadata))
}

struct Header {
    metadata: Option<HashMap<String, String>>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: None, tensors: Vec::new() };
                while let Some(name) = entries.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = entries.next_value()?;
                        continue;
                    }
                    let tensor: TensorInfo = entries.next_value()?;
                    if tensor.shape.len() > MOST_AXES {
                        let message = format!("{name} has {} axes", tensor.shape.len());
                        return Err(A::Error::custom(message));
                    }
                    header.tensors.push((name, tensor));
                }
                let mut names = HashSet::with_capacity(header.tensors.len());
                match header.tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
                    Some((name, _)) => Err(A::Error::custom(format!("{name} is there twice"))),
                    None => Ok(header),
                }
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    fn of(header: &str, data: usize) -> Result<Vec<String>, String> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.resize(file.len() + data, 0);
        parse(&file).map(|(_, metadata)| metadata.offset_keys())
    }

    #[test]
    fn tensors_in_the_order_of_their_data() {
        let header = r#"{"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8], "more": [1]}, "__metadata__": {"a": "b"},
            "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}"#;
        assert_eq!(of(header, 8).unwrap(), ["a", "b"]);
        assert_eq!(of(r#"{"__metadata__": null}"#, 0).unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let twice = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#;
        assert!(of(twice, 8).unwrap_err().contains("a is there twice"));
        let axes = format!(
            r#"{{"a": {{"dtype": "F32", "shape": [{}1], "data_offsets": [0, 4]}}}}"#,
            "1,".repeat(32)
        );
        assert!(of(&axes, 4).unwrap_err().contains("a has 33 axes"));
        for header in ["[]", "{", r#"{"a": 1}"#, r#"{"__metadata__": {"a": 1}}"#] {
            assert!(of(header, 0).unwrap_err().contains("damaged header"), "{header}");
        }
    }
}
