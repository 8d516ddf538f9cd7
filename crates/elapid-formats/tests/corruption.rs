//! Hostile and damaged files: every loader gives an error or the very same result, and never panics.

mod sample;

use std::fs;
use std::path::Path;

use elapid_formats::checkpoint::{Checkpoint, Contents};
use elapid_formats::{Fingerprint, StateFile, TensorFile, hf, load_state, save_state};
use elapid_tensor::DType;
use proptest::prelude::*;
use sample::{bits, model, optimizer, parameters, state};
use serde_json::json;

/// What happens to a file.
#[derive(Debug, Clone)]
enum Damage {
    Truncate(prop::sample::Index),
    Flip(prop::sample::Index, u8),
    FlipHeader(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Replace(Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        1 => at().prop_map(Damage::Truncate),
        2 => (at(), 1..=255u8).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        3 => (at(), 1..=255u8).prop_map(|(at, bits)| Damage::FlipHeader(at, bits)),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, b)| Damage::Insert(at, b)),
        1 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Damage::Replace),
    ]
}

impl Damage {
    /// The damaged content; `header` bytes at the beginning are its most delicate part.
    fn apply(&self, bytes: &[u8], header: usize) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        let length = bytes.len();
        match self {
            Self::Truncate(at) => bytes.truncate(at.index(length)),
            Self::Flip(at, bits) => bytes[at.index(length)] ^= bits,
            Self::FlipHeader(at, bits) => bytes[at.index(header)] ^= bits,
            Self::Insert(at, new) => {
                let at = at.index(length);
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Replace(new) => bytes.clone_from(new),
        }
        bytes
    }
}

/// Length of a tensor file's header.
fn header_of(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// A tensor file of arbitrary header and data, with a length that is right or not.
fn tensor_file(header: &str, data: &[u8], off: u64) -> Vec<u8> {
    let mut bytes = (header.len() as u64).wrapping_add(off).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn read_everything(path: &Path) {
    if let Ok(file) = TensorFile::open(path) {
        for name in file.names() {
            let _ = (file.tensor(&name), file.bytes(&name), file.dtype_name(&name));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn damaged_state_files(damage in damage()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let mut model = model();
        let fingerprint = Fingerprint::of_model(&mut model).unwrap();
        let state = state(&model, 2);
        save_state(&path, &state, &fingerprint).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, damage.apply(&bytes, header_of(&bytes))).unwrap();
        match load_state(&path, &model, &fingerprint) {
            Ok(loaded) => {
                prop_assert_eq!(bits(&loaded), bits(&state));
                prop_assert_eq!(loaded.positions, state.positions);
            }
            Err(error) => prop_assert!(error.to_string().contains(path.to_str().unwrap())),
        }
    }

    #[test]
    fn damaged_checkpoints(damage in damage(), which in 0..5usize) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("step-00000001");
        let mut model = model();
        let tensors = optimizer(&mut model);
        let meta = json!({ "seed": 1, "best": 0.3 });
        let contents = Contents {
            step: 1,
            model: &mut model,
            tensors: &tensors,
            state: None,
            meta: meta.clone(),
            config_toml: "a = 1\n",
        };
        contents.save(&path).unwrap();
        let names =
            ["config.json", "config.toml", "model.safetensors", "optimizer.safetensors", "training.json"];
        let file = path.join(names[which]);
        let bytes = fs::read(&file).unwrap();
        let header = if names[which].ends_with(".safetensors") { header_of(&bytes) } else { bytes.len() };
        fs::write(&file, damage.apply(&bytes, header)).unwrap();
        match Checkpoint::open(&path) {
            Ok(checkpoint) => {
                prop_assert_eq!((checkpoint.step(), checkpoint.meta()), (1, &meta));
                prop_assert_eq!(checkpoint.config_toml(), "a = 1\n");
                prop_assert_eq!(
                    parameters(&mut checkpoint.load_model().unwrap()),
                    parameters(&mut model)
                );
            }
            Err(error) => prop_assert!(error.to_string().contains(file.to_str().unwrap()), "{}", error),
        }
    }

    #[test]
    fn damaged_model_folders(damage in damage(), config in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        hf::save_model(folder.path(), &mut model(), DType::F32).unwrap();
        let path = folder.path().join(if config { hf::CONFIG_FILE } else { hf::WEIGHTS_FILE });
        let bytes = fs::read(&path).unwrap();
        let header = if config { bytes.len() } else { header_of(&bytes) };
        fs::write(&path, damage.apply(&bytes, header)).unwrap();
        // Model folders carry no checksum: a flipped weight loads. Nothing may panic, and a model that
        // loads has the shapes of its configuration.
        match hf::load_model(folder.path()) {
            Ok(mut loaded) => {
                let count = parameters(&mut loaded).iter().map(|(_, _, bits)| bits.len()).sum::<usize>();
                prop_assert_eq!(count, loaded.config().parameter_count());
            }
            Err(error) => prop_assert!(error.to_string().contains(folder.path().to_str().unwrap())),
        }
    }

    #[test]
    fn random_bytes_in_every_loader(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors", "training.json", "best"] {
            fs::write(folder.path().join(name), &bytes).unwrap();
        }
        read_everything(&folder.path().join("model.safetensors"));
        prop_assert!(StateFile::read(&folder.path().join("model.safetensors")).is_err());
        prop_assert!(hf::load_model(folder.path()).is_err());
        prop_assert!(hf::load_config(folder.path()).is_err());
        prop_assert!(Checkpoint::open(folder.path()).is_err());
    }

    #[test]
    fn hostile_headers(
        shapes in prop::collection::vec((prop::collection::vec(any::<u64>(), 0..8), any::<u64>(), any::<u64>()), 0..4),
        off in prop_oneof![3 => Just(0u64), 1 => any::<u64>()],
        data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut header = serde_json::Map::new();
        for (i, (shape, start, end)) in shapes.iter().enumerate() {
            header.insert(
                format!("layers.{i}.ssm_state"),
                json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }),
            );
        }
        fs::write(&path, tensor_file(&json!(header).to_string(), &data, off)).unwrap();
        read_everything(&path);
        prop_assert!(StateFile::read(&path).is_err());
    }
}

#[test]
fn hand_made_headers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let huge = usize::MAX / 8;
    let cases = [
        // Empty extents beside extents whose product overflows.
        r#"{"a":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}"#
            .to_owned(),
        r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#.to_owned(),
        r#"{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#.to_owned(),
        // Offsets that wrap around the end of the address space.
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}},"b":{{"dtype":"U8","shape":[{huge}],"data_offsets":[{huge},{}]}}}}"#,
            2 * huge
        ),
        "[".repeat(100_000),
        format!("{{\"a\":{}", "[".repeat(100_000)),
        r#"{"__metadata__":{"format":3}}"#.to_owned(),
    ];
    for header in &cases {
        for data in [&[][..], &[0], &[0; 8]] {
            fs::write(&path, tensor_file(header, data, 0)).unwrap();
            read_everything(&path);
            assert!(StateFile::read(&path).is_err());
        }
    }
    for length in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 40, 100_000_001] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        fs::write(&path, bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(&length.to_string()), "{error}");
    }
    fs::write(&path, b"").unwrap();
    assert!(TensorFile::open(&path).unwrap_err().to_string().contains("found 0"));
}

/// Every single byte of a state file, changed in one bit.
#[test]
fn no_bit_of_a_state_file_goes_unnoticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let model = model();
    let fingerprint = Fingerprint::of_config(model.config());
    let state = state(&model, 1);
    save_state(&path, &state, &fingerprint).unwrap();
    let bytes = fs::read(&path).unwrap();
    let mut noticed = 0;
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&path, flipped).unwrap();
        match load_state(&path, &model, &fingerprint) {
            Ok(loaded) => assert_eq!(bits(&loaded), bits(&state)),
            Err(_) => noticed += 1,
        }
    }
    // Only white space and keys that nobody reads may change unseen.
    assert!(noticed > bytes.len() * 99 / 100, "{noticed} of {}", bytes.len());
}
