//! The check of a model where it runs: sound models pass, damaged weights and wrong kernels are named.

use std::path::Path;

use elapid_formats::ModelSource;
use elapid_infer::{Error, Rows, SelfCheck};
use elapid_models::{LanguageModel, MambaConfig, NormKind};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Tensor};

/// Random small models with and without biases, tied or not, with either norm, with norms inside the mixer.
fn models() -> Vec<LanguageModel> {
    let plain = MambaConfig::bytes(24, 2);
    let other = MambaConfig {
        bias: true,
        norm: NormKind::Layer,
        tie_embeddings: false,
        dt_rank: Some(3),
        ..plain.clone()
    };
    let falcon = MambaConfig { mixer_rms_eps: Some(1e-6), ..plain.clone() };
    [plain, other, falcon].iter().map(|config| LanguageModel::new(config, 3).unwrap()).collect()
}

fn names(model: &mut LanguageModel) -> Vec<String> {
    let mut names = Vec::new();
    model
        .visit(&mut |parameter| {
            names.push(parameter.name);
            Ok(())
        })
        .unwrap();
    names
}

/// Changes one value of a weight.
fn change(model: &mut LanguageModel, name: &str, index: usize, new: impl Fn(f32) -> f32) {
    model
        .visit(&mut |parameter| {
            if parameter.name == name {
                let mut values = parameter.tensor.to_vec::<f32>()?;
                let index = index % values.len();
                values[index] = new(values[index]);
                *parameter.tensor = Tensor::from_slice(&values, parameter.tensor.shape())?;
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn sound_models_pass() {
    for mut model in models() {
        let check = SelfCheck::of(&mut model).unwrap();
        let all = check.check(&mut model, Rows::All).unwrap();
        let some = check.check(&mut model, Rows::Sampled(2)).unwrap();
        assert!(some.values > 0 && some.values < all.values, "{some:?} {all:?}");
        assert!(all.worst < 1.0, "{all:?}");
    }
}

#[test]
fn a_flipped_bit_in_any_weight_is_named() {
    for mut model in models() {
        let check = SelfCheck::of(&mut model).unwrap();
        for name in names(&mut model) {
            // The row of a token that is read, and the highest bit of the exponent.
            let index = if name.contains("embeddings") { 127 * 24 } else { 5 };
            let flip = |value: f32| f32::from_bits(value.to_bits() ^ (1 << 30));
            change(&mut model, &name, index, flip);
            match check.check(&mut model, Rows::All) {
                Err(Error::SelfCheck { tensor, .. }) => assert_eq!(tensor, name),
                other => panic!("{name}: {other:?}"),
            }
            change(&mut model, &name, index, flip);
            check.check(&mut model, Rows::All).unwrap();
        }
    }
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    for mut model in models() {
        for name in names(&mut model) {
            let check = SelfCheck::of(&mut model).unwrap();
            let index = if name.contains("embeddings") { 127 * 24 } else { 3 };
            let mut before = f32::NAN;
            model
                .visit(&mut |parameter| {
                    if parameter.name == name {
                        let values = parameter.tensor.to_vec::<f32>()?;
                        before = values[index % values.len()];
                    }
                    Ok(())
                })
                .unwrap();
            change(&mut model, &name, index, |_| f32::NAN);
            let error = check.check(&mut model, Rows::All).unwrap_err();
            assert!(
                matches!(&error, Error::SelfCheck { tensor, .. } if *tensor == name),
                "{name}: {error}"
            );
            change(&mut model, &name, index, |_| before);
        }
    }
}

#[test]
fn a_wrong_kernel_is_found_in_a_sample_of_rows() {
    for mut model in models() {
        let check = SelfCheck::of(&mut model).unwrap();
        let trace = check.trace(&model).unwrap();
        check.compare(&trace, DType::F32, Rows::AT_LOAD).unwrap();
        for (activation, values) in &trace {
            // As if its kernel gave results a thousandth too large.
            let mut wrong = trace.clone();
            wrong.insert(activation.clone(), values.iter().map(|value| value * 1.001).collect());
            match check.compare(&wrong, DType::F32, Rows::AT_LOAD) {
                Err(Error::SelfCheck { place, .. }) => {
                    assert!(place.starts_with(activation.as_str()), "{place} is not {activation}");
                }
                other => panic!("{activation}: {other:?}"),
            }
        }
    }
}

#[test]
fn the_check_at_load_looks_at_a_small_part() {
    let config = MambaConfig { vocab_size: 2000, ..MambaConfig::bytes(256, 6) };
    let mut model = LanguageModel::new(&config, 1).unwrap();
    let check = SelfCheck::of(&mut model).unwrap();
    let few = check.check(&mut model, Rows::AT_LOAD).unwrap().values;
    let all = check.check(&mut model, Rows::All).unwrap().values;
    // The residual stream and its norm whole, of each of six kernels eight rows, each for four tokens; and the ends.
    let ends = 4 * (2 * 256 + 8);
    assert!(few <= 6 * 4 * (2 * 256 + 6 * 8) + ends, "{few}");
    assert!(few * 5 < all && few * 100 < config.parameter_count(), "{few} of {all}");
}

#[test]
fn models_on_a_gpu_are_checked_against_their_files() {
    let gpu = match Gpu::emulated() {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("SKIPPED: models against their files on the emulated GPU: {error}");
            return;
        }
    };
    let device = Device::Cuda(gpu.id());
    for folder in ["mamba1/original", "mamba1/hf_bf16", "falcon_mamba/hf"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../elapid-formats/tests/fixtures/golden")
            .join(folder);
        let source = ModelSource::open(&path).unwrap();
        let (mut model, mut host) = (source.load_on(device).unwrap(), source.load().unwrap());
        // What goes there one by one is what a whole model becomes.
        let mut expected = Vec::new();
        host.visit(&mut |parameter| {
            expected.push((parameter.name, parameter.tensor.to_vec::<f32>()?));
            Ok(())
        })
        .unwrap();
        let mut expected = expected.into_iter();
        model
            .visit(&mut |parameter| {
                assert_eq!(parameter.tensor.device(), device);
                let own = parameter.tensor.to_vec::<f32>()?;
                assert_eq!(Some((parameter.name, own)), expected.next());
                Ok(())
            })
            .unwrap();
        let check = SelfCheck::of_source(&source);
        let all = check.check(&mut model, Rows::All).unwrap();
        let of_host = SelfCheck::of(&mut host).unwrap().check(&mut host, Rows::All).unwrap();
        assert_eq!(all.values, of_host.values);
        let name = "backbone.layers.1.mixer.x_proj.weight";
        model
            .visit(&mut |parameter| {
                if parameter.name == name {
                    let mut values = parameter.tensor.to_vec::<f32>()?;
                    values[5] += 3.0;
                    let changed = Tensor::from_slice(&values, parameter.tensor.shape())?;
                    *parameter.tensor = changed.to(device)?;
                }
                Ok(())
            })
            .unwrap();
        match check.check(&mut model, Rows::All) {
            Err(Error::SelfCheck { tensor, .. }) => assert_eq!(tensor, name),
            other => panic!("{folder}: {other:?}"),
        }
    }
}
