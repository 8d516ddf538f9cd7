//! The quickstart corpus, from folders made for it.

use std::fs;
use std::io::Write;
use std::path::Path;

use elapid_data::corpus::{self, Corpus, CorpusOptions};

/// Prose of about `words` words that no other `seed` shares a sentence with.
fn prose(seed: u64, words: usize) -> String {
    let mut rng = elapid_tensor::rng::Rng::new(seed, 0);
    let mut text = String::new();
    for word in 0..words {
        for _ in 0..2 + rng.below(7) {
            text.push((b'a' + rng.below(26) as u8) as char);
        }
        text.push_str(if word % 40 == 39 { ".\n\n" } else { " " });
    }
    text
}

fn write(root: &Path, name: &str, text: impl AsRef<[u8]>) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn all(corpus: &Corpus) -> String {
    corpus.documents.iter().map(|text| String::from_utf8(text.to_vec()).unwrap()).collect()
}

#[test]
fn crates_give_markdown_and_doc_comments_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("index-1/{name}");
    let doc = |seed| prose(seed, 120).lines().map(|l| format!("    /// {l}\n")).collect::<String>();
    write(root.path(), &at("a-1.0.0/README.md"), prose(1, 200));
    write(root.path(), &at("a-1.1.0/README.md"), prose(1, 200));
    write(root.path(), &at("a-1.0.0/src/lib.rs"), doc(2) + "    fn secret_code() {}\n");
    write(root.path(), &at("b-2.0.0/LICENSE.md"), prose(3, 200));
    write(root.path(), &at("b-2.0.0/tests/data.md"), prose(4, 200));
    write(root.path(), &at("b-2.0.0/src/table.rs"), format!("// @generated\n{}", doc(5)));
    write(root.path(), &at("b-2.0.0/notes.txt"), prose(6, 200));
    write(root.path(), &at("b-2.0.0/short.md"), "Too short.");
    write(root.path(), &at("b-2.0.0/binary.md"), [prose(7, 99).as_bytes(), b"\0\x01"].concat());
    write(root.path(), &at("b-2.0.0/latin.md"), [prose(8, 99).as_bytes(), b"\xff\xfe"].concat());
    write(root.path(), &at("b-2.0.0/unix.md"), prose(9, 100).replace('\n', "\r\n"));
    let found = corpus::from_crates(root.path(), CorpusOptions::default());
    assert_eq!(found.files, 3);
    assert_eq!(found.documents.len(), 3);
    assert_eq!(found.bytes, found.documents.bytes());
    let text = all(&found);
    for (seed, words, wanted) in [(1, 200, 1), (2, 120, 1), (3, 200, 0), (4, 200, 0), (5, 120, 0)] {
        let piece = &prose(seed, words)[50..90];
        assert_eq!(text.matches(piece).count(), wanted, "{seed}");
    }
    assert!(text.contains(&prose(9, 100)[50..90]) && !text.contains('\r'));
    assert!(!text.contains("secret_code"));

    let again = corpus::from_crates(root.path(), CorpusOptions::default());
    assert_eq!(all(&again), text);
}

#[test]
fn the_cap_holds() {
    let root = tempfile::tempdir().unwrap();
    for seed in 0..30 {
        write(root.path(), &format!("i/c-{seed}/README.md"), prose(seed, 400));
    }
    let options = CorpusOptions { max_bytes: 20_000, min_bytes: 1 };
    let corpus = corpus::from_crates(root.path(), options);
    assert!((17_000..=20_000).contains(&corpus.bytes), "{}", corpus.bytes);
}

#[test]
fn system_documentation_compressed_or_not() {
    let root = tempfile::tempdir().unwrap();
    let gzip = |text: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    write(root.path(), "a/README", prose(1, 100));
    write(root.path(), "a/NEWS.gz", gzip(&prose(2, 100)));
    write(root.path(), "man1/x.1.gz", gzip(&format!(".SH NAME\n{}", prose(3, 100))));
    write(root.path(), "a/index.html", format!("<p>{}</p>", prose(4, 100)));
    write(root.path(), "a/copyright", prose(5, 100));
    write(root.path(), "a/changelog.Debian.gz", gzip(&prose(6, 100)));
    write(root.path(), "a/x.so.1", b"\x7fELF\0\0");
    let corpus = corpus::from_system(&[root.path().into()], CorpusOptions::default());
    assert_eq!(corpus.files, 4);
    let text = all(&corpus);
    for seed in 1..5 {
        assert!(text.contains(&prose(seed, 100)[20..40]), "{seed}");
    }
    let missing = corpus::from_system(&[root.path().join("none")], CorpusOptions::default());
    assert_eq!((missing.files, missing.bytes), (0, 0));
}

#[test]
fn books_without_api_pages() {
    let root = tempfile::tempdir().unwrap();
    let page = |seed| format!("<html><head>x</head><body><p>{}</p></body></html>", prose(seed, 99));
    write(root.path(), "book/ch01.html", page(1));
    write(root.path(), "book/print.html", page(2));
    write(root.path(), "std/vec/index.html", page(3));
    let corpus = corpus::from_rust_books(root.path(), CorpusOptions::default());
    assert_eq!(corpus.files, 1);
    assert!(all(&corpus).contains(&prose(1, 99)[20..40]));
}

#[test]
fn finding_nothing_asks_for_data() {
    let options = CorpusOptions { max_bytes: 1 << 20, min_bytes: usize::MAX };
    let error = corpus::find(options).unwrap_err();
    assert!(error.to_string().contains("--data PATH"), "{error}");
}
