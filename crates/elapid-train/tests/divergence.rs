//! A run that breaks down stops with the step, the first bad tensor and the last good checkpoint.

mod run;

use std::path::PathBuf;

use elapid_formats::checkpoint::Checkpoint;
use elapid_formats::hf;
use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::{DType, Sequences, Tensor};
use elapid_train::Error;
use elapid_train::config::RunConfig;
use run::*;

struct Diverged {
    step: u64,
    what: String,
    first_bad: String,
    last_good: Option<PathBuf>,
    message: String,
}

fn diverges(config: &RunConfig) -> Diverged {
    let error = run(config).unwrap_err();
    let message = error.to_string();
    let Error::Diverged { step, what, first_bad, last_good, .. } = *error else {
        panic!("{message}");
    };
    for part in [&format!("step {step}"), &what, &first_bad] {
        assert!(message.contains(part.as_str()), "{message}");
    }
    Diverged { step, what, first_bad, last_good, message }
}

fn loss(model: &LanguageModel) -> f64 {
    let text = text(3, 65);
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    let targets: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::from_slice(&ids[..64], [64]).unwrap();
    let losses = model.losses(&ids, &targets, &Sequences::fresh(&[64]), None).unwrap().0;
    losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / 64.0
}

#[test]
fn an_absurd_rate_stops_at_once() {
    let folder = Folder::new();
    let absurd = ["optimizer.lr=1e30", "schedule.kind=constant", "schedule.warmup_steps=0"];
    // Step 1 itself is sound; its update is not, which step 2 sees.
    let found = diverges(&folder.config("late", &absurd));
    assert_eq!((found.step, found.last_good), (2, None));
    assert!(found.what.contains("loss"), "{}", found.what);
    let names = ["parameter ", "activation ", "gradient "];
    assert!(names.iter().any(|name| found.first_bad.starts_with(name)), "{}", found.first_bad);
    assert!(found.first_bad.contains("backbone."), "{}", found.first_bad);
    assert!(found.message.contains("no checkpoint was saved yet"), "{}", found.message);

    // A broken model is never saved.
    let mut often = folder.config("often", &absurd);
    often.train.checkpoint_every = 1;
    let found = diverges(&often);
    assert_eq!((found.step, found.last_good), (1, None));
    assert!(found.what.contains("after the update"), "{}", found.what);
    assert!(!folder.path("often/checkpoints").exists());
    // The step was recorded, and is not in the way of a second attempt.
    assert_eq!(metrics(&folder.path("often")).len(), 1);
    often.optimizer.lr = 1e-3;
    run(&often).unwrap();
}

#[test]
fn the_last_good_checkpoint_is_kept_and_works() {
    let folder = Folder::new();
    // The rate grows until the model breaks.
    let growing = [
        "optimizer.lr=3e5",
        "schedule.kind=constant",
        "schedule.warmup_steps=999999",
        "train.steps=1000000",
    ];
    for (name, every) in [("each", 1), ("some", 2)] {
        let mut config = folder.config(name, &growing);
        config.train.checkpoint_every = every;
        let found = diverges(&config);
        let last_good = found.last_good.unwrap_or_else(|| panic!("{}", found.message));
        assert!(found.message.contains(last_good.to_str().unwrap()), "{}", found.message);
        let (steps, _) = kept(&folder.path(name));
        let newest = *steps.last().unwrap();
        assert!(newest < found.step && newest + every >= found.step - 1);
        let model = Checkpoint::open(&last_good).unwrap().load_model().unwrap();
        assert!(loss(&model).is_finite());
    }
}

/// A saved model of which one parameter is overwritten.
fn spoilt(folder: &Folder, name: &str, parameter: &str, value: f32) -> String {
    let mut model = LanguageModel::new(&MambaConfig::bytes(16, 2), 0).unwrap();
    model
        .visit(&mut |found| {
            if found.name == parameter {
                found.tensor.data_mut::<f32>()?.fill(value);
            }
            Ok(())
        })
        .unwrap();
    hf::save_model(&folder.path(name), &mut model, DType::F32).unwrap();
    format!("model.init_from={}", folder.path(name).display())
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let folder = Folder::new();
    let bad = "backbone.layers.1.mixer.dt_proj.bias";
    let from = spoilt(&folder, "model", bad, f32::NAN);
    let error = run(&folder.config("run", &[&from])).unwrap_err().to_string();
    assert!(error.contains(bad) && error.contains("NaN"), "{error}");
}

#[test]
fn the_first_activation_that_overflows_is_named() {
    let folder = Folder::new();
    let bad = "backbone.layers.1.mixer.in_proj.weight";
    let from = spoilt(&folder, "model", bad, 3e38);
    for (name, more) in [
        ("plain", "train.accumulation=1"),
        ("sum", "train.accumulation=2"),
        ("carry", "data.carry_state=true"),
    ] {
        let found = diverges(&folder.config(name, &[&from, more]));
        assert_eq!((found.step, found.last_good), (1, None));
        assert!(found.first_bad.starts_with("activation "), "{}", found.first_bad);
        assert!(found.first_bad.contains("layers.1"), "{}", found.first_bad);
    }
}

#[test]
fn an_exploding_norm_stops_and_names_the_gradient() {
    let folder = Folder::new();
    // Norms vary from batch to batch, so one is soon above its average by so little.
    let factor = "optimizer.max_grad_norm_factor=1.0001";
    // Without clipping the average alone is what is usual.
    let every = [
        "train.steps=200",
        "train.checkpoint_every=10",
        "train.keep_best=false",
        "optimizer.clip_norm=0",
        factor,
    ];
    let config = folder.config("run", &every);
    let found = diverges(&config);
    // Twenty norms are seen before any is judged.
    assert!(found.step > 20, "{}", found.step);
    assert!(
        found.what.contains("gradient norm") && found.what.contains("1.0001"),
        "{}",
        found.what
    );
    assert!(found.first_bad.contains("gradient of backbone."), "{}", found.first_bad);
    let last = (found.step - 1) / 10 * 10;
    let last_good = found.last_good.unwrap();
    assert!(last_good.ends_with(format!("step-{last:08}")), "{}", found.message);
    // It stops there again when resumed: the average is part of a checkpoint.
    let error = resume(&config).unwrap_err().to_string();
    assert!(
        error.contains(&format!("step {}", found.step)) && error.contains(&found.what),
        "{error}"
    );
    // 0 never stops.
    let never = ["train.steps=30", "optimizer.max_grad_norm_factor=0"];
    assert_eq!(run(&folder.config("never", &never)).unwrap().step, 30);
}
