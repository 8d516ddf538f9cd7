//! Names of models on the hub: `OWNER/NAME`, with `@REVISION` behind it or `/FILE.gguf`.

use std::fmt;

use super::MAIN;

/// The longest name that the hub gives.
const LONGEST: usize = 96;

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `OWNER/NAME`.
    pub repository: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// One file of the repository, if one is meant.
    pub file: Option<String>,
}

impl Reference {
    /// Reads `OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME/FILE.gguf` or both; none if the text is not
    /// of this form.
    pub fn parse(text: &str) -> Option<Self> {
        let (text, revision) = match text.split_once('@') {
            None => (text, MAIN),
            Some((text, revision)) => (text, revision),
        };
        let mut parts = text.splitn(3, '/');
        let (owner, name, file) = (parts.next()?, parts.next()?, parts.next());
        let fits = is_name(owner) && is_name(name) && is_revision(revision);
        let file_fits = file.is_none_or(|file| file.ends_with(".gguf") && is_file(file));
        (fits && file_fits && owner.len() + name.len() < LONGEST).then(|| Self {
            repository: format!("{owner}/{name}"),
            revision: revision.into(),
            file: file.map(Into::into),
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// Owners and models: letters, digits, `-`, `_` and `.`, the latter not first, last or twice.
fn is_name(text: &str) -> bool {
    let edge = |character: Option<char>| character.is_some_and(|c| c != '.' && c != '-');
    edge(text.chars().next())
        && edge(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !text.contains("..")
        && !text.contains("--")
}

/// A revision becomes part of a path in the cache, so it may not lead out of it.
fn is_revision(text: &str) -> bool {
    is_file(text) && !text.contains(['?', '#', '%', ' '])
}

/// A relative path without anything that leads elsewhere.
pub(super) fn is_file(text: &str) -> bool {
    !text.is_empty()
        && text.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !text.contains(['\\', ':'])
        && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_revision_or_a_file() {
        let parse = |text: &str| Reference::parse(text).map(|r| (r.repository, r.revision, r.file));
        let own = |repository: &str, revision: &str, file: Option<&str>| {
            Some((repository.to_owned(), revision.to_owned(), file.map(str::to_owned)))
        };
        assert_eq!(parse("state-spaces/mamba-130m"), own("state-spaces/mamba-130m", "main", None));
        assert_eq!(parse("a/b@refs/pr/1"), own("a/b", "refs/pr/1", None));
        assert_eq!(parse("a/b/q/m.gguf@v1"), own("a/b", "v1", Some("q/m.gguf")));
        for text in ["a/b", "a/b@v1", "a/b/m.gguf", "a/b/m.gguf@v1"] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn paths_are_no_names() {
        for text in [
            "model",
            "./model",
            "../a/b",
            "/a/b",
            "a/b/c",
            "a/b/",
            "a//b",
            "~/model",
            "a\\b/c",
            "C:/b",
            "a/b@",
            "a/b@../..",
            "a/b@/x",
            "a/../m.gguf",
            "a/b/../m.gguf",
            "a b/c",
            ".a/b",
            "a/b..c",
            "a--b/c",
            "",
        ] {
            assert_eq!(Reference::parse(text), None, "{text:?}");
        }
        assert_eq!(Reference::parse(&format!("a/{}", "b".repeat(96))), None);
    }
}
