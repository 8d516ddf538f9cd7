//! Range checks on configuration values, each ending in an error that names the key, its place in
//! the file, what was expected and what was found.

use std::fmt::Display;

use crate::error::{Error, Place, Result};

/// Checks values; `place` says where a key was written.
pub(crate) struct Check<'a> {
    pub(crate) place: &'a dyn Fn(&str) -> Place,
}

impl Check<'_> {
    /// Fails unless `holds`.
    pub(crate) fn that(
        &self,
        holds: bool,
        key: &str,
        expected: &str,
        found: impl Display,
    ) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Error::BadValue {
            place: (self.place)(key),
            key: key.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        })
    }

    /// A whole number from `low` to `high`.
    pub(crate) fn whole(&self, key: &str, value: usize, low: usize, high: usize) -> Result<()> {
        let expected = format!("a whole number from {low} to {high}");
        self.that((low..=high).contains(&value), key, &expected, value)
    }

    /// A finite number above 0.
    pub(crate) fn positive(&self, key: &str, value: f64) -> Result<()> {
        self.that(value.is_finite() && value > 0.0, key, "a number above 0", value)
    }

    /// A finite number, 0 or more.
    pub(crate) fn not_negative(&self, key: &str, value: f64) -> Result<()> {
        self.that(value.is_finite() && value >= 0.0, key, "a number, 0 or more", value)
    }

    /// A number in [0, 1).
    pub(crate) fn fraction(&self, key: &str, value: f64) -> Result<()> {
        self.that(
            (0.0..1.0).contains(&value),
            key,
            "a number from 0 up to, not including, 1",
            value,
        )
    }

    /// At most one of several keys of a table is given.
    pub(crate) fn at_most_one(&self, table: &str, keys: &[(&str, bool)]) -> Result<()> {
        let given: Vec<&str> = keys.iter().filter(|(_, given)| *given).map(|(k, _)| *k).collect();
        let all: Vec<&str> = keys.iter().map(|(k, _)| *k).collect();
        let last = given.last().copied().unwrap_or(table);
        self.that(
            given.len() <= 1,
            &format!("{table}.{last}"),
            &format!("only one of {}", all.join(", ")),
            given.join(" and "),
        )
    }
}
