//! Which files a list of paths, folders and globs means, in an order that does not depend on the file
//! system: the order of the list, and by name within a folder or a glob.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use walkdir::WalkDir;

use super::SourceOptions;
use super::bytes::{Compression, missing_or_unreadable};
use crate::{Error, Result};

/// The files of a source, at least one, each once.
pub(super) fn files(options: &SourceOptions) -> Result<Vec<PathBuf>> {
    if options.paths.is_empty() {
        return Err(Error::NoInput);
    }
    let filter = Filter::new(&options.extensions);
    let mut files = Vec::new();
    for path in &options.paths {
        match std::fs::metadata(path) {
            Ok(kind) if kind.is_dir() => {
                let found = folder(path, &filter)?;
                if found.is_empty() {
                    return Err(Error::EmptyFolder { path: path.clone(), filter: filter.words() });
                }
                files.extend(found);
            }
            Ok(_) => files.push(path.clone()),
            // What exists under its own name is never read as a pattern.
            Err(error) => match Pattern::parse(path)? {
                Some(pattern) => {
                    let found = pattern.files(&filter)?;
                    if found.is_empty() {
                        return Err(Error::NoMatch {
                            pattern: path.display().to_string(),
                            filter: filter.words(),
                        });
                    }
                    files.extend(found);
                }
                None => return Err(missing_or_unreadable(path, error)),
            },
        }
    }
    let mut seen = HashSet::new();
    files.retain(|file| seen.insert(file.canonicalize().unwrap_or_else(|_| file.clone())));
    Ok(files)
}

/// The extensions that are wanted.
struct Filter {
    extensions: Vec<String>,
}

impl Filter {
    fn new(extensions: &[String]) -> Self {
        let extensions =
            extensions.iter().map(|e| e.trim_start_matches('.').to_ascii_lowercase()).collect();
        Self { extensions }
    }

    fn accepts(&self, path: &Path) -> bool {
        if self.extensions.is_empty() {
            return true;
        }
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase())
        else {
            return false;
        };
        let plain = match Compression::of(path) {
            Some(_) => name.rsplit_once('.').map_or("", |(stem, _)| stem),
            None => &name,
        };
        self.extensions.iter().any(|extension| {
            [name.as_str(), plain].iter().any(|name| {
                name.strip_suffix(extension.as_str()).is_some_and(|stem| stem.ends_with('.'))
            })
        })
    }

    fn words(&self) -> String {
        match self.extensions.is_empty() {
            true => String::new(),
            false => format!(" with one of the extensions {}", self.extensions.join(", ")),
        }
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// Files under `root`, symbolic links followed, sorted by name, hidden ones only if asked for.
fn walk(root: &Path, max_depth: usize, hidden: bool) -> impl Iterator<Item = Result<PathBuf>> {
    let root = root.to_path_buf();
    WalkDir::new(&root)
        .follow_links(true)
        .max_depth(max_depth)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(move |entry| hidden || entry.depth() == 0 || !is_hidden(entry.file_name()))
        .filter_map(move |entry| match entry {
            Ok(entry) => entry.file_type().is_file().then(|| Ok(entry.into_path())),
            Err(error) => {
                let path = error.path().unwrap_or(&root).to_path_buf();
                let text = error.to_string();
                let source = error.into_io_error().unwrap_or_else(|| io::Error::other(text));
                Some(Err(Error::Unreadable { path, source }))
            }
        })
}

fn folder(root: &Path, filter: &Filter) -> Result<Vec<PathBuf>> {
    walk(root, usize::MAX, false)
        .filter(|path| path.as_ref().map_or(true, |path| filter.accepts(path)))
        .collect()
}

/// A glob, split at its first component that is not literal.
struct Pattern {
    base: PathBuf,
    matcher: GlobMatcher,
    max_depth: usize,
    hidden: bool,
}

impl Pattern {
    /// `None` if `path` has no glob character.
    fn parse(path: &Path) -> Result<Option<Self>> {
        let Some(text) = path.to_str() else { return Ok(None) };
        let is_glob = |part: &str| part.contains(['*', '?', '[', '{']);
        let (mut base, mut rest) = (PathBuf::new(), Vec::new());
        for component in path.components() {
            match component {
                Component::Normal(part) => {
                    let part = part.to_str().unwrap_or(text);
                    if rest.is_empty() && !is_glob(part) {
                        base.push(part);
                    } else {
                        rest.push(part);
                    }
                }
                other if rest.is_empty() => base.push(other),
                Component::ParentDir => rest.push(".."),
                _ => {}
            }
        }
        if rest.is_empty() {
            return Ok(None);
        }
        if base.as_os_str().is_empty() {
            base.push(".");
        }
        let glob = GlobBuilder::new(&rest.join("/"))
            .literal_separator(true)
            .build()
            .map_err(|source| Error::InvalidGlob { pattern: text.into(), source })?;
        // A brace may hold separators, so only patterns without it have a known depth.
        let bounded = !rest.iter().any(|part| part.contains("**") || part.contains(['{', '}']));
        Ok(Some(Self {
            base,
            matcher: glob.compile_matcher(),
            max_depth: if bounded { rest.len() } else { usize::MAX },
            hidden: rest.iter().any(|part| part.starts_with('.')),
        }))
    }

    fn files(&self, filter: &Filter) -> Result<Vec<PathBuf>> {
        if !self.base.is_dir() {
            return Ok(Vec::new());
        }
        let matches = |path: &Path| {
            let below = path.strip_prefix(&self.base).unwrap_or(path);
            self.matcher.is_match(below) && filter.accepts(path)
        };
        walk(&self.base, self.max_depth, self.hidden)
            .filter(|path| path.as_ref().map_or(true, |path| matches(path)))
            .collect()
    }
}
