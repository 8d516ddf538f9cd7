//! State files: round trips, and states that are not this model's.

mod sample;

use std::fs;

use elapid_formats::{
    Fingerprint, StateFile, TensorFile, load_state, save_state, save_tensors, state_hash,
};
use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_tensor::Tensor;
use sample::{bits, model, state};

#[test]
fn round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut model = model();
    let fingerprint = Fingerprint::of_model(&mut model).unwrap();
    for slots in [0, 1, 3] {
        let state = state(&model, slots);
        save_state(&path, &state, &fingerprint).unwrap();
        let loaded = load_state(&path, &model, &fingerprint).unwrap();
        assert_eq!(bits(&loaded), bits(&state));
        assert_eq!(loaded.positions, state.positions);
        assert_eq!(state_hash(&loaded).unwrap(), state_hash(&state).unwrap());
        let bytes = fs::read(&path).unwrap();
        save_state(&path, &loaded, &fingerprint).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes, "the same state gives the same file");
    }
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.shape("layers.1.conv_state"), Some(&[3, 16, 3][..]));
    assert_eq!(file.shape("layers.1.ssm_state"), Some(&[3, 16, 4][..]));
    assert_eq!(StateFile::read(&path).unwrap().fingerprint, fingerprint);
}

#[test]
fn views_are_written_as_what_they_show() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let model = model();
    let fingerprint = Fingerprint::of_config(model.config());
    let four = state(&model, 4);
    let mut narrow = State { positions: four.positions[1..3].to_vec(), ..State::default() };
    for layer in &four.layers {
        let tensors = layer
            .iter()
            .map(|(name, tensor)| (name.to_owned().into(), tensor.narrow(0, 1, 2).unwrap()));
        narrow.layers.push(elapid_models::LayerState::new(tensors));
    }
    save_state(&path, &narrow, &fingerprint).unwrap();
    let loaded = load_state(&path, &model, &fingerprint).unwrap();
    let selected = four.select(&[1, 2]).unwrap();
    assert_eq!(bits(&loaded), bits(&selected));
    assert_eq!(state_hash(&loaded).unwrap(), state_hash(&selected).unwrap());
}

#[test]
fn the_hash_sees_every_change() {
    let model = model();
    let base = state_hash(&state(&model, 2)).unwrap();
    let mut moved = state(&model, 2);
    moved.positions[1] += 1;
    assert_ne!(state_hash(&moved).unwrap(), base);
    let swapped = state(&model, 2).select(&[1, 0]).unwrap();
    assert_ne!(state_hash(&swapped).unwrap(), base);
    let mut shorter = state(&model, 2);
    shorter.layers.pop();
    assert_ne!(state_hash(&shorter).unwrap(), base);
    let mut negated = state(&model, 2);
    let mut h = negated.layers[1].take("ssm_state").unwrap();
    let conv = negated.layers[1].take("conv_state").unwrap();
    h.data_mut::<f32>().unwrap()[5] *= -1.0;
    negated.layers[1] =
        elapid_models::LayerState::new([("ssm_state".into(), h), ("conv_state".into(), conv)]);
    assert_ne!(state_hash(&negated).unwrap(), base);
}

#[test]
fn states_of_other_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut model = model();
    let own = Fingerprint::of_model(&mut model).unwrap();
    let shape_only = Fingerprint::of_config(model.config());
    save_state(&path, &state(&model, 1), &own).unwrap();

    let config = MambaConfig { n_layer: 3, ..sample::config() };
    let deeper = LanguageModel::empty(&config).unwrap();
    let error = load_state(&path, &deeper, &Fingerprint::of_config(&config)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("another model") && text.contains(r#""n_layer":3"#), "{text}");
    assert!(text.contains(r#""n_layer":2"#), "{text}");

    let mut other = LanguageModel::new(&sample::config(), 8).unwrap();
    let others = Fingerprint::of_model(&mut other).unwrap();
    assert_ne!(others.weights, own.weights);
    let text = load_state(&path, &other, &others).unwrap_err().to_string();
    assert!(text.contains("other weights"), "{text}");
    // Where one side has not hashed its weights, the shape decides.
    load_state(&path, &model, &shape_only).unwrap();

    // Initialisation, padding under the same rows and the head do not change what a state means.
    let same =
        MambaConfig { vocab_size: 14, dt_min: 0.01, tie_embeddings: false, ..sample::config() };
    assert_eq!(Fingerprint::of_config(&same), shape_only);
}

#[test]
fn other_files_and_versions_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let tensor = Tensor::zeros::<f32>([1, 2]);
    let refused = |metadata: &[(&'static str, &str)], words: &[&str]| {
        let metadata = metadata.iter().map(|&(key, value)| (key, value.to_owned()));
        save_tensors(&path, [("layers.0.ssm_state", &tensor)], metadata).unwrap();
        let error = StateFile::read(&path).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(&[("format", "pt")], &["not a state file", "pt"]);
    let version = [("format", "elapid-state"), ("version", "2")];
    refused(&version, &["version", "expected 1", "found 2"]);
    let first = [("format", "elapid-state"), ("version", "1")];
    refused(&first, &["lacks \"positions\""]);
    assert!(StateFile::read(&sample::golden("hf/model.safetensors")).is_err());

    let model = model();
    let fingerprint = Fingerprint::of_config(model.config());
    let mut uneven = state(&model, 2);
    uneven.positions.pop();
    let error = save_state(&path, &uneven, &fingerprint).unwrap_err().to_string();
    assert!(error.contains("expected 1 slots"), "{error}");
}
