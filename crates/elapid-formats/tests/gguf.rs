//! GGUF files of models: written, read back, quantised, and what they keep beside the weights.

mod sample;

use std::path::{Path, PathBuf};

use elapid_formats::gguf::{
    Array, ElementType, GgufFile, Plan, Planned, Value, WeightTypes, save_gguf, vocabulary_of,
    write_gguf,
};
use elapid_formats::{Format, ModelSource, hf};
use elapid_models::{LanguageModel, MambaConfig, NormKind};
use elapid_ops::blocks::{Encoding, dequantize, quantize};
use elapid_tensor::{DType, bf16, f16};
use sample::{golden, parameters};

fn keep() -> WeightTypes {
    WeightTypes::default()
}

fn only(encoding: Encoding) -> WeightTypes {
    WeightTypes { projections: Some(encoding), embedding: None }
}

/// Writes a model's file; the plan that it was written by.
fn convert(source: &Path, target: &Path, types: WeightTypes) -> Plan {
    let source = ModelSource::open(source).unwrap();
    let plan = Plan::new(&source, types).unwrap();
    let mut told = 0;
    save_gguf(&source, &plan, vocabulary_of(&source).unwrap(), target, &mut |done| {
        assert!(done > told);
        told = done;
    })
    .unwrap();
    assert_eq!(told, plan.bytes());
    plan
}

fn saved(folder: &Path, config: &MambaConfig, dtype: DType) -> PathBuf {
    let path = folder.join("hf");
    hf::save_model(&path, &mut LanguageModel::new(config, 5).unwrap(), dtype).unwrap();
    path
}

/// Distance in units in the last place, of numbers of one sign.
fn ulps(a: u32, b: u32) -> u32 {
    if a >> 31 == b >> 31 { a.abs_diff(b) } else { (a & !(1 << 31)) + (b & !(1 << 31)) }
}

/// `round` is what the file's type does to a matrix that it holds.
fn check_values(source: &Path, file: &Path, round: impl Fn(&str, f32) -> f32) {
    let mut expected = hf::load_model(source).unwrap();
    let mut found = ModelSource::open(file).unwrap().load().unwrap();
    assert_eq!(found.config(), expected.config());
    for ((name, shape, bits), (own_name, own_shape, own)) in
        parameters(&mut expected).into_iter().zip(parameters(&mut found))
    {
        assert_eq!((&name, &shape), (&own_name, &own_shape));
        for (bits, own) in bits.into_iter().zip(own) {
            if name.ends_with("A_log") {
                assert!(
                    ulps(bits, own) <= 2,
                    "{name}: {} {}",
                    f32::from_bits(bits),
                    f32::from_bits(own)
                );
            } else {
                assert_eq!(round(&name, f32::from_bits(bits)).to_bits(), own, "{name}");
            }
        }
    }
}

fn is_matrix(name: &str) -> bool {
    name.contains("proj.weight") || name.contains("embeddings") || name.contains("lm_head")
}

#[test]
fn the_golden_model_there_and_back() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["hf", "hf_bf16"] {
        let file = folder.path().join(format!("{name}.gguf"));
        convert(&golden(name), &file, keep());
        check_values(&golden(name), &file, |_, value| value);
        let half = folder.path().join("half.gguf");
        convert(&golden(name), &half, only(Encoding::BF16));
        check_values(&golden(name), &half, |name, value| {
            if is_matrix(name) { bf16::from_f32(value).to_f32() } else { value }
        });
        convert(&golden(name), &half, only(Encoding::F16));
        check_values(&golden(name), &half, |name, value| {
            if is_matrix(name) { f16::from_f32(value).to_f32() } else { value }
        });
    }
    let source = ModelSource::open(&folder.path().join("hf_bf16.gguf")).unwrap();
    assert_eq!(source.format(), Format::Gguf);
    assert_eq!(
        source.get("backbone.layers.0.mixer.in_proj.weight").unwrap().encoding,
        Encoding::BF16
    );
    assert_eq!(source.get("backbone.layers.0.mixer.conv1d.weight").unwrap().shape, [128, 1, 4]);
    assert_eq!(source.metadata()["mamba.block_count"], "4");
    assert!(source.get("backbone.embeddings.weight").unwrap().bytes.is_mapped());
}

#[test]
fn every_variant_comes_back() {
    let base = sample::config();
    let variants = [
        MambaConfig { tie_embeddings: false, bias: true, ..base.clone() },
        MambaConfig { norm: NormKind::Layer, conv_bias: false, d_conv: 1, ..base.clone() },
        MambaConfig { norm_eps: 3e-6, dt_max: 0.3, expand: 3, residual_in_fp32: false, ..base },
    ];
    for config in variants {
        let folder = tempfile::tempdir().unwrap();
        let source = saved(folder.path(), &config, DType::F32);
        let file = folder.path().join("model.gguf");
        convert(&source, &file, keep());
        check_values(&source, &file, |_, value| value);
        // A file made from a file is the same file.
        let again = folder.path().join("again/model.gguf");
        std::fs::create_dir(again.parent().unwrap()).unwrap();
        convert(&file, &again, keep());
        assert_eq!(std::fs::read(&file).unwrap(), std::fs::read(&again).unwrap());
    }
}

#[test]
fn values_of_a_log_near_zero_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = sample::model();
    model
        .visit(&mut |parameter| {
            if parameter.name.ends_with("A_log") {
                for (i, value) in parameter.tensor.data_mut::<f32>()?.iter_mut().enumerate() {
                    *value = (i as f32 - 20.0) * 1.234_567e-4;
                }
            }
            Ok(())
        })
        .unwrap();
    let source = folder.path().join("hf");
    hf::save_model(&source, &mut model, DType::F32).unwrap();
    let file = folder.path().join("model.gguf");
    convert(&source, &file, keep());
    check_values(&source, &file, |_, value| value);
    let again = folder.path().join("again.gguf");
    convert(&file, &again, only(Encoding::BF16));
    let (a, b) = (GgufFile::open(&file).unwrap(), GgufFile::open(&again).unwrap());
    let bytes = |file: &GgufFile| {
        let info = file.tensors().iter().find(|info| info.name == "blk.1.ssm_a").unwrap().clone();
        file.bytes(&info).unwrap().to_vec()
    };
    assert_eq!(bytes(&a), bytes(&b));
}

#[test]
fn quantised_files_hold_what_the_quantiser_gives() {
    let folder = tempfile::tempdir().unwrap();
    // Rows of 256 (embedding, in_proj), 512 (x_proj, out_proj) and 16 (dt_proj).
    let config = MambaConfig { vocab_size: 40, ..MambaConfig::bytes(256, 1) };
    let source_path = saved(folder.path(), &config, DType::BF16);
    let source = ModelSource::open(&source_path).unwrap();
    for encoding in [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_K, Encoding::Q6_K] {
        let path = folder.path().join(format!("{encoding}.gguf"));
        let plan = convert(&source_path, &path, only(encoding));
        assert_eq!(plan.fallbacks().count(), 0);
        assert!(plan.bytes() < plan.bytes_before());
        let file = ModelSource::open(&path).unwrap();
        for outline in elapid_models::parameter_outlines(&config) {
            let (from, to) = (source.get(&outline.name).unwrap(), file.get(&outline.name).unwrap());
            let projection = is_matrix(&outline.name) && !outline.name.contains("dt_proj");
            assert_eq!(
                to.encoding,
                if projection { encoding } else { Encoding::F32 },
                "{}",
                outline.name
            );
            if !projection {
                continue;
            }
            let mut values = vec![0.0; from.elements()];
            from.read_f32(&mut values).unwrap();
            let columns = *outline.shape.last().unwrap();
            assert_eq!(
                *to.bytes,
                quantize(encoding, columns, &values).unwrap(),
                "{}",
                outline.name
            );
            let mut loaded = vec![0.0; to.elements()];
            dequantize(encoding, &to.bytes, &mut loaded).unwrap();
            let distance: f32 = values.iter().zip(&loaded).map(|(a, b)| (a - b) * (a - b)).sum();
            let size: f32 = values.iter().map(|a| a * a).sum();
            assert!(
                distance > 0.0 && distance < 0.02 * size,
                "{}: {distance} of {size}",
                outline.name
            );
        }
        file.load().unwrap();
    }
    let mixed = WeightTypes { projections: Some(Encoding::Q4_0), embedding: Some(Encoding::Q8_0) };
    let plan = Plan::new(&source, mixed).unwrap();
    assert_eq!(plan.tensors[0].to, Encoding::Q8_0);
    assert_eq!(plan.main_encoding(), Encoding::Q4_0);
}

#[test]
fn rows_that_are_no_whole_blocks_fall_back() {
    let folder = tempfile::tempdir().unwrap();
    let config = MambaConfig { vocab_size: 16, expand: 1, ..MambaConfig::bytes(96, 1) };
    let source = ModelSource::open(&saved(folder.path(), &config, DType::F32)).unwrap();
    let plan = Plan::new(&source, only(Encoding::Q4_K)).unwrap();
    assert_eq!(plan.tensors[0].to, Encoding::Q8_0);
    assert_eq!(plan.tensors[0].instead_of, Some(Encoding::Q4_K));
    assert!(plan.fallbacks().next().unwrap().to_string().contains("multiple of 256"));
    let config = MambaConfig { vocab_size: 16, expand: 1, ..MambaConfig::bytes(40, 1) };
    let source = ModelSource::open(&saved(&folder.path().join("b"), &config, DType::F32)).unwrap();
    let plan = Plan::new(&source, only(Encoding::Q8_0)).unwrap();
    assert_eq!(
        (plan.tensors[0].to, plan.tensors[0].instead_of),
        (Encoding::F16, Some(Encoding::Q8_0))
    );
}

#[test]
fn weights_that_cannot_be_written_are_named_and_leave_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = sample::model();
    model
        .visit(&mut |parameter| {
            if parameter.name.ends_with("1.mixer.out_proj.weight") {
                parameter.tensor.data_mut::<f32>()?[3] = 1e6;
            }
            Ok(())
        })
        .unwrap();
    let source = folder.path().join("hf");
    hf::save_model(&source, &mut model, DType::F32).unwrap();
    let source = ModelSource::open(&source).unwrap();
    let plan = Plan::new(&source, only(Encoding::F16)).unwrap();
    let target = folder.path().join("model.gguf");
    std::fs::write(&target, "old").unwrap();
    let error =
        save_gguf(&source, &plan, Vec::new(), &target, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("1.mixer.out_proj.weight") && error.contains("1000000"), "{error}");
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    assert_eq!(sample::entries(folder.path()), ["hf", "model.gguf"]);
}

#[test]
fn all_kinds_of_metadata_come_back() {
    let arrays = [
        Array::U8(vec![1, 2]),
        Array::I8(vec![-1]),
        Array::U16(vec![60000]),
        Array::I16(vec![-2]),
        Array::U32(vec![1 << 31]),
        Array::I32(vec![-3]),
        Array::U64(vec![1 << 63]),
        Array::I64(vec![-4]),
        Array::F32(vec![0.5, f32::INFINITY]),
        Array::F64(vec![0.1]),
        Array::Bool(vec![true, false]),
        Array::Text(["Ġa", ""].into()),
    ];
    let scalars = [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(2),
        Value::I16(-2),
        Value::U32(3),
        Value::I32(-3),
        Value::U64(4),
        Value::I64(-4),
        Value::F32(1.5),
        Value::F64(2.5),
        Value::Bool(true),
        Value::Text("ü".into()),
    ];
    let metadata: Vec<(String, Value)> = scalars
        .into_iter()
        .chain(arrays.map(Value::Array))
        .enumerate()
        .map(|(i, value)| (format!("key.{i:02}"), value))
        .collect();
    let tensors = [Planned {
        name: "t".into(),
        shape: vec![2, 32],
        element: ElementType::from(Encoding::Q8_0),
        bytes: 68,
    }];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut bytes = Vec::new();
    write_gguf(&mut bytes, &metadata, &tensors, |_, out| out.write_all(&[7; 68])).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.version(), 3);
    let found: Vec<(String, Value)> =
        file.metadata().iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    assert_eq!(found, metadata);
    let info = &file.tensors()[0];
    assert_eq!(
        (info.name.as_str(), info.shape.as_slice(), info.element.name()),
        ("t", &[2, 32][..], "Q8_0")
    );
    assert_eq!(*file.bytes(info).unwrap(), [7; 68]);
    assert!(file.architecture().unwrap_err().to_string().contains("general.architecture"));
    // The same in version 2.
    bytes[4] = 2;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(GgufFile::open(&path).unwrap().version(), 2);
    let short = write_gguf(&mut Vec::new(), &metadata, &tensors, |_, out| out.write_all(&[7; 67]));
    assert!(short.unwrap_err().to_string().contains("67"));
}
