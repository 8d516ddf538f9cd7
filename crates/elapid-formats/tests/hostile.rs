//! Files made to harm: each one is refused with an error that names the thing, without a panic, and without
//! memory beyond a small multiple of the file's own size. Every attack is built here, by hand.

mod attacks;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use attacks::Attack;
use elapid_formats::gguf::GgufFile;
use elapid_formats::{Bytes, Error, StateFile, TensorFile, Tokenizer, Weights, load_model};

/// Counts what is allocated, so that the tests can bound it.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn took(bytes: usize) {
    PEAK.fetch_max(HELD.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged; only numbers are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Beside a multiple of the file: error texts, paths, the worker threads of the first conversion.
const FREE: usize = 1 << 20;
/// The largest multiple of the file's size that may be held.
const MULTIPLE: usize = 16;

fn bounded<R>(what: &str, size: usize, work: impl FnOnce() -> R) -> R {
    bounded_by(MULTIPLE, what, size, work)
}

fn bounded_by<R>(multiple: usize, what: &str, size: usize, work: impl FnOnce() -> R) -> R {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    let taken = PEAK.load(Relaxed) - before;
    assert!(taken <= FREE + multiple * size, "{what}: {taken} bytes for a file of {size}");
    result
}

fn refused(path: &Path, attack: &Attack) {
    let size = attack.bytes.len();
    let result = bounded(attack.what, size, || {
        Weights::open(path).and_then(|weights| weights.read_config())
    });
    let error = result.err().unwrap_or_else(|| panic!("{}: accepted", attack.what)).to_string();
    for word in attack.words {
        assert!(error.contains(word), "{}: {word:?} is not in: {error}", attack.what);
    }
    assert!(
        error.contains(path.file_name().unwrap().to_str().unwrap()),
        "{}: {error}",
        attack.what
    );
    assert!(error.len() < 2000, "{}: an error of {} bytes", attack.what, error.len());
}

/// Everything that a file of weights holds.
fn look_at(path: &Path, bytes: Bytes) -> Result<(), Error> {
    if bytes.starts_with(b"GGUF") {
        let file = GgufFile::from_bytes(path, bytes.clone())?;
        file.vocabulary()?.tokenizer(path)?;
    }
    for tensor in Weights::of_file(path, bytes)?.tensors.values() {
        tensor.first_not_finite()?;
    }
    Ok(())
}

/// One test, as the count of the memory is that of the whole program.
#[test]
fn every_attack_is_refused_within_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let mut count = 0;
    for attack in attacks::all() {
        let path = folder.path().join(attack.file);
        fs::write(&path, &attack.bytes).unwrap();
        refused(&path, &attack);
        count += 1;
    }
    assert!(count >= 60, "{count}");

    // Every prefix of sound files, and every byte of them changed: refused or read, never a panic or much memory.
    for (name, bytes) in attacks::sound() {
        let step = (bytes.len() / 400).max(1);
        for at in (0..bytes.len()).step_by(step) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            for damaged in [bytes[..at].to_vec(), changed] {
                let size = damaged.len();
                let result = bounded(name, size, || look_at(Path::new(name), damaged.into()));
                if let Err(error) = result {
                    assert!(error.to_string().starts_with(name), "{error}");
                }
            }
        }
    }

    // What is refused or read, but small in memory either way.
    for (what, bytes) in attacks::gguf::wants() {
        let size = bytes.len();
        if let Err(error) = bounded(what, size, || look_at(Path::new("x.gguf"), bytes.into())) {
            let error = error.to_string();
            assert!(error.starts_with("x.gguf") && error.len() < 2000, "{what}: {error}");
        }
    }
    let one = || Ok(Bytes::from(b"\x02\0\0\0\0\0\0\0{}".to_vec()));
    for (what, text) in attacks::text::indexes() {
        for name in ["model.safetensors.index.json", "pytorch_model.bin.index.json"] {
            let (path, mut opened) = (Path::new(name), 0);
            let result = bounded(what, text.len(), || {
                Weights::of_index(path, text.as_bytes(), &mut |_| {
                    opened += 1;
                    one()
                })
            });
            let error = result.err().unwrap_or_else(|| panic!("{what}: accepted")).to_string();
            assert!(error.starts_with(name) && opened <= 1, "{what}: {opened}, {error}");
        }
    }
    for (what, bytes) in attacks::text::states() {
        let size = bytes.len();
        let result = bounded(what, size, || {
            StateFile::of_file(TensorFile::of_bytes(Path::new("x.state"), bytes.into())?)
        });
        let error = result.err().unwrap_or_else(|| panic!("{what}: accepted")).to_string();
        assert!(error.starts_with("x.state") && error.len() < 2000, "{what}: {error}");
    }
    for (what, text) in attacks::text::tokenizers() {
        let path = Path::new("tokenizer.json");
        // The tree of a list of pieces is the library's, and bounded by itself.
        let multiple = if what.ends_with("pieces") { 2 * MULTIPLE } else { MULTIPLE };
        let result =
            bounded_by(multiple, &what, text.len(), || Tokenizer::from_json(path, text.as_bytes()));
        if let Err(error) = result {
            let error = error.to_string();
            assert!(error.starts_with("tokenizer.json") && error.len() < 2000, "{what}: {error}");
        }
    }

    // Configurations and weights that do not fit, and weights that are no numbers, in every format.
    for model in attacks::models(folder.path()) {
        let size: u64 = fs::read_dir(&model.folder)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        let result = bounded(model.what, size as usize, || load_model(&model.folder).map(drop));
        let error = result.err().unwrap_or_else(|| panic!("{}: accepted", model.what)).to_string();
        for word in model.words {
            assert!(error.contains(word), "{}: {word:?} is not in: {error}", model.what);
        }
    }
}
