//! The corpus of the fuzz targets through the functions that they call; and, when asked for, more bytes made from it.

#[path = "../../../fuzz/entries.rs"]
mod entries;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use elapid_tensor::rng::draw;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn every_file_of_the_corpus() {
    for (target, run) in entries::ALL {
        let files = corpus(target);
        assert!(files.len() >= 3, "{target}: {} files", files.len());
        for (path, bytes) in files {
            let result = std::panic::catch_unwind(|| run(&bytes));
            assert!(result.is_ok(), "{} brings {target} down", path.display());
        }
    }
}

/// Some seconds of changed corpus files a target (FUZZ_SECONDS; FUZZ_TARGET for one alone), without a fuzzer: bytes
/// changed, cut out, put in, and spliced from other files.
#[test]
fn changed_files_of_the_corpus() {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs_f64(seconds.unwrap_or(0.3));
    let only = std::env::var("FUZZ_TARGET").ok();
    for (target, run) in entries::ALL {
        if only.as_ref().is_some_and(|only| only != target) {
            continue;
        }
        let files: Vec<Vec<u8>> = corpus(target).into_iter().map(|(_, bytes)| bytes).collect();
        let start = Instant::now();
        let mut number = 0;
        while start.elapsed() < time {
            let bytes = changed(&files, number);
            let result = std::panic::catch_unwind(|| run(&bytes));
            if result.is_err() {
                let path = std::env::temp_dir().join(format!("{target}-{number}"));
                fs::write(&path, &bytes).unwrap();
                panic!("{} brings {target} down", path.display());
            }
            number += 1;
        }
        eprintln!("{target}: {number} files in {:.1} s", start.elapsed().as_secs_f64());
    }
}

/// File `number` that is made from the corpus: the same on every machine.
fn changed(files: &[Vec<u8>], number: u64) -> Vec<u8> {
    let mut step = 0;
    let mut below = |limit: usize| {
        step += 1;
        draw(7, 1, number, step)[0] as usize % limit.max(1)
    };
    let mut bytes = files[below(files.len())].clone();
    for _ in 0..=below(6) {
        let at = below(bytes.len() + 1);
        let end = (at + 1 + below(16)).min(bytes.len());
        match below(6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let other = &files[below(files.len())];
                let from = below(other.len());
                let part = other[from..(from + 1 + below(64)).min(other.len())].to_vec();
                bytes.splice(at..at, part);
            }
            3 => bytes[at..end].iter_mut().for_each(|byte| *byte = [0, 0xff, 0x7f, 0x80][at % 4]),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = below(256) as u8;
                }
            }
        }
    }
    bytes
}
