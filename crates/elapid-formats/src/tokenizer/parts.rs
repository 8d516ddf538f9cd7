//! Normalizer, pre-tokenizer, post-processor and decoder of a `tokenizer.json`: a few short lists of rules. They pass
//! through a tree of values of bounded size, and what the library would take for granted is checked.

use std::fmt;

use serde::Deserialize;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};
use tokenizers::{DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

/// What a part may have: an object counts 16, an array 4, another value 1, which is about 50 bytes each.
const LARGEST: usize = 60_000;

/// A part that has not been looked into.
#[derive(Default)]
pub(super) struct Part(Value);

impl Part {
    pub(super) fn normalizer(self) -> tokenizers::Result<Option<NormalizerWrapper>> {
        if find(&self.0, &|object| object.get("prepend").is_some_and(|text| text == "")) {
            return Err("a normalizer that prepends nothing".into());
        }
        self.read("normalizer")
    }

    pub(super) fn pre_tokenizer(self) -> tokenizers::Result<Option<PreTokenizerWrapper>> {
        self.read("pre_tokenizer")
    }

    pub(super) fn post_processor(self) -> tokenizers::Result<Option<PostProcessorWrapper>> {
        // Old files do not say that it is a template.
        let wrong = |object: &Map<String, Value>| {
            object.contains_key("single") && !names_its_tokens(object)
        };
        if find(&self.0, &wrong) {
            let message = "a template for one text names another text, or a mark that is not among special_tokens";
            return Err(format!("post_processor: {message}").into());
        }
        self.read("post_processor")
    }

    pub(super) fn decoder(self) -> tokenizers::Result<Option<DecoderWrapper>> {
        // The end of a token without characters is looked for before its start.
        let strips =
            |object: &Map<String, Value>| object.get("stop").is_some_and(|stop| *stop != 0);
        if find(&self.0, &strips) {
            return Err("decoder: a Strip with stop other than 0 is not supported".into());
        }
        self.read("decoder")
    }

    fn read<T: DeserializeOwned>(self, name: &str) -> tokenizers::Result<Option<T>> {
        serde_json::from_value(self.0).map_err(|error| format!("{name}: {error}").into())
    }
}

/// True if some object within satisfies the condition.
fn find(value: &Value, condition: &dyn Fn(&Map<String, Value>) -> bool) -> bool {
    match value {
        Value::Object(object) => {
            condition(object) || object.values().any(|value| find(value, condition))
        }
        Value::Array(items) => items.iter().any(|value| find(value, condition)),
        _ => false,
    }
}

/// True if a template for one text has only that text, and marks that it describes.
fn names_its_tokens(template: &Map<String, Value>) -> bool {
    let described = |name: &Value| {
        let mark = name.as_str().and_then(|name| template.get("special_tokens")?.get(name));
        let count = |key: &str| mark?.get(key)?.as_array().map(Vec::len);
        count("ids").is_some() && count("ids") == count("tokens")
    };
    template.get("single").and_then(Value::as_array).is_some_and(|pieces| {
        pieces.iter().all(|piece| match (piece.get("Sequence"), piece.get("SpecialToken")) {
            (Some(text), None) => text["id"] == "A",
            (None, Some(mark)) => described(&mark["id"]),
            _ => false,
        })
    })
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Budget(&mut LARGEST.clone()).deserialize(deserializer).map(Self)
    }
}

/// Reads a value and takes what it costs.
struct Budget<'a>(&'a mut usize);

impl Budget<'_> {
    fn take<E: Error>(&mut self, cost: usize) -> Result<(), E> {
        match self.0.checked_sub(cost) {
            Some(left) => *self.0 = left,
            None => return Err(E::custom("a part has too many values")),
        }
        Ok(())
    }

    fn scalar<E: Error>(mut self, value: impl Into<Value>) -> Result<Value, E> {
        self.take(1)?;
        Ok(value.into())
    }
}

impl<'de> DeserializeSeed<'de> for Budget<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Budget<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.scalar(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Value, A::Error> {
        self.take(4)?;
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(Budget(self.0))? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        self.take(16)?;
        let mut all = Map::new();
        while let Some(key) = entries.next_key()? {
            all.insert(key, entries.next_value_seed(Budget(self.0))?);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(text: &str) -> Part {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn values_are_those_of_the_text() {
        let text = r#"{"a": [1, -2, 0.5, null, true, "x\n", {}], "b": {"c": []}}"#;
        assert_eq!(part(text).0, serde_json::from_str::<Value>(text).unwrap());
        let many = format!("[{}0]", "0,".repeat(LARGEST));
        assert!(serde_json::from_str::<Part>(&many).is_err());
        assert!(
            serde_json::from_str::<Part>(&format!("[{}0]", "{},".repeat(LARGEST / 16))).is_err()
        );
    }

    #[test]
    fn what_the_library_takes_for_granted() {
        let template = |single: &str, marks: &str| {
            let text = format!(
                r#"{{"type": "Sequence", "processors": [{{"type": "TemplateProcessing", "single": [{single}], "pair": [],
                    "special_tokens": {{{marks}}}}}]}}"#
            );
            part(&text).post_processor().is_ok()
        };
        let (a, b) = (
            r#"{"Sequence": {"id": "A", "type_id": 0}}"#,
            r#"{"Sequence": {"id": "B", "type_id": 0}}"#,
        );
        let mark = r#"{"SpecialToken": {"id": "<s>", "type_id": 0}}"#;
        let described = r#""<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}"#;
        assert!(template(a, "") && template(&format!("{mark}, {a}"), described));
        assert!(!template(b, "") && !template(mark, ""));
        assert!(!template(mark, &described.replace("[1]", "[1, 2]")));
        let old = r#"{"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [], "special_tokens": {}}"#;
        assert!(part(old).post_processor().is_err());

        let strip = |stop: &str| {
            let text =
                format!(r#"{{"type": "Strip", "content": " ", "start": 1, "stop": {stop}}}"#);
            part(&text).decoder().is_ok()
        };
        assert!(strip("0") && !strip("1"));
        let prepend = r#"[{"type": "Prepend", "prepend": ""}]"#;
        assert!(part(prepend).normalizer().unwrap_err().to_string().contains("prepends nothing"));
        // What is no JSON at all inside of a part is no panic either.
        for text in [r#"{"type": "ByteLevel" "#, "1e999", "\"\\ud800\"", "[", "{\"type\"}"] {
            assert!(serde_json::from_str::<Part>(text).is_err(), "{text}");
        }
        assert!(
            part(r#"{"type": "Else"}"#).decoder().is_err()
                && part("null").decoder().unwrap().is_none()
        );
    }
}
