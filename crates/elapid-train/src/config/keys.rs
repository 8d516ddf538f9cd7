//! Which keys a configuration table has, asked of serde itself, so that no list can fall behind the
//! structs: a deserializer that never delivers anything but notes the field names a struct asks for.

use std::fmt;

use serde::de::{self, DeserializeOwned, Visitor};

/// The field names of a struct with a derived `Deserialize`, in order of declaration; empty for
/// any other type.
pub(crate) fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // The probe always ends in an error; what counts is what it saw before.
    let _ = T::deserialize(Probe { fields: &mut fields });
    fields
}

struct Probe<'a> {
    fields: &'a mut &'static [&'static str],
}

#[derive(Debug)]
struct Probed;

impl fmt::Display for Probed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("field names were probed")
    }
}

impl std::error::Error for Probed {}

impl de::Error for Probed {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

impl<'de> de::Deserializer<'de> for Probe<'_> {
    type Error = Probed;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Probed> {
        Err(Probed)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Probed> {
        *self.fields = fields;
        Err(Probed)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The candidate most like `key`, if there is any candidate, and whether it is so near that a
/// slip of the finger or of memory is likely.
pub(crate) fn nearest<'a>(key: &str, candidates: &[&'a str]) -> Option<(&'a str, bool)> {
    let score = |candidate: &str| {
        let edits = strsim::normalized_damerau_levenshtein(key, candidate);
        // Half-remembered names share words, not letters in place: `warmup` for `warmup_steps`.
        let shared = key.split('_').filter(|w| candidate.split('_').any(|c| c == *w)).count();
        let words = key.split('_').count().max(candidate.split('_').count());
        edits.max(strsim::jaro_winkler(key, candidate) - 0.2) + 0.3 * shared as f64 / words as f64
    };
    let best = candidates.iter().map(|c| (score(c), *c)).reduce(|best, next| {
        // Ties go to the earlier one, so that the answer is stable.
        if next.0 > best.0 { next } else { best }
    })?;
    Some((best.1, best.0 >= 0.6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    #[allow(dead_code)]
    struct Example {
        first: u32,
        #[serde(default)]
        second: Option<String>,
    }

    #[test]
    fn names_come_in_order_of_declaration() {
        assert_eq!(field_names::<Example>(), ["first", "second"]);
        assert!(field_names::<String>().is_empty());
    }

    #[test]
    fn nearest_key() {
        let keys = ["lr", "betas", "eps", "weight_decay", "clip_norm", "warmup_steps"];
        assert_eq!(nearest("weigth_decay", &keys), Some(("weight_decay", true)));
        assert_eq!(nearest("wieght_decay", &keys), Some(("weight_decay", true)));
        assert_eq!(nearest("warmup", &keys), Some(("warmup_steps", true)));
        assert_eq!(nearest("beta", &keys), Some(("betas", true)));
        assert_eq!(nearest("clip", &keys), Some(("clip_norm", true)));
        assert!(!nearest("zzz", &keys).unwrap().1);
        assert_eq!(nearest("lr", &[]), None);
    }
}
