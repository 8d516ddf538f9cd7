//! Documentation that is installed beside programs: the books of the Rust toolchain, and the texts and
//! manual pages of the system.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::collect::{Collector, read_text, shuffled_files};
use super::{html, roff};

/// `share/doc/rust/html` of the toolchain, if it is there.
pub(super) fn rust_books() -> Option<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().ok()?;
    let sysroot = String::from_utf8(output.stdout).ok()?;
    let books = Path::new(sysroot.trim()).join("share").join("doc").join("rust").join("html");
    books.is_dir().then_some(books)
}

/// The folders of the system's documentation that exist here.
pub(super) fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = [
        "/usr/share/doc",
        "/usr/share/man",
        "/usr/local/share/doc",
        "/usr/local/share/man",
        "/opt/homebrew/share/doc",
        "/opt/homebrew/share/man",
        "/usr/share/common-licenses",
    ]
    .map(PathBuf::from)
    .into();
    if let Some(programs) = std::env::var_os("ProgramFiles") {
        folders.push(Path::new(&programs).join("Git").join("mingw64").join("share").join("doc"));
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// API pages, which are lists of signatures, and pages that repeat others.
const NOT_BOOKS: [&str; 7] = ["std", "core", "alloc", "proc_macro", "test", "src", "static.files"];

pub(super) fn collect_books(root: &Path, collector: &mut Collector) {
    let wanted = |path: &Path| {
        let first =
            path.iter().next().is_some_and(|first| NOT_BOOKS.iter().any(|&not| first == not));
        let repeats = path.file_stem().is_some_and(|stem| stem == "print" || stem == "toc");
        !first && !repeats && path.extension().is_some_and(|extension| extension == "html")
    };
    for path in shuffled_files(root, wanted) {
        if collector.is_full() {
            return;
        }
        if let Some(page) = read_text(&path) {
            collector.offer(&[html::text(&page)]);
        }
    }
}

pub(super) fn collect(root: &Path, collector: &mut Collector) {
    for path in shuffled_files(root, |path| Kind::of(path).is_some()) {
        if collector.is_full() {
            return;
        }
        let kind = Kind::of(path.strip_prefix(root).unwrap_or(&path));
        let (Some(kind), Some(text)) = (kind, read_text(&path)) else { continue };
        collector.offer(&[match kind {
            Kind::Plain => text,
            Kind::Html => html::text(&text),
            Kind::Manual => roff::text(&text),
        }]);
    }
}

enum Kind {
    Plain,
    Html,
    Manual,
}

impl Kind {
    /// By the name without `.gz`; `None` for what is not text for readers. `path` is below its root.
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        let start = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
        // Change logs of distributions are dates and addresses; copyright files are licences.
        if start(&["changelog", "copyright", "license", "copying"]) {
            return None;
        }
        match name.rsplit_once('.') {
            Some((_, "md" | "txt" | "rst")) => Some(Self::Plain),
            Some((_, "html" | "htm")) => Some(Self::Html),
            Some((_, section)) if is_manual_section(section) => Some(Self::Manual),
            // Names without an extension: the usual texts, and a folder of licences as a last resort.
            _ if start(&["readme", "news", "faq", "howto", "todo", "authors", "thanks"]) => {
                Some(Self::Plain)
            }
            _ if path.components().count() == 1 && !name.contains('.') => Some(Self::Plain),
            _ => start(&["gpl-", "lgpl-", "gfdl-", "apache-", "mpl-"]).then_some(Self::Plain),
        }
    }
}

/// `1` to `8`, perhaps with letters, as in `3p`.
fn is_manual_section(extension: &str) -> bool {
    let mut chars = extension.chars();
    chars.next().is_some_and(|c| ('1'..='8').contains(&c))
        && chars.all(|c| c.is_ascii_lowercase())
        && extension.len() <= 5
}
