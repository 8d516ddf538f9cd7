//! One optimizer step.

mod run;

use elapid_data::Batch;
use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::rng::Rng;
use elapid_tensor::{Sequences, Tensor};
use elapid_train::Error;
use elapid_train::config::OptimizerConfig;
use elapid_train::metrics::{Record, jsonl::read_metrics};
use elapid_train::optimizer::AdamW;
use elapid_train::trainer::{NormWatch, StepReport, train_step};
use proptest::prelude::*;
use run::Folder;

fn batch(rng: &mut Rng, lengths: &[usize]) -> Batch {
    let tokens: usize = lengths.iter().sum();
    let mut token = || rng.below(256) as u32;
    let ids: Vec<u32> = (0..tokens).map(|_| token()).collect();
    // Some places predict nothing.
    let targets: Vec<i64> =
        (0..tokens).map(|t| if t % 5 == 3 { -100 } else { i64::from(token()) }).collect();
    let predicted = targets.iter().filter(|&&target| target >= 0).count();
    Batch { ids, targets, sequences: Sequences::fresh(lengths), real_tokens: tokens, predicted }
}

/// Two batches as one.
fn joined(a: &Batch, b: &Batch) -> Batch {
    let lengths: Vec<usize> =
        a.sequences.iter().chain(&b.sequences).map(|sequence| sequence.len).collect();
    Batch {
        ids: [&a.ids[..], &b.ids].concat(),
        targets: [&a.targets[..], &b.targets].concat(),
        sequences: Sequences::fresh(&lengths),
        real_tokens: a.real_tokens + b.real_tokens,
        predicted: a.predicted + b.predicted,
    }
}

struct Stepped {
    report: StepReport,
    optimizer: AdamW,
}

fn step(config: &OptimizerConfig, batches: &[Batch]) -> Stepped {
    let mut model = LanguageModel::new(&MambaConfig::bytes(16, 2), 7).unwrap();
    let mut optimizer = AdamW::new(config, &mut model).unwrap();
    let mut watch = NormWatch::default();
    let report =
        train_step(&mut model, &mut optimizer, config, &mut watch, batches, None, 1e-3).unwrap();
    assert_eq!((watch.seen, watch.average), (1, report.grad_norm));
    Stepped { report, optimizer }
}

/// Σ loss and number of predicted tokens.
fn losses(model: &LanguageModel, batch: &Batch) -> (f64, f64) {
    let ids = Tensor::from_slice(&batch.ids, [batch.ids.len()]).unwrap();
    let losses = model.losses(&ids, &batch.targets, &batch.sequences, None).unwrap().0;
    (losses.iter().map(|&loss| f64::from(loss)).sum(), batch.predicted as f64)
}

/// Every moment as numbers.
fn moments(optimizer: &AdamW) -> Vec<(String, Vec<f32>)> {
    let tensors = optimizer.tensors().into_iter();
    tensors.map(|(name, tensor)| (name, tensor.to_vec().unwrap())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn accumulation_is_one_larger_batch(
        seed in any::<u64>(),
        a in prop::collection::vec(1usize..30, 1..5),
        b in prop::collection::vec(1usize..30, 1..5),
    ) {
        let mut rng = Rng::new(seed, 0);
        let (a, b) = (batch(&mut rng, &a), batch(&mut rng, &b));
        let both = joined(&a, &b);
        let config = OptimizerConfig::default();
        let parts = step(&config, &[a.clone(), b.clone()]);
        let whole = step(&config, std::slice::from_ref(&both));

        prop_assert_eq!(parts.report.tokens, whole.report.tokens);
        prop_assert_eq!(parts.report.predicted, whole.report.predicted);
        // The mean over tokens, not the mean of the batches' means.
        let fresh = LanguageModel::new(&MambaConfig::bytes(16, 2), 7).unwrap();
        let ((sum_a, n_a), (sum_b, n_b)) = (losses(&fresh, &a), losses(&fresh, &b));
        prop_assert!((parts.report.loss - (sum_a + sum_b) / (n_a + n_b)).abs() < 1e-5);
        prop_assert!((parts.report.loss - whole.report.loss).abs() < 1e-5);
        let norms = (parts.report.grad_norm, whole.report.grad_norm);
        prop_assert!((norms.0 / norms.1 - 1.0).abs() < 1e-4, "{:?}", norms);
        for ((name, a), (_, b)) in moments(&parts.optimizer).iter().zip(moments(&whole.optimizer)) {
            let largest = b.iter().fold(0f32, |most, value| most.max(value.abs()));
            for (a, b) in a.iter().zip(&b) {
                prop_assert!((a - b).abs() <= 1e-4 * largest + 1e-12, "{}: {} {}", name, a, b);
            }
        }
    }
}

#[test]
fn the_first_loss_is_that_of_guessing() {
    let mut rng = Rng::new(1, 0);
    let batch = batch(&mut rng, &[100; 20]);
    let report = step(&OptimizerConfig::default(), &[batch]).report;
    assert!((report.loss - 256f64.ln()).abs() < 0.02, "{}", report.loss);
    assert!(report.grad_norm > 0.0);
}

#[test]
fn clipping_scales_the_gradient_to_the_norm() {
    let mut rng = Rng::new(2, 0);
    let batch = batch(&mut rng, &[40, 9]);
    let with = |clip_norm| {
        step(&OptimizerConfig { clip_norm, ..Default::default() }, std::slice::from_ref(&batch))
    };
    let free = with(0.0);
    let norm = free.report.grad_norm;
    let clipped = with(norm / 4.0);
    assert_eq!(clipped.report.grad_norm, norm, "the norm is that before clipping");
    let (free_moments, clipped_moments) = (moments(&free.optimizer), moments(&clipped.optimizer));
    let mut sum = 0.0;
    for ((name, free), (_, clipped)) in free_moments.iter().zip(&clipped_moments) {
        let factor = if name.starts_with("exp_avg_sq.") { 16.0 } else { 4.0 };
        for (&free, &clipped) in free.iter().zip(clipped) {
            assert!((free - factor * clipped).abs() <= 1e-5 * free.abs(), "{name}");
            if factor == 4.0 {
                sum += f64::from(clipped).powi(2);
            }
        }
    }
    // exp_avg = (1 - beta1) g after one step.
    assert!((sum.sqrt() / 0.1 / (norm / 4.0) - 1.0).abs() < 1e-4);
    assert_eq!(
        moments(&with(2.0 * norm).optimizer),
        free_moments,
        "a short gradient is left alone"
    );
}

#[test]
fn the_recurrence_has_a_rate_of_its_own() {
    let mut rng = Rng::new(4, 0);
    let batch = batch(&mut rng, &[40, 9]);
    let values = |model: &mut LanguageModel| {
        let mut found = Vec::new();
        model
            .visit(&mut |parameter| {
                found.push((parameter.name, parameter.tensor.to_f64_vec()?));
                Ok(())
            })
            .unwrap();
        found
    };
    let stepped = |recurrence_lr_factor| {
        let config = OptimizerConfig { recurrence_lr_factor, ..Default::default() };
        let mut model = LanguageModel::new(&MambaConfig::bytes(16, 2), 7).unwrap();
        let mut optimizer = AdamW::new(&config, &mut model).unwrap();
        let batches = std::slice::from_ref(&batch);
        let mut watch = NormWatch::default();
        train_step(&mut model, &mut optimizer, &config, &mut watch, batches, None, 1e-3).unwrap();
        values(&mut model)
    };
    let before = values(&mut LanguageModel::new(&MambaConfig::bytes(16, 2), 7).unwrap());
    let (usual, fast) = (stepped(1.0), stepped(8.0));
    let mut faster = Vec::new();
    for (((name, before), (_, usual)), (_, fast)) in before.iter().zip(&usual).zip(&fast) {
        if usual == fast {
            assert_ne!(before, usual, "{name}");
            continue;
        }
        let moved = |after: &[f64]| -> Vec<f64> {
            before.iter().zip(after).map(|(before, after)| after - before).collect()
        };
        for (usual, fast) in moved(usual).into_iter().zip(moved(fast)) {
            // Values near 7 are rounded to multiples of 5e-7, eight times over.
            assert!((fast - 8.0 * usual).abs() < 1e-5, "{name}: {usual} {fast}");
        }
        faster.push(name.as_str());
    }
    let expected = ["A_log", "dt_proj.weight", "dt_proj.bias"];
    let expected: Vec<String> = (0..2)
        .flat_map(|i| expected.map(|field| format!("backbone.layers.{i}.mixer.{field}")))
        .collect();
    assert_eq!(faster, expected);
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let mut rng = Rng::new(3, 0);
    let batch = batch(&mut rng, &[20]);
    // Without clipping the average alone is what is usual.
    let config = OptimizerConfig { clip_norm: 0.0, ..OptimizerConfig::default() };
    let mut model = LanguageModel::new(&MambaConfig::bytes(16, 2), 7).unwrap();
    let mut optimizer = AdamW::new(&config, &mut model).unwrap();
    // Norms a million times smaller than what comes now.
    let mut watch = NormWatch { average: 1e-6, seen: 20 };
    let before = losses(&model, &batch);
    let mut step = |watch: &mut NormWatch| {
        let batches = std::slice::from_ref(&batch);
        train_step(&mut model, &mut optimizer, &config, watch, batches, None, 1e-3)
            .map_err(Box::new)
    };
    let error = step(&mut watch).unwrap_err();
    assert!(matches!(*error, Error::Diverged { step: 1, .. }), "{error}");
    assert_eq!((watch.seen, watch.average), (20, 1e-6));
    // Nineteen are too few to judge by.
    let mut early = NormWatch { average: 1e-6, seen: 19 };
    assert_eq!(losses(&LanguageModel::new(&MambaConfig::bytes(16, 2), 7).unwrap(), &batch), before);
    step(&mut early).unwrap();
    assert_eq!(optimizer.steps(), 1);
    assert_ne!(losses(&model, &batch), before);
}

#[test]
fn training_learns_and_tells_the_truth() {
    let folder = Folder::new();
    let overrides = ["train.steps=60", "optimizer.lr=0.01", "train.batch_size=8", "log.every=7"];
    let config = folder.config("run", &overrides);
    let outcome = run::run(&config).unwrap();
    let bits = outcome.evaluation.unwrap().loss / std::f64::consts::LN_2;
    assert!(bits < 4.5, "{bits} bits per byte of ten words");
    let records = read_metrics(folder.path("run/metrics.jsonl")).unwrap();
    let trained: Vec<_> = records
        .iter()
        .filter_map(|record| match record {
            Record::Train(record) => Some(record),
            Record::Validation(_) => None,
        })
        .collect();
    let steps: Vec<u64> = trained.iter().map(|record| record.step).collect();
    assert_eq!(steps, [1, 7, 14, 21, 28, 35, 42, 49, 56, 60]);
    assert!(trained[0].loss > 5.0 && trained[9].loss < 3.5);
    for record in &trained {
        assert!((0.0..0.3).contains(&record.padding_rate), "{}", record.padding_rate);
        assert!(record.lr > 0.0 && record.grad_norm > 0.0 && record.tokens_per_s > 0.0);
        let bits = record.bits_per_byte.unwrap();
        assert!((bits - record.loss / std::f64::consts::LN_2).abs() < 1e-12);
    }
    assert_eq!(trained[9].tokens, outcome.tokens);
    // A task of equal samples leaves no place empty.
    let task = [
        "data.synthetic.task=selective-copying",
        "data.synthetic.length=16",
        "data.synthetic.memorize=3",
    ];
    for task in [&task[..], &["data.synthetic.task=induction-heads", "data.synthetic.length=16"]] {
        let name = task[0].rsplit('=').next().unwrap();
        run::run(&folder.config(name, task)).unwrap();
        for record in read_metrics(folder.path(name).join("metrics.jsonl")).unwrap() {
            if let Record::Train(record) = record {
                assert_eq!((record.padding_rate, record.bits_per_byte), (0.0, None));
            }
        }
    }
}
