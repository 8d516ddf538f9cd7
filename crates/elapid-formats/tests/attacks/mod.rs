//! The attacks, format by format.

mod archive;
pub mod gguf;
mod header;
mod model;
mod pickle;
pub mod text;

pub use model::models;

/// A file that must be refused.
pub struct Attack {
    pub what: &'static str,
    /// Its name; the content decides how it is read.
    pub file: &'static str,
    pub bytes: Vec<u8>,
    /// What the error says.
    pub words: &'static [&'static str],
}

/// All files that must be refused.
pub fn all() -> Vec<Attack> {
    [header::attacks(), pickle::attacks(), archive::attacks()].into_iter().flatten().collect()
}

/// Sound files, to be damaged.
pub fn sound() -> Vec<(&'static str, Vec<u8>)> {
    let fixture = |name: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        std::fs::read(folder.join(name)).unwrap()
    };
    let header = br#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    vec![
        ("sound.safetensors", header::file(header, &[1; 16])),
        ("zip_2.pt", fixture("pytorch/zip_2.pt")),
        ("zip_5.pt", fixture("pytorch/zip_5.pt")),
        ("legacy_2.pt", fixture("pytorch/legacy_2.pt")),
        ("legacy_4.pt", fixture("pytorch/legacy_4.pt")),
        ("arrays.npz", fixture("numpy/arrays.npz")),
        ("compressed.npz", fixture("numpy/compressed.npz")),
        ("q4_0.gguf", fixture("../../../../fuzz/corpus/gguf/q4_0.gguf")),
        ("f16.gguf", fixture("../../../../fuzz/corpus/gguf/f16_vocabulary.gguf")),
        ("q6_k.gguf", fixture("../../../../fuzz/corpus/gguf/q6_k_vocabulary.gguf")),
    ]
}
