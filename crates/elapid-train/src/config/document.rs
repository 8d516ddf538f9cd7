//! A configuration text before it has a meaning: TOML with `--set` overrides laid over it, in which
//! every value still knows the line or the override it came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::error::{Error, Place, Result};

/// Values and their origins.
#[derive(Debug, Clone)]
pub(crate) struct Document {
    /// The merged values.
    pub(crate) table: Table,
    file: Option<PathBuf>,
    places: BTreeMap<String, Place>,
}

impl Document {
    /// Parses TOML text; `file` is only named in errors.
    pub(crate) fn parse(text: &str, file: Option<&Path>) -> Result<Self> {
        let place = |span: Option<std::ops::Range<usize>>| {
            let line = span.map(|s| line_of(text, s.start));
            file.map_or(Place::Nowhere, |f| Place::File(f.to_path_buf(), line))
        };
        let syntax = |error: toml::de::Error| Error::Syntax {
            place: place(error.span()),
            message: error.message().to_string(),
        };
        let table: Table = text.parse().map_err(syntax)?;
        let spanned = DeTable::parse(text).map_err(syntax)?;
        let mut places = BTreeMap::new();
        note_places(spanned.get_ref(), "", &mut |path, start| {
            places.insert(path, place(Some(start..start)));
        });
        Ok(Self { table, file: file.map(Path::to_path_buf), places })
    }

    /// Lays `a.b=c` over the document. The value is TOML where it parses as TOML and is
    /// `accepted`, otherwise the text itself as a string, so that paths and words need no quotes.
    pub(crate) fn set(
        &mut self,
        text: &str,
        accepted: impl Fn(&str, &Value) -> bool,
    ) -> Result<()> {
        let place = Place::Override(text.to_string());
        let bad = |key: &str, expected: &str, found: String| Error::BadValue {
            place: place.clone(),
            key: key.to_string(),
            expected: expected.to_string(),
            found,
        };
        let Some((key, value)) = text.split_once('=') else {
            return Err(bad(text.trim(), "key=value, such as optimizer.lr=0.001", "no `=`".into()));
        };
        let key = key.trim();
        let parts: Vec<&str> = key.split('.').map(str::trim).collect();
        if parts.len() < 2 || parts.iter().any(|p| p.is_empty()) {
            let expected = "table.key=value, such as optimizer.lr=0.001";
            return Err(bad(key, expected, format!("key `{key}`")));
        }
        let word = Value::String(value.trim().to_string());
        let value = match value.trim().parse::<Value>() {
            Ok(parsed) if accepted(key, &parsed) || !accepted(key, &word) => parsed,
            _ => word,
        };
        let (last, tables) = parts.split_last().expect("at least two parts, checked above");
        let mut table = &mut self.table;
        let mut path = String::new();
        for part in tables {
            path = if path.is_empty() { (*part).to_string() } else { format!("{path}.{part}") };
            self.places.entry(path.clone()).or_insert_with(|| place.clone());
            let entry = table.entry(*part).or_insert_with(|| Value::Table(Table::new()));
            let found = entry.type_str();
            table = match entry {
                Value::Table(inner) => inner,
                _ => return Err(bad(part, "a table", format!("a {found}"))),
            };
        }
        // What lay below an overridden table is gone, and with it the lines it had.
        let below = format!("{key}.");
        self.places.retain(|path, _| !path.starts_with(&below));
        table.insert((*last).to_string(), value);
        self.places.insert(parts.join("."), place);
        Ok(())
    }

    /// Removes `path`, unless an override put it there.
    pub(crate) fn drop_written(&mut self, path: &str) {
        if matches!(self.places.get(path), Some(Place::Override(_))) {
            return;
        }
        let (tables, last) = path.rsplit_once('.').unwrap_or(("", path));
        let mut table = Some(&mut self.table);
        for part in tables.split('.').filter(|part| !part.is_empty()) {
            table = table.and_then(|t| t.get_mut(part)).and_then(Value::as_table_mut);
        }
        if let Some(table) = table {
            table.remove(last);
        }
    }

    /// Where the value of `path` (or else the table that holds it) was written.
    pub(crate) fn place(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return place.clone();
            }
            match path.rsplit_once('.') {
                Some((parent, _)) => path = parent,
                None => break,
            }
        }
        self.file.clone().map_or(Place::Nowhere, |f| Place::File(f, None))
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
}

fn note_places(table: &DeTable<'_>, prefix: &str, note: &mut impl FnMut(String, usize)) {
    for (key, value) in table {
        let path = if prefix.is_empty() {
            key.get_ref().to_string()
        } else {
            format!("{prefix}.{}", key.get_ref())
        };
        if let DeValue::Table(inner) = value.get_ref() {
            note_places(inner, &path, note);
        }
        note(path, key.span().start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_know_their_line() {
        let text = "# a comment\n[train]\nsteps = 3\n\n[data]\npaths = [\n  \"a\",\n]\n";
        let document = Document::parse(text, Some(Path::new("x.toml"))).unwrap();
        assert_eq!(document.place("train.steps").to_string(), "x.toml:3");
        assert_eq!(document.place("data.paths").to_string(), "x.toml:6");
        // A missing key is placed at its table, a missing table at the file.
        assert_eq!(document.place("train.seed").to_string(), "x.toml:2");
        assert_eq!(document.place("model.d_model").to_string(), "x.toml");
    }

    #[test]
    fn syntax_errors_name_the_line() {
        let error = Document::parse("a = 1\nb = = 2\n", Some(Path::new("x.toml"))).unwrap_err();
        assert!(error.to_string().starts_with("x.toml:2: not valid TOML"), "{error}");
        let error = Document::parse("[a]\nb = 1\nb = 2\n", Some(Path::new("x.toml"))).unwrap_err();
        assert!(error.to_string().starts_with("x.toml:3: "), "{error}");
    }

    #[test]
    fn overrides_are_toml_or_else_text() {
        let mut document = Document::parse("[a]\nx = 1\n", None).unwrap();
        document.set("a.x = 2.5", |_, _| true).unwrap();
        document.set("a.list=[1, 2]", |_, _| true).unwrap();
        document.set("b.path=runs/first one", |_, _| true).unwrap();
        // A number where only text is accepted stays text.
        document.set("b.name=2024", |_, v| v.is_str()).unwrap();
        let expected =
            "[a]\nlist = [1, 2]\nx = 2.5\n[b]\nname = \"2024\"\npath = \"runs/first one\"";
        assert_eq!(document.table, expected.parse::<Table>().unwrap());
        assert_eq!(document.place("b.path").to_string(), "--set b.path=runs/first one");
        assert_eq!(document.place("b").to_string(), "--set b.path=runs/first one");
    }

    #[test]
    fn a_bad_override_says_what_it_wants() {
        let mut document = Document::parse("[a]\nx = 1\n", None).unwrap();
        for text in ["a.x", "x=1", ".x=1", "a.=1", "=", "a.x.y=1"] {
            let error = document.set(text, |_, _| true).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--set {text}")), "{error}");
            assert!(error.contains("expected"), "{error}");
        }
    }
}
