//! JSON as model folders have it: small files, and numbers that JSON does not know.
//!
//! Python writes infinite numbers as a bare `Infinity`, newer configurations as `{"__float__": "Infinity"}`.
//! Both are read as the latter.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// A configuration is a few kilobytes, the index of a sharded model a few hundred.
const LARGEST: u64 = 16 << 20;

/// Reads a file of bounded size.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let file = crate::tensor_file::open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > LARGEST {
        return Err(Error::format(path, format!("larger than {LARGEST} bytes")));
    }
    Ok(bytes)
}

/// Reads a text file of bounded size.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read_bytes(path)?)
        .map_err(|error| Error::format(path, format!("not valid UTF-8: {}", error.utf8_error())))
}

/// Reads a JSON object.
pub(crate) fn read_object(path: &Path) -> Result<serde_json::Map<String, Value>> {
    parse_object(path, read_text(path)?.as_bytes())
}

/// A JSON object from its text, which came from `path`.
pub(crate) fn parse_object(path: &Path, bytes: &[u8]) -> Result<serde_json::Map<String, Value>> {
    if bytes.len() as u64 > LARGEST {
        return Err(Error::format(path, format!("larger than {LARGEST} bytes")));
    }
    let text = str::from_utf8(bytes)
        .map_err(|error| Error::format(path, format!("not valid UTF-8: {error}")))?;
    match serde_json::from_str(&quote_special_numbers(text)) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            Err(Error::format(path, format!("expected a JSON object, found {}", kind(&other))))
        }
        Err(error) => Err(Error::format(path, format!("not valid JSON: {error}"))),
    }
}

/// The name of a value's type.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Replaces bare `Infinity`, `-Infinity` and `NaN` outside of strings by the object form.
fn quote_special_numbers(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(character) = rest.chars().next() {
        if !in_string {
            let special =
                ["-Infinity", "Infinity", "NaN"].into_iter().find(|s| rest.starts_with(s));
            if let Some(special) = special {
                result += &format!("{{\"__float__\":\"{special}\"}}");
                rest = &rest[special.len()..];
                continue;
            }
        }
        let mut taken = character.len_utf8();
        if character == '"' {
            in_string = !in_string;
        } else if character == '\\' && in_string {
            taken += rest[1..].chars().next().map_or(0, char::len_utf8);
        }
        result.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    result
}

/// A number, the object form of a special one included.
pub(crate) fn as_f64(value: &Value) -> Option<f64> {
    match value.get("__float__").unwrap_or(value) {
        Value::String(text) if value.is_object() => match text.as_str() {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            "NaN" => Some(f64::NAN),
            _ => None,
        },
        number => number.as_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_numbers_in_both_forms() {
        let text = r#"{"limit": [0.0, Infinity], "low": -Infinity, "text": "an \" Infinity NaN", "x": NaN,
            "new": {"__float__": "Infinity"}}"#;
        let value: Value = serde_json::from_str(&quote_special_numbers(text)).unwrap();
        assert_eq!(as_f64(&value["limit"][1]), Some(f64::INFINITY));
        assert_eq!(as_f64(&value["limit"][0]), Some(0.0));
        assert_eq!(as_f64(&value["low"]), Some(f64::NEG_INFINITY));
        assert_eq!(as_f64(&value["new"]), Some(f64::INFINITY));
        assert!(as_f64(&value["x"]).unwrap().is_nan());
        assert_eq!(value["text"], "an \" Infinity NaN");
        assert_eq!(as_f64(&value["text"]), None);
    }
}
