//! One model through every format and back: bits stay, and what cannot be said is refused.

mod sample;

use std::fs;
use std::path::Path;

use elapid_formats::convert::{
    save_hugging_face, save_hugging_face_pytorch, save_npz, save_original,
};
use elapid_formats::{Error, Format, Layout, ModelSource, hf, load_model};
use elapid_models::{LanguageModel, MambaConfig, NormKind};
use elapid_tensor::DType;
use sample::{golden, parameters};

type Save = fn(&ModelSource, &Path, Option<DType>) -> Result<(), Error>;

const TARGETS: [(&str, Save, Format); 4] = [
    ("hf", save_hugging_face, Format::Safetensors),
    ("hf-bin", save_hugging_face_pytorch, Format::PyTorch),
    ("original", save_original, Format::PyTorch),
    ("model.npz", save_npz, Format::Npz),
];

fn variants() -> [MambaConfig; 4] {
    let base = sample::config();
    [
        base.clone(),
        MambaConfig { tie_embeddings: false, bias: true, dt_rank: Some(3), ..base.clone() },
        MambaConfig { norm: NormKind::Layer, norm_eps: 1e-6, conv_bias: false, ..base.clone() },
        MambaConfig { mixer_rms_eps: Some(1e-6), ..base },
    ]
}

#[test]
fn every_format_into_every_other_keeps_every_bit() {
    for config in variants() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let folder = tempfile::tempdir().unwrap();
            let start = folder.path().join("start");
            hf::save_model(&start, &mut LanguageModel::new(&config, 3).unwrap(), dtype).unwrap();
            let expected = parameters(&mut load_model(&start).unwrap());
            let mut sources = vec![start];
            for (name, save, format) in TARGETS {
                if config.mixer_rms_eps.is_some() && name == "original" {
                    let source = ModelSource::open(&sources[0]).unwrap();
                    let error = save(&source, &folder.path().join(name), None).unwrap_err();
                    assert!(error.to_string().contains("mixer_rms_eps"), "{error}");
                    continue;
                }
                for (number, source) in sources.clone().iter().enumerate() {
                    let target = folder.path().join(format!("{number}-{name}"));
                    save(&ModelSource::open(source).unwrap(), &target, None).unwrap();
                    let written = ModelSource::open(&target).unwrap();
                    assert_eq!(written.format(), format);
                    let original = written.layout() == Layout::Original;
                    assert_eq!(original, name == "original");
                    let stored = written.get("backbone.embeddings.weight").unwrap();
                    assert_eq!(stored.type_name(), dtype.name().to_uppercase());
                    assert!(stored.bytes.is_mapped());
                    assert_eq!(written.config().tie_embeddings, config.tie_embeddings);
                    assert_eq!(written.config().mixer_rms_eps, config.mixer_rms_eps);
                    assert_eq!(parameters(&mut written.load().unwrap()), expected, "{target:?}");
                    sources.push(target);
                }
            }
        }
    }
}

/// The golden models, Mamba and FalconMamba, into a `pytorch_model.bin` of the Hugging Face layout and back: every bit of
/// every tensor as it is stored, and the whole of `config.json`.
#[test]
fn golden_models_as_pickles_and_back() {
    let mamba1 = golden("hf");
    let falcon = golden("../falcon_mamba/hf");
    for from in [mamba1, golden("hf_bf16"), falcon] {
        let folder = tempfile::tempdir().unwrap();
        let [bin, back] = ["bin", "back"].map(|name| folder.path().join(name));
        let source = ModelSource::open(&from).unwrap();
        save_hugging_face_pytorch(&source, &bin, None).unwrap();
        assert_eq!(sample::entries(&bin)[..2], ["config.json", "pytorch_model.bin"]);
        let pickled = ModelSource::open(&bin).unwrap();
        assert_eq!((pickled.format(), pickled.layout()), (Format::PyTorch, Layout::HuggingFace));
        save_hugging_face(&pickled, &back, None).unwrap();
        let back = ModelSource::open(&back).unwrap();
        for written in [&pickled, &back] {
            assert_eq!(written.config(), source.config());
            assert!(written.names().eq(source.names()));
            for name in source.names() {
                let [a, b] = [&source, written].map(|model| model.get(name).unwrap());
                assert_eq!((a.encoding, &a.shape), (b.encoding, &b.shape), "{name}");
                assert!(*a.bytes == *b.bytes && b.bytes.is_mapped(), "{name}");
            }
        }
        let [first, second] = [bin, folder.path().join("back")]
            .map(|model| fs::read(model.join("config.json")).unwrap());
        assert_eq!(first, second);
    }
}

#[test]
fn the_golden_originals() {
    let original = ModelSource::open(&golden("original")).unwrap();
    assert_eq!((original.format(), original.layout()), (Format::PyTorch, Layout::Original));
    assert_eq!((original.config().vocab_size, original.config().padded_vocab_size()), (259, 264));
    let expected = parameters(&mut load_model(&golden("hf")).unwrap());
    assert_eq!(parameters(&mut original.load().unwrap()), expected);
    // The file itself, with its configuration beside it.
    let file = golden("original").join("pytorch_model.bin");
    assert_eq!(parameters(&mut load_model(&file).unwrap()), expected);
}

#[test]
fn rounding_is_that_of_the_golden_model() {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::open(&golden("original")).unwrap();
    for (name, save, _) in TARGETS {
        let target = folder.path().join(name);
        save(&source, &target, Some(DType::BF16)).unwrap();
        let expected = parameters(&mut load_model(&golden("hf_bf16")).unwrap());
        assert_eq!(parameters(&mut load_model(&target).unwrap()), expected, "{name}");
    }
}

#[test]
fn tokenizers_come_along_and_mixed_folders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let start = folder.path().join("start");
    hf::save_model(&start, &mut sample::model(), DType::F32).unwrap();
    fs::write(start.join("tokenizer.json"), b"{}").unwrap();
    fs::write(start.join("notes.txt"), b"mine").unwrap();
    let source = ModelSource::open(&start).unwrap();
    let target = folder.path().join("original");
    save_original(&source, &target, None).unwrap();
    assert_eq!(sample::entries(&target), ["config.json", "pytorch_model.bin", "tokenizer.json"]);
    let error = save_hugging_face(&source, &target, None).unwrap_err().to_string();
    assert!(error.contains("pytorch_model.bin"), "{error}");
    let error = save_npz(&source, &folder.path().join("x"), Some(DType::I64)).unwrap_err();
    assert!(error.to_string().contains("i64"), "{error}");
}

#[test]
fn a_value_too_large_for_f16_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let start = folder.path().join("start");
    let mut model = sample::model();
    model
        .visit(&mut |parameter| {
            if parameter.name.ends_with("1.mixer.D") {
                parameter.tensor.data_mut::<f32>()?[2] = 1e6;
            }
            Ok(())
        })
        .unwrap();
    hf::save_model(&start, &mut model, DType::F32).unwrap();
    let source = ModelSource::open(&start).unwrap();
    for (name, save, _) in TARGETS {
        let target = folder.path().join(name);
        let error = save(&source, &target, Some(DType::F16)).unwrap_err().to_string();
        assert!(error.contains("layers.1.mixer.D"), "{error}");
        assert!(!target.exists());
    }
}
