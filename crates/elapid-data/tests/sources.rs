//! Sources on a real file system: every option, and everything that can be wrong with a path.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use elapid_data::{Documents, Error, Result, SourceOptions};
use tempfile::TempDir;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// A fresh folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    root
}

fn load(paths: &[PathBuf]) -> Result<Documents> {
    Documents::load(&SourceOptions::new(paths))
}

fn texts(documents: &Documents) -> Vec<String> {
    documents.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
}

fn tree() -> TempDir {
    folder(&[
        ("b.txt", b"B"),
        ("a/z.txt", b"Z"),
        ("a/deep/er/x.md", b"X"),
        ("a/empty.txt", b""),
        ("c.txt.gz", &gzip(b"C")),
        ("d.TXT.zst", &zst(b"D")),
        (".hidden/h.txt", b"H"),
        (".h.txt", b"H"),
    ])
}

#[test]
fn a_folder_is_walked_in_the_order_of_names() {
    let root = tree();
    let documents = load(&[root.path().into()]).unwrap();
    assert_eq!(texts(&documents), ["X", "Z", "B", "C", "D"]);
    assert_eq!((documents.files(), documents.bytes()), (6, 5));
}

#[test]
fn extensions_filter_folders_and_globs_but_not_named_files() {
    let root = tree();
    let load = |path: PathBuf, extensions: &[&str]| {
        let extensions = extensions.iter().map(ToString::to_string).collect();
        Documents::load(&SourceOptions { extensions, ..SourceOptions::new([path]) })
    };
    assert_eq!(texts(&load(root.path().into(), &["txt"]).unwrap()), ["Z", "B", "C", "D"]);
    assert_eq!(texts(&load(root.path().into(), &[".MD"]).unwrap()), ["X"]);
    assert_eq!(texts(&load(root.path().into(), &["txt.gz", "md"]).unwrap()), ["X", "C"]);
    assert_eq!(texts(&load(root.path().join("**/*"), &["md"]).unwrap()), ["X"]);
    assert_eq!(texts(&load(root.path().join("b.txt"), &["md"]).unwrap()), ["B"]);
    let error = load(root.path().into(), &["rs", "py"]).unwrap_err();
    assert!(matches!(error, Error::EmptyFolder { .. }));
    assert!(error.to_string().contains("rs, py"), "{error}");
    let error = load(root.path().join("*.txt"), &["rs"]).unwrap_err();
    assert!(matches!(error, Error::NoMatch { .. }), "{error}");
}

#[test]
fn globs() {
    let root = tree();
    let glob = |pattern: &str| texts(&load(&[root.path().join(pattern)]).unwrap());
    assert_eq!(glob("*.txt"), ["B"]);
    assert_eq!(glob("*"), ["B", "C", "D"]);
    assert_eq!(glob("**/*.txt"), ["Z", "B"]);
    assert_eq!(glob("a/**/*.md"), ["X"]);
    assert_eq!(glob("{b,c}.txt*"), ["B", "C"]);
    assert_eq!(glob("{b.txt,a/deep/er/x.md}"), ["X", "B"]);
    assert_eq!(glob("[ab].txt"), ["B"]);
    assert_eq!(glob("?/z.txt"), ["Z"]);
    assert_eq!(glob(".h*"), ["H"]);
    let missing = load(&[root.path().join("*.nothing")]).unwrap_err();
    assert!(matches!(missing, Error::NoMatch { .. }) && missing.to_string().contains("*.nothing"));
    assert!(matches!(load(&[root.path().join("no/such/*")]), Err(Error::NoMatch { .. })));
    assert!(matches!(load(&[root.path().join("a[b")]), Err(Error::InvalidGlob { .. })));
}

#[test]
fn several_paths_in_their_order_each_file_once() {
    let root = tree();
    let path = |name: &str| root.path().join(name);
    let documents = load(&[path("c.txt.gz"), path("*.txt"), path("a"), path("b.txt")]).unwrap();
    assert_eq!(texts(&documents), ["C", "B", "X", "Z"]);
}

#[test]
fn a_name_with_glob_characters_is_a_name_if_it_exists() {
    let root = folder(&[("a[1].txt", b"literal"), ("a1.txt", b"other")]);
    assert_eq!(texts(&load(&[root.path().join("a[1].txt")]).unwrap()), ["literal"]);
}

#[test]
fn separators_end_documents() {
    let root = folder(&[("x", b"one\0two\0\0three\0"), ("y", b"\0"), ("z", b"four")]);
    let load = |separator: &[u8]| {
        let separator = Some(separator.to_vec());
        Documents::load(&SourceOptions { separator, ..SourceOptions::new([root.path()]) })
    };
    assert_eq!(texts(&load(b"\0").unwrap()), ["one", "two", "three", "four"]);
    assert_eq!(texts(&load(b"\0t").unwrap()), ["one", "wo\0", "hree\0", "\0", "four"]);
    assert!(matches!(load(b""), Err(Error::Option { option: "separator", .. })));
}

#[test]
fn compressed_files_of_several_members_and_long_windows() {
    let long: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 7919) >> 9) as u8).collect();
    let mut two = gzip(b"first ");
    two.extend(gzip(b"second"));
    let mut frames = zst(b"first ");
    frames.extend(zst(b"second"));
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.long_distance_matching(true).unwrap();
    encoder.window_log(28).unwrap();
    encoder.write_all(&long).unwrap();
    let wide = encoder.finish().unwrap();
    let root = folder(&[("a.gz", &two), ("b.zst", &frames), ("c.zstd", &wide)]);
    let documents = load(&[root.path().into()]).unwrap();
    assert_eq!(documents.get(0), b"first second");
    assert_eq!(documents.get(1), b"first second");
    assert!(documents.get(2) == long);
}

#[test]
fn broken_compressed_files_are_named() {
    let text: Vec<u8> = (0..50_000u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
    for (name, good) in [("a.gz", gzip(&text)), ("a.zst", zst(&text))] {
        let flipped = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 0xff;
            bytes
        };
        let hostile = [
            b"this was never compressed".to_vec(),
            good[..good.len() / 2].to_vec(),
            good[..3].to_vec(),
            flipped(0),
            [good.clone(), b"trailing words".to_vec()].concat(),
        ];
        for (case, bytes) in hostile.into_iter().enumerate() {
            let root = folder(&[(name, &bytes)]);
            let error = load(&[root.path().join(name)]).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{name} case {case}: {error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
    // gzip carries a checksum, so a flipped byte anywhere in the data is seen.
    let good = gzip(&text);
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let root = folder(&[("a.gz", &flipped)]);
    assert!(matches!(load(&[root.path().into()]), Err(Error::Corrupt { .. })));
}

#[test]
fn damaged_bytes_never_panic() {
    let text = b"some text that is compressed, some text that is compressed".repeat(20);
    for (name, good) in [("a.gz", gzip(&text)), ("a.zst", zst(&text))] {
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            let root = folder(&[(name, &bytes)]);
            let _ = load(&[root.path().into()]);
        }
    }
}

#[test]
fn what_is_missing_is_named() {
    assert!(matches!(load(&[]), Err(Error::NoInput)));
    let root = folder(&[("f", b"x")]);
    for name in ["nothing.txt", "no/such/folder"] {
        let error = load(&[root.path().join(name)]).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error:?}");
        assert!(error.to_string().contains(name.rsplit('/').next().unwrap()), "{error}");
    }
    assert!(load(&[root.path().join("f/below-a-file")]).is_err());
    fs::create_dir(root.path().join("empty")).unwrap();
    assert!(matches!(load(&[root.path().join("empty")]), Err(Error::EmptyFolder { .. })));
}

#[test]
fn empty_data_is_refused() {
    let root = folder(&[("a", b""), ("b", b""), ("c.gz", &gzip(b""))]);
    match load(&[root.path().into()]) {
        Err(Error::Empty { files: 3, path }) => assert!(path.ends_with("a")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn any_bytes_are_data() {
    let bytes: Vec<u8> = (0..=255).rev().collect();
    let root = folder(&[("latin", &bytes)]);
    assert_eq!(load(&[root.path().into()]).unwrap().get(0), bytes);
}

#[test]
fn the_books_are_cut_at_their_separator() {
    let Some(fixtures) = std::env::var_os("ELAPID_FIXTURES") else {
        println!("skipped: ELAPID_FIXTURES is not set");
        return;
    };
    let books = Path::new(&fixtures).join("data/text/books");
    for (name, count, bytes) in [("val.txt.zst", 5, 2_786_677), ("train.txt.zst", 148, 103_394_926)]
    {
        let documents = Documents::load(&SourceOptions {
            separator: Some(b"\0".to_vec()),
            ..SourceOptions::new([books.join(name)])
        })
        .unwrap();
        assert_eq!((documents.len(), documents.bytes()), (count, bytes - count as u64));
    }
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn is_root(probe: &Path) -> bool {
        fs::read(probe).is_ok()
    }

    #[test]
    fn unreadable_files_and_folders_are_named() {
        let root = folder(&[("closed.txt", b"x"), ("sub/x.txt", b"x")]);
        let closed = root.path().join("closed.txt");
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        if is_root(&closed) {
            println!("skipped: this user may read everything");
            return;
        }
        for path in [closed, root.path().into()] {
            let error = load(&[path]).unwrap_err();
            assert!(matches!(error, Error::Unreadable { .. }), "{error}");
            assert!(error.to_string().contains("closed.txt"), "{error}");
        }
        let sub = root.path().join("sub");
        fs::set_permissions(&sub, fs::Permissions::from_mode(0o000)).unwrap();
        let error = load(std::slice::from_ref(&sub)).unwrap_err();
        fs::set_permissions(&sub, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(matches!(error, Error::Unreadable { .. }), "{error}");
    }

    #[test]
    fn links_are_followed_and_loops_are_errors() {
        let root = folder(&[("data/x.txt", b"linked")]);
        let other = tempfile::tempdir().unwrap();
        symlink(root.path().join("data"), other.path().join("link")).unwrap();
        assert_eq!(texts(&load(&[other.path().into()]).unwrap()), ["linked"]);
        symlink(other.path(), other.path().join("loop")).unwrap();
        assert!(matches!(load(&[other.path().into()]), Err(Error::Unreadable { .. })));
        let dangling = tempfile::tempdir().unwrap();
        symlink("/nowhere/at/all", dangling.path().join("x")).unwrap();
        let error = load(&[dangling.path().into()]).unwrap_err();
        assert!(matches!(error, Error::Unreadable { .. }), "{error}");
    }

    #[test]
    fn devices_are_refused() {
        assert!(matches!(load(&["/dev/zero".into()]), Err(Error::NotAFile { .. })));
    }

    #[test]
    fn files_without_a_length_are_read() {
        if Path::new("/proc/self/status").exists() {
            let documents = load(&["/proc/self/status".into()]).unwrap();
            assert!(documents.get(0).starts_with(b"Name:"));
        }
    }
}
