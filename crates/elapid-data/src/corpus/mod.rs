//! The quickstart corpus: real text that is on the machine already, so that a first run needs neither
//! arguments nor a download.
//!
//! First choice are the Markdown files and doc comments of the crates that cargo has fetched, then the
//! Rust books of the toolchain, then the documentation of the system. One file is one document. What
//! machines wrote, licences, badges, link lists and anything that occurs twice are left out; the order
//! depends on the names only.

mod cargo_registry;
mod clean;
mod collect;
mod doc_comments;
mod html;
mod roff;
mod system;

use std::path::{Path, PathBuf};

use collect::Collector;

use crate::{Documents, Error, Result};

/// How much text to collect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CorpusOptions {
    /// Stop at this many bytes.
    pub max_bytes: usize,
    /// A place with less than this is passed over.
    pub min_bytes: usize,
}

impl Default for CorpusOptions {
    /// 8 MiB, and at least 256 KiB.
    fn default() -> Self {
        Self { max_bytes: 8 << 20, min_bytes: 256 << 10 }
    }
}

/// Text that was found, and where.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// The text, one document a file.
    pub documents: Documents,
    /// What kind of text it is, in words.
    pub source: &'static str,
    /// The folders that it comes from.
    pub roots: Vec<PathBuf>,
    /// Number of files that it was taken from.
    pub files: usize,
    /// Bytes of text.
    pub bytes: u64,
}

/// Collects the text of one place; `None` if the place does not exist here.
type Collect = fn(CorpusOptions) -> Option<Corpus>;

/// The text of the first place that has enough.
///
/// # Errors
/// [`Error::NoCorpus`], which asks for data, if no place has.
pub fn find(options: CorpusOptions) -> Result<Corpus> {
    let mut found = 0;
    let mut looked = Vec::new();
    let places: [(&str, Collect); 3] = [
        ("the sources of fetched crates", |options| {
            Some(from_crates(&cargo_registry::home()?.join("registry").join("src"), options))
        }),
        ("the books of the Rust toolchain", |options| {
            Some(from_rust_books(&system::rust_books()?, options))
        }),
        ("the documentation of the system", |options| {
            Some(from_system(&system::folders(), options))
        }),
    ];
    for (place, collect) in places {
        looked.push(place);
        if let Some(corpus) = collect(options) {
            if corpus.bytes >= options.min_bytes as u64 && corpus.bytes > 0 {
                return Ok(corpus);
            }
            found = found.max(corpus.bytes);
        }
    }
    Err(Error::NoCorpus { looked: looked.join(", "), found })
}

/// Markdown and doc comments of the crates under a `registry/src` folder.
pub fn from_crates(root: &Path, options: CorpusOptions) -> Corpus {
    let mut collector = Collector::new(options.max_bytes);
    cargo_registry::collect(root, &mut collector);
    collector.finish("Markdown and doc comments of fetched crates", vec![root.into()])
}

/// The HTML books under a toolchain's `share/doc/rust/html`.
pub fn from_rust_books(root: &Path, options: CorpusOptions) -> Corpus {
    let mut collector = Collector::new(options.max_bytes);
    system::collect_books(root, &mut collector);
    collector.finish("books of the Rust toolchain", vec![root.into()])
}

/// Texts, Markdown, HTML and manual pages under the given folders, compressed or not.
pub fn from_system(roots: &[PathBuf], options: CorpusOptions) -> Corpus {
    let mut collector = Collector::new(options.max_bytes);
    for root in roots {
        system::collect(root, &mut collector);
    }
    collector.finish("documentation of the system", roots.to_vec())
}
