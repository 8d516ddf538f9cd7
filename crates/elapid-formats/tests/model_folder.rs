//! Model folders: the golden model, round trips, both layouts, shards, and every way not to fit.

mod sample;

use std::fs;
use std::path::Path;

use elapid_formats::{TensorFile, hf, save_tensors};
use elapid_models::{LanguageModel, MambaConfig, NormKind};
use elapid_tensor::{DType, Tensor, bf16};
use sample::{golden, parameters};
use serde_json::{Value, json};

fn tensors_of(path: &Path) -> Vec<(String, Tensor)> {
    let file = TensorFile::open(path).unwrap();
    file.names().into_iter().map(|name| (name.clone(), file.tensor(&name).unwrap())).collect()
}

fn write(folder: &Path, tensors: &[(String, Tensor)]) {
    let path = folder.join(hf::WEIGHTS_FILE);
    save_tensors(&path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), []).unwrap();
}

fn refusal(folder: &Path) -> String {
    match hf::load_model(folder) {
        Ok(_) => panic!("loaded"),
        Err(error) => error.to_string(),
    }
}

/// A folder with the small model, and its tensors.
fn folder() -> (tempfile::TempDir, Vec<(String, Tensor)>) {
    let folder = tempfile::tempdir().unwrap();
    hf::save_model(folder.path(), &mut sample::model(), DType::F32).unwrap();
    let tensors = tensors_of(&folder.path().join(hf::WEIGHTS_FILE));
    (folder, tensors)
}

#[test]
fn the_golden_model_loads_value_for_value() {
    for (name, dtype) in [("hf", "F32"), ("hf_bf16", "BF16")] {
        let mut model = hf::load_model(&golden(name)).unwrap();
        let config = model.config();
        assert_eq!((config.d_model, config.n_layer, config.vocab_size), (64, 4, 264));
        assert_eq!(config.parameter_count(), 147_776);
        let file = TensorFile::open(&golden(name).join(hf::WEIGHTS_FILE)).unwrap();
        let loaded = parameters(&mut model);
        assert_eq!(loaded.len(), file.names().len());
        for (name, shape, bits) in loaded {
            assert_eq!(file.dtype_name(&name).as_deref(), Some(dtype));
            let stored = file.tensor(&name).unwrap();
            let stored_bits: Vec<u32> =
                stored.to_f64_vec().unwrap().iter().map(|&v| (v as f32).to_bits()).collect();
            assert_eq!(stored_bits, bits, "{name}");
            let expected = match shape.as_slice() {
                &[channels, taps] if name.ends_with("conv1d.weight") => vec![channels, 1, taps],
                shape => shape.to_vec(),
            };
            assert_eq!(stored.shape().to_vec(), expected, "{name}");
        }
    }
}

#[test]
fn the_bf16_golden_is_what_rounding_gives() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model");
    hf::save_model(&target, &mut hf::load_model(&golden("hf")).unwrap(), DType::BF16).unwrap();
    assert_eq!(sample::entries(&target), [hf::CONFIG_FILE, hf::WEIGHTS_FILE]);
    let ours = TensorFile::open(&target.join(hf::WEIGHTS_FILE)).unwrap();
    let theirs = TensorFile::open(&golden("hf_bf16").join(hf::WEIGHTS_FILE)).unwrap();
    assert_eq!(ours.metadata("format"), Some("pt"));
    let mut names = (ours.names(), theirs.names());
    names.0.sort();
    names.1.sort();
    assert_eq!(names.0, names.1);
    for name in &names.0 {
        assert_eq!(ours.shape(name), theirs.shape(name));
        assert_eq!(ours.dtype(name), theirs.dtype(name));
        assert_eq!(ours.bytes(name).unwrap(), theirs.bytes(name).unwrap(), "{name}");
    }
}

#[test]
fn what_transformers_reads_is_what_it_would_write() {
    let folder = tempfile::tempdir().unwrap();
    hf::save_model(folder.path(), &mut hf::load_model(&golden("hf")).unwrap(), DType::F32).unwrap();
    let read = |path: &Path| -> Value {
        serde_json::from_slice(&fs::read(path.join(hf::CONFIG_FILE)).unwrap()).unwrap()
    };
    let (ours, theirs) = (read(folder.path()), read(&golden("hf")));
    // Ids of special tokens and what only matters before training may differ.
    let free = [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "transformers_version",
        "use_associative_scan",
        "use_mambapy",
    ];
    for (key, value) in theirs.as_object().unwrap() {
        if !free.contains(&key.as_str()) {
            assert_eq!(&ours[key], value, "{key}");
        }
    }
}

#[test]
fn every_variant_survives_the_round_trip() {
    let base = sample::config();
    let variants = [
        base.clone(),
        MambaConfig { tie_embeddings: false, bias: true, ..base.clone() },
        MambaConfig { norm: NormKind::Layer, conv_bias: false, d_conv: 1, ..base },
    ];
    for config in variants {
        let folder = tempfile::tempdir().unwrap();
        let mut model = LanguageModel::new(&config, 3).unwrap();
        hf::save_model(folder.path(), &mut model, DType::F32).unwrap();
        let first = fs::read(folder.path().join(hf::WEIGHTS_FILE)).unwrap();
        let mut loaded = hf::load_model(folder.path()).unwrap();
        assert_eq!(loaded.config(), &config);
        assert_eq!(parameters(&mut loaded), parameters(&mut model));
        hf::save_model(folder.path(), &mut loaded, DType::F32).unwrap();
        assert_eq!(fs::read(folder.path().join(hf::WEIGHTS_FILE)).unwrap(), first);

        for dtype in [DType::BF16, DType::F16] {
            hf::save_model(folder.path(), &mut model, dtype).unwrap();
            let mut rounded = hf::load_model(folder.path()).unwrap();
            for ((name, _, exact), (_, _, rounded)) in
                parameters(&mut model).iter().zip(parameters(&mut rounded))
            {
                for (&exact, rounded) in exact.iter().zip(rounded) {
                    let expected = match dtype {
                        DType::BF16 => bf16::from_f32(f32::from_bits(exact)).to_f32(),
                        _ => elapid_tensor::f16::from_f32(f32::from_bits(exact)).to_f32(),
                    };
                    assert_eq!(expected.to_bits(), rounded, "{name}");
                }
            }
        }
        let error = hf::save_model(folder.path(), &mut model, DType::I32).unwrap_err();
        assert!(error.to_string().contains("i32"), "{error}");
    }
}

#[test]
fn loaded_parameters_are_leaves() {
    let (folder, _) = folder();
    let mut model = hf::load_model(folder.path()).unwrap();
    model
        .visit(&mut |parameter| {
            assert!(parameter.tensor.tracks_grad(), "{}", parameter.name);
            Ok(())
        })
        .unwrap();
}

#[test]
fn the_original_layout() {
    let (folder, mut tensors) = folder();
    let expected = parameters(&mut sample::model());
    let place = tensors.iter().position(|(name, _)| name == "backbone.embeddings.weight").unwrap();
    let embedding = tensors[place].1.clone();
    tensors[place].0 = "backbone.embedding.weight".into();
    tensors.push(("lm_head.weight".into(), embedding));
    write(folder.path(), &tensors);
    let config = json!({ "d_model": 8, "n_layer": 2, "vocab_size": 13,
        "ssm_cfg": { "d_state": 4, "dt_rank": 2 }, "rms_norm": true, "fused_add_norm": true });
    fs::write(folder.path().join(hf::CONFIG_FILE), config.to_string()).unwrap();
    let mut model = hf::load_model(folder.path()).unwrap();
    assert_eq!(model.config(), &sample::config());
    assert_eq!(parameters(&mut model), expected);
}

#[test]
fn a_head_that_differs_from_the_embedding_is_a_head() {
    let (folder, mut tensors) = folder();
    tensors.push(("lm_head.weight".into(), Tensor::filled(0.5f32, [16, 8])));
    write(folder.path(), &tensors);
    let model = hf::load_model(folder.path()).unwrap();
    assert!(!model.config().tie_embeddings);
    let error = hf::load_weights(folder.path(), &mut sample::model()).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("tied"), "{error}");
}

#[test]
fn shards() {
    let (folder, tensors) = folder();
    let root = folder.path();
    fs::remove_file(root.join(hf::WEIGHTS_FILE)).unwrap();
    let mut map = serde_json::Map::new();
    for (shard, part) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let file = format!("model-{shard}.safetensors");
        save_tensors(&root.join(&file), part.iter().map(|(n, t)| (n.as_str(), t)), []).unwrap();
        map.extend(part.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    let index = root.join(hf::INDEX_FILE);
    fs::write(&index, json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    let mut model = hf::load_model(root).unwrap();
    assert_eq!(parameters(&mut model), parameters(&mut sample::model()));

    let outside = json!({ "weight_map": { "a": "../model-0.safetensors" } });
    fs::write(&index, outside.to_string()).unwrap();
    assert!(refusal(root).contains("expected a file name"));
    map.insert("backbone.norm_f.weight".into(), json!("model-0.safetensors"));
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert!(refusal(root).contains("backbone.norm_f.weight is not in its shard"));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let name = "backbone.layers.1.mixer.dt_proj.bias";
    type Change = fn(&mut Vec<(String, Tensor)>, usize);
    let cases: [(Change, &[&str]); 4] = [
        (|tensors, at| drop(tensors.remove(at)), &["expected [16]", "found no such tensor"]),
        (
            |tensors, at| tensors[at].1 = Tensor::zeros::<f32>([17]),
            &["expected [16]", "found [17] F32"],
        ),
        (
            |tensors, at| tensors[at].1 = Tensor::zeros::<i32>([16]),
            &["expected F32, BF16, F16 or F64", "found [16] I32"],
        ),
        (
            |tensors, at| {
                let extra = (format!("{}.extra", tensors[at].0), Tensor::zeros::<f32>([2]));
                tensors.push(extra);
            },
            &[".extra", "expected no such tensor", "found [2] F32"],
        ),
    ];
    for (change, words) in cases {
        let (folder, mut tensors) = folder();
        let at = tensors.iter().position(|(own, _)| own == name).unwrap();
        change(&mut tensors, at);
        write(folder.path(), &tensors);
        let error = refusal(folder.path());
        assert!(error.contains(name) && error.contains(hf::WEIGHTS_FILE), "{error}");
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn configurations_that_do_not_fit_the_weights() {
    let (folder, _) = folder();
    let path = folder.path().join(hf::CONFIG_FILE);
    let config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let with = |key: &str, value: Value| {
        let mut changed = config.clone();
        changed[key] = value;
        fs::write(&path, changed.to_string()).unwrap();
        refusal(folder.path())
    };
    assert!(with("num_hidden_layers", json!(3)).contains("number of layers"));
    assert!(with("num_hidden_layers", json!(1)).contains("backbone.layers.1."));
    // Far beyond the memory of any machine: refused before anything is allocated.
    let huge = with("state_size", json!(256)) + &with("vocab_size", json!(1 << 24));
    assert!(huge.contains("real_vocab_size") || huge.contains("number of parameters"), "{huge}");
    let mut enormous = config.clone();
    enormous["hidden_size"] = json!(1 << 24);
    enormous["intermediate_size"] = Value::Null;
    enormous["expand"] = json!(1 << 24);
    fs::write(&path, enormous.to_string()).unwrap();
    let error = refusal(folder.path());
    assert!(error.contains("number of parameters") && error.contains("[16, 8]"), "{error}");
    let all_wrong = with("conv_kernel", json!(3));
    assert!(all_wrong.contains("conv1d.weight: expected [16, 1, 3]"), "{all_wrong}");
}

#[test]
fn folders_without_a_readable_model() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(&folder.path().join("nowhere")).contains("no such folder or file"));
    assert!(refusal(folder.path()).contains("has neither model.safetensors"));
    fs::create_dir(folder.path().join(hf::WEIGHTS_FILE)).unwrap();
    assert!(refusal(folder.path()).contains("found a folder"));
    let file = folder.path().join("notes.txt");
    fs::write(&file, b"no weights").unwrap();
    assert!(refusal(&file).contains("notes.txt"));
    assert!(hf::save_model(&file, &mut sample::model(), DType::F32).is_err());
}
