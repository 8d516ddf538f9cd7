//! Tiny runs in fresh folders, and what is left of them to compare.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use elapid_tensor::rng::Rng;
use elapid_train::config::RunConfig;
use elapid_train::trainer::{Hooks, Outcome, Trainer};
use elapid_train::{Dataset, Error};
use serde_json::Value;

/// Words in sentences, the same for the same seed.
pub fn text(seed: u64, bytes: usize) -> String {
    let words = ["state", "space", "scan", "a", "the", "of", "model", "long", "reads", "forgets"];
    let mut rng = Rng::new(seed, 0);
    let mut text = String::new();
    while text.len() < bytes {
        text += words[rng.below(words.len() as u64) as usize];
        text += if rng.below(8) == 0 { ".\n" } else { " " };
    }
    text.truncate(bytes);
    text
}

/// A fresh folder with the data of runs.
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// Twelve documents of 40 to 1,200 bytes in `text/`.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("text")).unwrap();
        for i in 0..12 {
            let name = folder.path().join(format!("text/{i}.txt"));
            std::fs::write(name, text(i, 40 + (i as usize * 457) % 1160)).unwrap();
        }
        Self(folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A run of nine steps in `name`.
    pub fn config(&self, name: &str, overrides: &[&str]) -> RunConfig {
        let toml = format!(
            r#"
            [model]
            d_model = 16
            n_layer = 2
            [data]
            paths = [{:?}]
            context = 32
            validation_fraction = 0.2
            [train]
            steps = 9
            batch_size = 3
            validation_every = 4
            validation_tokens = 300
            checkpoint_every = 0
            out = {:?}
            [optimizer]
            lr = 5e-3
            [schedule]
            warmup_steps = 2
            [log]
            progress = "quiet"
            "#,
            self.path("text"),
            self.path(name)
        );
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        RunConfig::parse(&toml, None, &overrides).unwrap()
    }
}

/// A run to its end.
pub fn run(config: &RunConfig) -> Result<Outcome, Box<Error>> {
    let dataset = Dataset::open(config)?;
    Ok(Trainer::start(config.clone(), dataset)?.run(&mut Hooks::default())?)
}

/// Goes on with a run to its end; warnings are collected.
pub fn resume(config: &RunConfig) -> Result<(Outcome, Vec<String>), Box<Error>> {
    let mut warnings = Vec::new();
    let mut warn = |warning: &str| warnings.push(warning.to_string());
    let mut trainer = Trainer::resume(config.clone(), Dataset::open(config)?, &mut warn)?;
    Ok((trainer.run(&mut Hooks::default())?, warnings))
}

/// Starts or goes on with a run, and tells it to stop during each step that `stops` accepts, until it is done.
/// Returns the number of parts.
pub fn run_in_parts(config: &RunConfig, stops: impl Fn(u64) -> bool) -> usize {
    let mut config = config.clone();
    // The sample hook is called in every step.
    config.train.sample_every = 1;
    for part in 1..100 {
        let dataset = Dataset::open(&config).unwrap();
        let mut trainer = match part {
            1 => Trainer::start(config.clone(), dataset).unwrap(),
            _ => Trainer::resume(config.clone(), dataset, &mut |w| panic!("{w}")).unwrap(),
        };
        let (mut step, steps) = trainer.steps();
        let stop = AtomicBool::new(false);
        let mut hooks = Hooks {
            stop: Some(&stop),
            sample: Some(Box::new(|_, _| {
                step += 1;
                stop.store(stops(step), Ordering::Relaxed);
                String::new()
            })),
            ..Hooks::default()
        };
        let outcome = trainer.run(&mut hooks).unwrap();
        drop(hooks);
        assert_eq!(outcome.interrupted, outcome.step < steps);
        assert_eq!(outcome.step, step);
        if !outcome.interrupted {
            return part;
        }
    }
    panic!("it never ends");
}

/// The files of the newest checkpoint that must not depend on how the run was cut.
pub fn newest_bits(out: &Path) -> Vec<(String, Vec<u8>)> {
    let folder = checkpoints(out).pop().unwrap();
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    assert!(files.len() >= 2);
    files
}

/// What the newest checkpoint keeps beside tensors, without the time taken.
pub fn newest_figures(out: &Path) -> Value {
    let path = checkpoints(out).pop().unwrap().join("training.json");
    let mut all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut meta = all["meta"].take();
    assert!(meta.as_object_mut().unwrap().remove("seconds").is_some());
    meta
}

/// Folders of the checkpoints, oldest first.
pub fn checkpoints(out: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(out.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
}

/// Names of the checkpoints, and what `best` says.
pub fn kept(out: &Path) -> (Vec<u64>, Option<u64>) {
    let step = |name: &str| name.trim().strip_prefix("step-").unwrap().parse().unwrap();
    let steps = checkpoints(out)
        .iter()
        .map(|path| step(path.file_name().unwrap().to_str().unwrap()))
        .collect();
    let best = std::fs::read_to_string(out.join("checkpoints/best")).ok();
    (steps, best.map(|text| step(&text)))
}

/// The records, without what a clock or the system's memory says.
pub fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            let fields = record.as_object_mut().unwrap();
            for timing in ["tokens_per_s", "time_s", "memory_bytes"] {
                fields.remove(timing);
            }
            record
        })
        .collect()
}

/// Asserts that two runs ended with the same bits and told the same.
#[track_caller]
pub fn assert_equal(a: &Path, b: &Path) {
    assert_eq!(metrics(a), metrics(b));
    assert_eq!(newest_figures(a), newest_figures(b));
    let (a, b) = (newest_bits(a), newest_bits(b));
    for ((name, a), (other, b)) in a.iter().zip(&b) {
        assert_eq!(name, other);
        assert!(a == b, "{name} differs");
    }
    assert_eq!(a.len(), b.len());
}
