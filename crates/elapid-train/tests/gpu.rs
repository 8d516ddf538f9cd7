//! Training steps on the emulated GPU and, where there is one, on the card, against the host.

use elapid_data::Batch;
use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequences};
use elapid_train::config::OptimizerConfig;
use elapid_train::optimizer::AdamW;
use elapid_train::trainer::{NormWatch, StepReport, train_step};

fn devices() -> Vec<Device> {
    [("emulation", Gpu::emulated()), ("card", Gpu::open(0))]
        .into_iter()
        .filter_map(|(what, gpu)| {
            let gpu =
                gpu.inspect_err(|error| eprintln!("SKIPPED: training on the {what}: {error}"));
            Some(Device::Cuda(gpu.ok()?.id()))
        })
        .collect()
}

fn batch(seed: u64, lengths: &[usize]) -> Batch {
    let tokens: usize = lengths.iter().sum();
    let draw = |t: u64| (t.wrapping_mul(seed.wrapping_mul(2_654_435_761) + 12_345) >> 7) % 61;
    let ids: Vec<u32> = (0..tokens as u64).map(|t| draw(t) as u32).collect();
    let mut targets: Vec<i64> = (0..tokens as u64).map(|t| draw(t + 1) as i64).collect();
    targets[0] = -100;
    Batch {
        ids,
        targets,
        sequences: Sequences::fresh(lengths),
        real_tokens: tokens,
        predicted: tokens - 1,
    }
}

struct Run {
    reports: Vec<StepReport>,
    parameters: Vec<(String, Vec<f32>)>,
}

fn config() -> MambaConfig {
    MambaConfig { d_state: 8, vocab_size: 61, ..MambaConfig::bytes(16, 2) }
}

fn run(device: Device, compute: DType, steps: &[Vec<Batch>]) -> Run {
    let mut model = LanguageModel::new(&config(), 3).unwrap();
    model.place(device, compute).unwrap();
    let options =
        OptimizerConfig { clip_norm: 0.5, recurrence_lr_factor: 3.0, ..Default::default() };
    let mut optimizer = AdamW::new(&options, &mut model).unwrap();
    let mut watch = NormWatch::default();
    let mut step = |batches: &[Batch]| {
        train_step(&mut model, &mut optimizer, &options, &mut watch, batches, None, 1e-3).unwrap()
    };
    let reports = steps.iter().map(|batches| step(batches)).collect();
    let mut parameters = Vec::new();
    model
        .visit(&mut |parameter| {
            parameters.push((parameter.name, parameter.tensor.to_vec::<f32>()?));
            Ok(())
        })
        .unwrap();
    Run { reports, parameters }
}

/// The largest difference of losses, and of parameters.
fn difference(a: &Run, b: &Run) -> (f64, f64) {
    let losses = a.reports.iter().zip(&b.reports).map(|(a, b)| (a.loss - b.loss).abs());
    let values = a.parameters.iter().zip(&b.parameters);
    let values = values.flat_map(|((_, a), (_, b))| a.iter().zip(b));
    (losses.fold(0.0, f64::max), values.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max))
}

#[test]
fn steps_agree_with_the_host() {
    // Alike batches are recorded on the second step; the fifth is cut otherwise.
    let alike: Vec<Vec<Batch>> = (1..5).map(|seed| vec![batch(seed, &[9, 20])]).collect();
    let steps: Vec<Vec<Batch>> =
        alike.iter().cloned().chain([vec![batch(7, &[30, 3])], vec![batch(8, &[9, 20])]]).collect();
    let host = run(Device::Cpu, DType::F32, &steps);
    for device in devices() {
        let there = run(device, DType::F32, &steps);
        let (losses, parameters) = difference(&there, &host);
        assert!(losses < 2e-5, "{device}: losses differ by {losses}");
        assert!(parameters < 2e-4, "{device}: parameters differ by {parameters}");
        let norms = there.reports.iter().zip(&host.reports);
        for (there, host) in norms {
            assert!((there.grad_norm / host.grad_norm - 1.0).abs() < 1e-4);
            assert_eq!((there.tokens, there.predicted), (host.tokens, host.predicted));
        }
    }
}

#[test]
fn steps_in_bf16_stay_close_and_repeat_bit_for_bit() {
    let steps: Vec<Vec<Batch>> = (1..5).map(|seed| vec![batch(seed, &[14, 14])]).collect();
    let host = run(Device::Cpu, DType::F32, &steps);
    for device in devices() {
        let there = run(device, DType::BF16, &steps);
        let (losses, _) = difference(&there, &host);
        assert!(losses < 2e-2, "{device}: losses differ by {losses}");
        let again = run(device, DType::BF16, &steps);
        assert!(there.parameters == again.parameters, "{device}: the same run, other bits");
    }
}

#[test]
fn accumulated_batches_are_recorded_too() {
    let steps: Vec<Vec<Batch>> =
        (1..4).map(|seed| vec![batch(seed, &[8]), batch(seed + 9, &[5, 6])]).collect();
    let host = run(Device::Cpu, DType::F32, &steps);
    for device in devices() {
        let (losses, parameters) = difference(&run(device, DType::F32, &steps), &host);
        assert!(losses < 2e-5 && parameters < 2e-4, "{device}: {losses} {parameters}");
    }
}

#[test]
fn a_step_that_breaks_leaves_the_model_alone() {
    for device in devices() {
        let mut model = LanguageModel::new(&config(), 3).unwrap();
        model
            .visit(&mut |parameter| {
                if parameter.name.ends_with("layers.1.mixer.D") {
                    parameter.tensor.data_mut::<f32>()?.fill(f32::NAN);
                }
                Ok(())
            })
            .unwrap();
        model.place(device, DType::F32).unwrap();
        let options = OptimizerConfig::default();
        let mut optimizer = AdamW::new(&options, &mut model).unwrap();
        let mut watch = NormWatch::default();
        let batches = [batch(1, &[12])];
        let error =
            train_step(&mut model, &mut optimizer, &options, &mut watch, &batches, None, 1e-3)
                .unwrap_err();
        assert!(error.to_string().contains("parameter backbone.layers.1.mixer.D"), "{error}");
        assert_eq!(optimizer.steps(), 0);
        let mut changed = false;
        let untouched = LanguageModel::new(&config(), 3).unwrap();
        let mut expected = Vec::new();
        let mut untouched = untouched;
        untouched
            .visit(&mut |parameter| {
                expected.push(parameter.tensor.to_vec::<f32>()?);
                Ok(())
            })
            .unwrap();
        let mut expected = expected.into_iter();
        model
            .visit(&mut |parameter| {
                let own = parameter.tensor.to_vec::<f32>()?;
                let bad = parameter.name.ends_with("layers.1.mixer.D");
                changed |= expected.next().is_none_or(|e| e != own) && !bad;
                Ok(())
            })
            .unwrap();
        assert!(!changed, "{device}: a parameter changed");
    }
}
