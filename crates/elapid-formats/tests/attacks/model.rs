//! Whole models: configurations that do not fit their weights, and weights that are no numbers.

use std::fs;
use std::path::{Path, PathBuf};

use elapid_formats::convert::{save_hugging_face, save_npz, save_original};
use elapid_formats::{ModelSource, hf};
use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::DType;
use serde_json::{Value, json};

/// A folder that must be refused.
pub struct Model {
    pub what: &'static str,
    pub folder: PathBuf,
    pub words: &'static [&'static str],
}

pub fn models(root: &Path) -> Vec<Model> {
    let mut models = Vec::new();
    let base = root.join("base");
    let config = MambaConfig { vocab_size: 13, d_state: 4, ..MambaConfig::bytes(8, 2) };
    let mut model = LanguageModel::new(&config, 7).unwrap();
    hf::save_model(&base, &mut model, DType::F32).unwrap();
    let sound: Value =
        serde_json::from_slice(&fs::read(base.join(hf::CONFIG_FILE)).unwrap()).unwrap();
    let weights = fs::read(base.join(hf::WEIGHTS_FILE)).unwrap();

    type Change<'a> = (&'static str, &'a [(&'a str, Value)], &'static [&'static str]);
    let changes: [Change<'_>; 12] = [
        (
            "another width",
            &[("hidden_size", json!(16)), ("intermediate_size", json!(32))],
            &["embeddings", "[16, 8]"],
        ),
        (
            "an enormous width",
            &[("hidden_size", json!(1 << 24)), ("intermediate_size", json!(1u64 << 25))],
            &["number of parameters"],
        ),
        (
            "a width beyond all bounds",
            &[("hidden_size", json!(1u64 << 60)), ("intermediate_size", Value::Null)],
            &["d_model"],
        ),
        (
            "2^24 layers",
            &[("num_hidden_layers", json!(1 << 24))],
            &["number of layers", "16777216"],
        ),
        (
            "fewer layers",
            &[("num_hidden_layers", json!(1))],
            &["backbone.layers.1.", "no such tensor"],
        ),
        ("a negative size", &[("state_size", json!(-4))], &["state_size", "-4"]),
        ("a size of 0", &[("conv_kernel", json!(0))], &["conv_kernel"]),
        ("a text as a size", &[("expand", json!("2"))], &["expand"]),
        ("another rank", &[("time_step_rank", json!(5))], &["dt_proj.weight", "[16, 5]"]),
        (
            "an own head that is missing",
            &[("tie_word_embeddings", json!(false))],
            &["lm_head.weight", "no such tensor"],
        ),
        ("another architecture", &[("model_type", json!("llama"))], &["model_type", "llama"]),
        (
            "a norm of infinite eps",
            &[("layer_norm_epsilon", json!({ "__float__": "Infinity" }))],
            &["norm_eps", "inf"],
        ),
    ];
    for (number, (what, keys, words)) in changes.into_iter().enumerate() {
        let folder = root.join(format!("config-{number}"));
        fs::create_dir(&folder).unwrap();
        let mut changed = sound.clone();
        for (key, value) in keys {
            changed[*key] = value.clone();
        }
        fs::write(folder.join(hf::CONFIG_FILE), changed.to_string()).unwrap();
        fs::write(folder.join(hf::WEIGHTS_FILE), &weights).unwrap();
        models.push(Model { what, folder, words });
    }

    let broken = root.join("broken");
    let name = "backbone.layers.1.mixer.x_proj.weight";
    model
        .visit(&mut |parameter| {
            if parameter.name == name {
                parameter.tensor.data_mut::<f32>()?[3] = f32::NAN;
            }
            Ok(())
        })
        .unwrap();
    hf::save_model(&broken, &mut model, DType::F32).unwrap();
    let source = ModelSource::open(&broken).unwrap();
    let words: &[&str] = &["backbone.layers.1.mixer.x_proj.weight", "NaN", "element 3"];
    for dtype in [DType::F32, DType::BF16] {
        let [hf, original, npz] =
            ["hf", "original", "npz"].map(|to| root.join(format!("nan-{to}-{dtype}")));
        save_hugging_face(&source, &hf, Some(dtype)).unwrap();
        save_original(&source, &original, Some(dtype)).unwrap();
        fs::create_dir(&npz).unwrap();
        save_npz(&source, &npz.join("model.npz"), Some(dtype)).unwrap();
        for folder in [hf, original, npz] {
            models.push(Model { what: "a weight that is no number", folder, words });
        }
    }
    models
}
