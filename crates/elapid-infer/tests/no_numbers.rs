//! Blocks of integers whose scale is no number, in files that are sound otherwise: refused by the name of the tensor,
//! by the engine and by the model alike.

use std::path::Path;

use elapid_formats::gguf::{Plan, WeightTypes, save_gguf};
use elapid_formats::{ModelSource, hf};
use elapid_infer::{CpuEngine, Loading, Rows};
use elapid_models::{LanguageModel, MambaConfig};
use elapid_ops::blocks::Encoding;
use elapid_tensor::DType;

/// Where the 16-bit scales of a block are.
const SCALES: [(Encoding, &[usize]); 4] = [
    (Encoding::Q8_0, &[0]),
    (Encoding::Q4_0, &[0]),
    // Scale and minimum.
    (Encoding::Q4_K, &[0, 2]),
    (Encoding::Q6_K, &[208]),
];

const NAN: u16 = 0x7e00;
const INFINITY: u16 = 0x7c00;

/// The file of a model whose rows are whole blocks of any encoding.
fn save(encoding: Encoding, folder: &Path) -> std::path::PathBuf {
    let config = MambaConfig { d_state: 2, vocab_size: 5, expand: 1, ..MambaConfig::bytes(256, 1) };
    let (start, path) = (folder.join("start"), folder.join(format!("{encoding}.gguf")));
    if !start.exists() {
        let mut model = LanguageModel::new(&config, 5).unwrap();
        hf::save_model(&start, &mut model, DType::F32).unwrap();
    }
    let source = ModelSource::open(&start).unwrap();
    let types = WeightTypes { projections: Some(encoding), embedding: Some(encoding) };
    let plan = Plan::new(&source, types).unwrap();
    save_gguf(&source, &plan, Vec::new(), &path, &mut |_| {}).unwrap();
    path
}

fn load(path: &Path, check: Option<Rows>) -> Result<(), String> {
    let source = ModelSource::open(path).unwrap();
    let loading = Loading { encoding: None, threads: 2, check, progress: &mut |_, _| {} };
    CpuEngine::load(&source, loading).map(drop).map_err(|error| error.to_string())
}

#[test]
fn a_scale_that_is_no_number_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (encoding, scales) in SCALES {
        let path = save(encoding, folder.path());
        let sound = std::fs::read(&path).unwrap();
        load(&path, Some(Rows::AT_LOAD)).unwrap();
        ModelSource::open(&path).unwrap().load().unwrap();
        let names = ["backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight"];
        for (name, &scale) in
            names.into_iter().flat_map(|name| scales.iter().map(move |at| (name, at)))
        {
            std::fs::write(&path, &sound).unwrap();
            let source = ModelSource::open(&path).unwrap();
            let tensor = source.get(name).unwrap();
            assert_eq!(tensor.encoding, encoding, "{name}");
            let own = tensor.bytes.to_vec();
            drop(source);
            let start = sound.windows(own.len()).position(|window| window == own).unwrap();
            // The first block, one in the middle, the last.
            let blocks = own.len() / encoding.block_bytes();
            for (block, bits) in [(0, NAN), (blocks / 2, INFINITY), (blocks - 1, INFINITY | 0x8000)]
            {
                let mut damaged = sound.clone();
                let at = start + block * encoding.block_bytes() + scale;
                damaged[at..at + 2].copy_from_slice(&bits.to_le_bytes());
                std::fs::write(&path, &damaged).unwrap();
                let source = ModelSource::open(&path).unwrap();
                let tensor = source.get(name).unwrap();
                let (first, _) = tensor.first_not_finite().unwrap().unwrap();
                assert_eq!(first / encoding.block_len(), block, "{encoding} {name}");
                let errors = [
                    source.load().map(drop).unwrap_err().to_string(),
                    load(&path, None).unwrap_err(),
                    load(&path, Some(Rows::AT_LOAD)).unwrap_err(),
                ];
                for error in errors {
                    let words = [name, "finite"];
                    assert!(words.iter().all(|word| error.contains(word)), "{encoding}: {error}");
                }
            }
        }
    }
}
