//! A run that is stopped and resumed ends with the bits of one that was not.

mod run;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use elapid_train::Dataset;
use elapid_train::trainer::{Hooks, Trainer};
use run::*;

/// One run at a stretch, one stopped after steps 1, 4, 5 and 8, one that lost its newest checkpoints.
fn check(overrides: &[&str]) {
    let folder = Folder::new();
    let config = |name| folder.config(name, overrides);
    run(&config("whole")).unwrap();
    let records = metrics(&folder.path("whole"));
    assert!(records.iter().all(|record| record["loss"].as_f64().is_some_and(f64::is_finite)));
    assert_eq!(records.iter().filter(|record| record["kind"] == "train").count(), 9);
    assert_eq!(records.iter().filter(|record| record["kind"] == "validation").count(), 3);

    let parts = run_in_parts(&config("parts"), |step| [1, 4, 5, 8].contains(&step));
    assert_eq!(parts, 5);
    assert_equal(&folder.path("parts"), &folder.path("whole"));

    // As after a crash: records of steps that no checkpoint knows of, and half a line.
    let lost = folder.path("lost");
    let mut often = config("lost");
    often.train.checkpoint_every = 3;
    run(&often).unwrap();
    fs::remove_dir_all(checkpoints(&lost).pop().unwrap()).unwrap();
    let mut records = fs::read_to_string(lost.join("metrics.jsonl")).unwrap();
    records.truncate(records.len() - 20);
    fs::write(lost.join("metrics.jsonl"), records).unwrap();
    let (outcome, warnings) = resume(&often).unwrap();
    assert_eq!((outcome.step, outcome.interrupted, warnings.len()), (9, false, 0));
    assert_equal(&lost, &folder.path("whole"));

    // The same seed again, and another.
    run(&config("again")).unwrap();
    assert_equal(&folder.path("again"), &folder.path("whole"));
    let mut other = config("other");
    other.train.seed = 1;
    run(&other).unwrap();
    assert_ne!(newest_bits(&folder.path("other")), newest_bits(&folder.path("whole")));
}

#[test]
fn plain() {
    check(&[]);
}

#[test]
fn stopped_in_the_middle_of_a_validation() {
    let folder = Folder::new();
    run(&folder.config("whole", &[])).unwrap();
    let config = folder.config("parts", &[]);
    // Told to stop, a run makes a step; validations are at 4, 8 and, being the last step, 9.
    let part = |told: bool| {
        let dataset = Dataset::open(&config).unwrap();
        let mut trainer = match config.train.out.exists() {
            false => Trainer::start(config.clone(), dataset).unwrap(),
            true => Trainer::resume(config.clone(), dataset, &mut |w| panic!("{w}")).unwrap(),
        };
        let stop = AtomicBool::new(told);
        let outcome = trainer.run(&mut Hooks { stop: Some(&stop), ..Hooks::default() }).unwrap();
        let records = metrics(&config.train.out);
        let validations = records.iter().filter(|record| record["kind"] == "validation").count();
        (outcome.step, outcome.interrupted, validations)
    };
    for step in 1..=4 {
        assert_eq!(part(true), (step, true, 0));
    }
    // The validation is due, and put off again.
    assert_eq!(part(true), (4, true, 0));
    let mut longer = config.clone();
    longer.train.sample_every = 1;
    // Goes on with the validation, and up to step 8, whose sample tells it to stop.
    let stop = AtomicBool::new(false);
    let mut step = 4;
    let mut hooks = Hooks {
        stop: Some(&stop),
        sample: Some(Box::new(|_, _| {
            step += 1;
            stop.store(step == 8, Ordering::Relaxed);
            String::new()
        })),
        ..Hooks::default()
    };
    let dataset = Dataset::open(&longer).unwrap();
    let mut trainer = Trainer::resume(longer, dataset, &mut |w| panic!("{w}")).unwrap();
    assert_eq!(trainer.run(&mut hooks).unwrap().step, 8);
    drop(hooks);
    assert_eq!(part(true), (9, true, 2));
    assert_eq!(part(false), (9, false, 3));
    assert_equal(&folder.path("parts"), &folder.path("whole"));
}

#[test]
fn with_accumulation() {
    check(&["train.accumulation=2"]);
}

#[test]
fn with_carried_states() {
    check(&["data.carry_state=true"]);
    check(&["data.carry_state=true", "train.accumulation=2"]);
}

#[test]
fn with_greedy_packing() {
    check(&["data.packing=greedy", "data.packing_window=5", "train.batch_tokens=80"]);
}

#[test]
fn with_a_synthetic_task() {
    check(&[
        "data.synthetic.task=induction-heads",
        "data.synthetic.length=16",
        "data.synthetic.eval_lengths=[8, 32]",
        "data.synthetic.eval_samples=5",
        "model.vocab_size=16",
    ]);
}

#[test]
fn threads_do_not_change_bits() {
    let folder = Folder::new();
    for threads in [1, 2, 3] {
        let config = folder.config(&threads.to_string(), &["train.accumulation=2"]);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&config)).unwrap();
        assert_equal(&folder.path(&threads.to_string()), &folder.path("1"));
    }
}

#[test]
fn a_longer_run_is_a_shorter_one_resumed() {
    let folder = Folder::new();
    let constant = |name, steps| folder.config(name, &["schedule.kind=constant", steps]);
    run(&constant("long", "train.steps=9")).unwrap();
    run(&constant("grown", "train.steps=5")).unwrap();
    let (outcome, _) = resume(&constant("grown", "train.steps=9")).unwrap();
    assert_eq!(outcome.step, 9);
    assert_eq!(newest_bits(&folder.path("grown")), newest_bits(&folder.path("long")));
    let text = fs::read_to_string(folder.path("grown/config.toml")).unwrap();
    assert!(text.contains("steps = 9"), "{text}");

    // There is nothing left to do, and nothing is touched.
    let before = newest_figures(&folder.path("grown"));
    let (outcome, _) = resume(&constant("grown", "train.steps=7")).unwrap();
    assert_eq!((outcome.step, outcome.interrupted), (9, false));
    assert!(outcome.evaluation.is_some() && outcome.checkpoint.is_some());
    assert_eq!(newest_figures(&folder.path("grown")), before);
    assert_eq!(fs::read_to_string(folder.path("grown/config.toml")).unwrap(), text);
}

#[test]
fn the_last_and_the_best_checkpoints_stay() {
    let folder = Folder::new();
    let config = folder.config("run", &["train.checkpoint_every=1", "train.keep_last=3"]);
    run(&config).unwrap();
    let validations: Vec<(u64, f64)> = metrics(&folder.path("run"))
        .iter()
        .filter(|record| record["kind"] == "validation")
        .map(|record| (record["step"].as_u64().unwrap(), record["loss"].as_f64().unwrap()))
        .collect();
    let best = validations.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    let mut expected = vec![7, 8, 9];
    if best < 7 {
        expected.insert(0, best);
    }
    assert_eq!(kept(&folder.path("run")), (expected, Some(best)));

    // The best is the model that was validated, not the next one that happens to be saved; a rate that
    // does harm makes an early one the best.
    let overrides = ["optimizer.lr=0.3", "schedule.kind=constant", "schedule.warmup_steps=0"];
    let mut config = folder.config("worse", &overrides);
    config.train.checkpoint_every = 3;
    config.train.keep_last = 1;
    run(&config).unwrap();
    let worse = folder.path("worse");
    let records = metrics(&worse);
    let losses: Vec<&serde_json::Value> =
        records.iter().filter(|r| r["kind"] == "validation").map(|r| &r["loss"]).collect();
    let best = newest_figures(&worse)["best"].clone();
    let at = [4, 8, 9].iter().position(|&step| best["step"] == step).unwrap();
    assert_eq!(&best["loss"], losses[at]);
    assert_eq!(kept(&worse).1, best["step"].as_u64());

    // A `best` that was lost, as by a kill between a save and its mark, comes back.
    fs::remove_file(worse.join("checkpoints/best")).unwrap();
    config.train.steps = Some(10);
    resume(&config).unwrap();
    assert!(kept(&worse).1.is_some());
}

#[test]
fn damaged_checkpoints_are_named_and_passed_over() {
    let folder = Folder::new();
    let whole = folder.config("whole", &[]);
    run(&whole).unwrap();
    for (file, damage) in [
        ("model.safetensors", "flip"),
        ("optimizer.safetensors", "cut"),
        ("state.safetensors", "flip"),
        ("training.json", "flip"),
        ("config.toml", "remove"),
    ] {
        let name = format!("damaged-{file}");
        let mut config = folder.config(&name, &["train.checkpoint_every=4"]);
        config.data.carry_state = file == "state.safetensors";
        run(&config).unwrap();
        let newest = checkpoints(&folder.path(&name)).pop().unwrap();
        let path = newest.join(file);
        let mut bytes = fs::read(&path).unwrap();
        match damage {
            "flip" => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&path, &bytes).unwrap();
            }
            "cut" => fs::write(&path, &bytes[..bytes.len() - 100]).unwrap(),
            _ => fs::remove_file(&path).unwrap(),
        }
        let (outcome, warnings) = resume(&config).unwrap();
        assert_eq!(outcome.step, 9);
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(warning.contains(newest.to_str().unwrap()) && warning.contains(file), "{warning}");
        if !config.data.carry_state {
            assert_eq!(newest_bits(&folder.path(&name)), newest_bits(&folder.path("whole")));
        }
        // Once all are damaged, that is an error.
        for folder in checkpoints(&folder.path(&name)) {
            fs::write(folder.join("model.safetensors"), b"").unwrap();
        }
        let error = resume(&config).unwrap_err().to_string();
        assert!(error.contains("none of the") && error.contains(&name), "{error}");
    }
}

#[test]
fn what_decides_the_result_must_not_change() {
    let folder = Folder::new();
    let config = folder.config("run", &["train.steps=3"]);
    run(&config).unwrap();
    for (key, value) in [
        ("optimizer.lr", "0.006"),
        ("optimizer.recurrence_lr_factor", "10"),
        ("train.seed", "3"),
        ("train.accumulation", "2"),
        ("train.batch_size", "4"),
        ("data.context", "33"),
        ("data.packing", "greedy"),
        ("model.d_model", "32"),
        ("model.embedding_std", "0.5"),
        ("schedule.kind", "constant"),
    ] {
        let changed = folder.config("run", &["train.steps=5", &format!("{key}={value}")]);
        let error = resume(&changed).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains(value), "{error}");
        assert!(error.contains("step-00000003"), "{error}");
    }
    // Starting over would mix two runs.
    let again = Trainer::start(config.clone(), Dataset::open(&config).unwrap());
    let error = again.err().unwrap().to_string();
    assert!(error.contains("--resume") && error.contains("checkpoints"), "{error}");

    // Files may move, but not change.
    fs::rename(folder.path("text"), folder.path("moved")).unwrap();
    let mut moved = folder.config("run", &["train.steps=4"]);
    moved.data.paths = vec![folder.path("moved").display().to_string()];
    assert_eq!(resume(&moved).unwrap().0.step, 4);
    for entry in fs::read_dir(folder.path("moved")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap().replace("scan", "Scan");
        fs::write(&path, text).unwrap();
    }
    moved.train.steps = Some(5);
    let error = resume(&moved).unwrap_err().to_string();
    assert!(error.contains("data.paths"), "{error}");

    fs::remove_dir_all(folder.path("run/checkpoints")).unwrap();
    let error = resume(&moved).unwrap_err().to_string();
    assert!(error.contains("no checkpoint to resume from"), "{error}");
}
