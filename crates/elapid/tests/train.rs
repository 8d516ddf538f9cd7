//! `elapid train`: a whole run, what it leaves, and what happens to it when things go wrong.

mod program;

use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::{Child, Stdio};
#[cfg(unix)]
use std::time::{Duration, Instant};

#[cfg(unix)]
use program::Outcome;
use program::Program;
use serde_json::Value;

const RUN: &str = r#"
[model]
d_model = 16
n_layer = 2

[data]
paths = ["text.txt"]
context = 32

[train]
steps = 12
batch_size = 2
validation_every = 5
validation_tokens = 256
checkpoint_every = 4
out = "runs/first"

[optimizer]
lr = 5e-3

[schedule]
warmup_steps = 2
"#;

/// A folder with `text.txt` and `run.toml`.
fn program() -> Program {
    let program = Program::new();
    let text: String = (0..300).map(|i| format!("line {} of {}\n", i * 7 % 31, i % 5)).collect();
    program.write("text.txt", text);
    program.write("run.toml", RUN);
    program
}

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "run.toml"], more].concat()
}

/// Checkpoints of a run, oldest first.
fn checkpoints(out: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(out.join("checkpoints")) else { return Vec::new() };
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("step-"))
        .collect();
    folders.sort();
    folders
}

/// The newest checkpoint's parameters and moments.
#[track_caller]
fn bits(out: &Path) -> [Vec<u8>; 2] {
    let newest = checkpoints(out).pop().expect("no checkpoint");
    ["model.safetensors", "optimizer.safetensors"]
        .map(|name| std::fs::read(newest.join(name)).unwrap())
}

/// The records without what a clock or the system's memory says.
fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            for timing in ["tokens_per_s", "time_s", "memory_bytes"] {
                record.as_object_mut().unwrap().remove(timing);
            }
            record
        })
        .collect()
}

/// Asserts that two runs ended with the same bits and records.
#[track_caller]
fn assert_equal(a: &Path, b: &Path) {
    assert_eq!(metrics(a), metrics(b));
    assert!(bits(a) == bits(b), "{} and {} differ", a.display(), b.display());
}

#[test]
fn a_run_leaves_all_that_was_promised_and_its_model_speaks() {
    let program = program();
    let report = program.run(&train(&["--json"])).json();
    assert_eq!((report["step"].as_u64(), report["interrupted"].as_bool()), (Some(12), Some(false)));
    assert_eq!(report["tokens"].as_u64(), Some(12 * 2 * 32));
    let bits_per_byte = report["validation"]["bits_per_byte"].as_f64().unwrap();
    assert!((1.0..8.0).contains(&bits_per_byte), "{bits_per_byte}");
    assert!(report["tokens_per_s"].as_f64().unwrap() > 0.0);

    let out = program.path("runs/first");
    let records = metrics(&out);
    assert_eq!(records.iter().filter(|record| record["kind"] == "train").count(), 12);
    assert_eq!(records.iter().filter(|record| record["kind"] == "validation").count(), 3);
    assert!(std::fs::read_to_string(out.join("loss.svg")).unwrap().contains("<svg"));
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.contains("d_state = 16") && config.contains("steps = 12"), "{config}");
    let events = std::fs::read_dir(&out).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_str().unwrap().starts_with("events.out.tfevents.")
    });
    assert_eq!(events.count(), 1);
    let newest = checkpoints(&out).pop().unwrap();
    assert_eq!(report["checkpoint"].as_str().map(|path| program.path(path)), Some(newest.clone()));
    for file in ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"] {
        assert!(newest.join(file).is_file(), "{file}");
    }

    let sample = |seed: &str| {
        let call = ["--model", "runs/first", "--prompt", "line ", "-n", "80", "--seed", seed];
        program.run(&[&["generate"], &call[..]].concat()).ok()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
    let inspected = program.run(&["inspect", "runs/first"]);
    assert_eq!(inspected.code, 0, "{}", inspected.err);

    // The stored configuration is the run.
    let again = ["train", "runs/first/config.toml", "--set", "train.out=runs/second", "--quiet"];
    let quiet = program.run(&again);
    assert_eq!((quiet.code, quiet.err.as_str()), (0, ""));
    assert_equal(&program.path("runs/second"), &out);
    let stored = std::fs::read_to_string(program.path("runs/second/config.toml")).unwrap();
    assert!(!stored.contains("quiet"), "{stored}");
}

#[test]
fn without_a_terminal_it_speaks_in_plain_lines() {
    let program = program();
    let run = program.run(&train(&[]));
    assert_eq!(run.code, 0, "{}", run.err);
    assert_eq!(run.out, "");
    for part in ["model", "steps", "step 1/12", "step 12/12", "bits/byte", "tokens/s", "validation"]
    {
        assert!(run.err.contains(part), "{part:?} is not in {}", run.err);
    }
    for part in
        ["saved runs/first/checkpoints/step-00000012", "done: runs/first", "elapid generate"]
    {
        assert!(run.err.contains(part), "{part:?} is not in {}", run.err);
    }
    assert!(!run.err.chars().any(|c| c.is_control() && c != '\n'), "{:?}", run.err);
}

#[test]
fn a_dry_run_says_what_it_would_do_and_writes_nothing() {
    let program = program();
    let plan = program.run(&train(&["--dry-run", "--json"])).json();
    assert_eq!((plan["steps"].as_u64(), plan["steps_done"].as_u64()), (Some(12), Some(0)));
    assert_eq!(plan["tokens_per_step"], 64);
    assert!(plan["parameters"].as_u64().unwrap() > 4096);
    assert!(!program.path("runs").exists());
    program.run(&train(&[])).ok();
    // Of a resumption too.
    let call = ["--dry-run", "--json", "--resume", "--set", "train.steps=20"];
    let plan = program.run(&train(&call)).json();
    assert_eq!((plan["steps"].as_u64(), plan["steps_done"].as_u64()), (Some(20), Some(12)));
    assert_eq!(
        checkpoints(&program.path("runs/first")).last().unwrap().file_name().unwrap(),
        "step-00000012"
    );
    program.run(&train(&["--dry-run"])).fails(1, &["runs/first/checkpoints", "--resume"]);
}

#[test]
fn a_run_is_neither_started_over_nor_bent() {
    let program = program();
    program.run(&train(&["--resume"])).fails(1, &["no checkpoint", "runs/first"]);
    assert!(!program.path("runs").exists());
    program.run(&train(&["--set", "schedule.kind=constant"])).ok();
    let before = bits(&program.path("runs/first"));
    program.run(&train(&[])).fails(1, &["runs/first", "--resume"]);
    let changed = ["--resume", "--set", "schedule.kind=constant", "--set", "optimizer.lr=1e-3"];
    program.run(&train(&changed)).fails(1, &["optimizer.lr", "0.005", "0.001", "step-00000012"]);
    assert!(bits(&program.path("runs/first")) == before);

    let same = ["--resume", "--set", "schedule.kind=constant"];
    let done = program.run(&train(&same));
    assert!(done.err.contains("nothing left to do: 12 of 12"), "{}", done.err);
    let more = program.run(&train(&[&same[..], &["--set", "train.steps=15", "--json"]].concat()));
    assert_eq!(more.json()["step"], 15);
    let long =
        ["--set", "schedule.kind=constant", "--set", "train.steps=15", "--set", "train.out=long"];
    program.run(&train(&long)).ok();
    assert!(bits(&program.path("long")) == bits(&program.path("runs/first")));
}

#[test]
fn a_wrong_configuration_is_refused_with_its_line() {
    let program = program();
    let with = |from: &str, to: &str| {
        assert!(RUN.contains(from));
        program.write("wrong.toml", RUN.replace(from, to));
        program.run(&["train", "wrong.toml"])
    };
    with("batch_size = 2", "batchsize = 2").fails(2, &["wrong.toml:12", "train.batch_size"]);
    with("[optimizer]", "[optimiser]").fails(2, &["optimiser", "`optimizer`"]);
    with("steps = 12", "steps = \"many\"")
        .fails(2, &["wrong.toml:11", "train.steps", "whole number"]);
    with("lr = 5e-3", "lr = -1").fails(2, &["optimizer.lr", "above 0"]);
    with("d_model = 16", "d_model = ").fails(2, &["wrong.toml:3", "TOML"]);
    with("[model]", "[model]\nvocab_size = 100").fails(2, &["model.vocab_size", "256", "100"]);
    program.run(&train(&["--set", "train.stesp=3"])).fails(2, &["train.stesp", "train.steps"]);
    program.run(&train(&["--set", "steps=3"])).fails(2, &["table.key=value"]);
    program.run(&["train", "none.toml"]).fails(1, &["none.toml"]);
    program.write("binary.toml", [0xFF, 0xFE, 0x00]);
    program.run(&["train", "binary.toml"]).fails(2, &["binary.toml:1", "UTF-8"]);
    assert!(!program.path("runs").exists());
}

#[test]
fn data_that_cannot_be_used_is_named() {
    let program = program();
    let with = |paths: &str| {
        let paths = format!("data.paths={paths}");
        program.run(&["train", "run.toml", "--set", &paths])
    };
    with("none.txt").fails(1, &["none.txt", "no such file"]);
    with("no/*.md").fails(1, &["no/*.md"]);
    program.write("empty.txt", "");
    with("empty.txt").fails(1, &["empty.txt"]);
    program.write("short.txt", "ab");
    with("short.txt").fails(1, &["byte"]);
    std::fs::create_dir(program.path("folder")).unwrap();
    with("folder").fails(1, &["folder", "no file"]);
    program.write("cut.gz", [0x1F, 0x8B, 0x08, 0x00, 0x00]);
    with("cut.gz").fails(1, &["cut.gz", "gzip"]);
    assert!(!program.path("runs").exists());
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        program.write("secret.txt", "not for you");
        let path = program.path("secret.txt");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
        if std::fs::read(&path).is_err() {
            with("secret.txt").fails(1, &["secret.txt", "cannot be read"]);
        } else {
            eprintln!("skipped: this user may read everything");
        }
    }
    // Bytes that are no text are fine.
    let bytes: Vec<u8> = (0..3000u32).map(|i| ((i * i) >> 3) as u8).collect();
    assert!(String::from_utf8(bytes.clone()).is_err());
    program.write("bytes.bin", bytes);
    with("bytes.bin").ok();
    // The folder of the run cannot be made.
    program.write("taken", "a file");
    program.run(&train(&["--set", "train.out=taken"])).fails(1, &["taken"]);
    program.run(&train(&["--set", "train.out=taken/run"])).fails(1, &["taken"]);
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_used() {
    let program = program();
    program.run(&train(&["--set", "train.out=whole"])).ok();
    program.run(&train(&[])).ok();
    let out = program.path("runs/first");
    for (file, cut) in [("model.safetensors", false), ("optimizer.safetensors", true)] {
        let newest = checkpoints(&out).pop().unwrap();
        let path = newest.join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        if cut {
            bytes.truncate(middle);
        } else {
            bytes[middle] ^= 0x40;
        }
        std::fs::write(&path, bytes).unwrap();
        let resumed = program.run(&train(&["--resume"]));
        let name = newest.file_name().unwrap().to_str().unwrap();
        for part in ["warning: ", name, file] {
            assert!(resumed.err.contains(part), "{part:?} is not in {}", resumed.err);
        }
        resumed.ok();
        assert_equal(&out, &program.path("whole"));
    }
    for folder in checkpoints(&out) {
        std::fs::write(folder.join("training.json"), "{}").unwrap();
    }
    program.run(&train(&["--resume"])).fails(1, &["none of the", "runs/first/checkpoints"]);
}

#[test]
fn divergence_stops_with_step_tensor_and_checkpoint() {
    let program = program();
    let absurd = ["--set", "optimizer.lr=1e30", "--set", "schedule.warmup_steps=0"];
    let parts = ["step 2", "NaN", "first bad tensor: ", "backbone.", "no checkpoint"];
    program.run(&train(&absurd)).fails(1, &parts);

    let nervous = [
        "--set",
        "optimizer.max_grad_norm_factor=1.0001",
        "--set",
        "train.steps=500",
        "--set",
        "train.keep_best=false",
        "--set",
        "train.out=nervous",
    ];
    let stopped = program.run(&train(&nervous));
    let last = checkpoints(&program.path("nervous")).pop().unwrap();
    let name = last.file_name().unwrap().to_str().unwrap();
    stopped.fails(1, &["gradient norm", "gradient of backbone.", "last good checkpoint is", name]);
    let call = ["generate", "--model", "nervous", "--prompt", "a", "-n", "5", "--seed", "1"];
    program.run(&call).ok();
}

/// A run that takes a second or so, uninterrupted in `whole`.
#[cfg(unix)]
fn longer(program: &Program, more: &str) -> Vec<&'static str> {
    let run = RUN.replace("steps = 12", "steps = 150").replace("checkpoint_every = 4", more);
    program.write("run.toml", format!("{run}\n[log]\nplot = false\n"));
    program.run(&train(&["--set", "train.out=whole"])).ok();
    train(&[])
}

#[cfg(unix)]
fn start(program: &Program, call: &[&str]) -> Child {
    let mut command = program.command(call);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until a run has recorded `lines` steps.
#[cfg(unix)]
fn wait_for(out: &Path, lines: usize) {
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        if text.lines().count() >= lines {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "the run does not move");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    let sent = std::process::Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

#[cfg(unix)]
#[test]
fn ctrl_c_and_termination_save_and_a_resumed_run_ends_with_the_same_bits() {
    let program = program();
    let call = longer(&program, "checkpoint_every = 0\nkeep_best = false");
    let out = program.path("runs/first");
    for (part, (name, lines)) in [("-INT", 20), ("-TERM", 60)].into_iter().enumerate() {
        let resume: &[&str] = if part == 0 { &[] } else { &["--resume"] };
        let child = start(&program, &[&call, resume].concat());
        wait_for(&out, lines);
        signal(&child, name);
        let stopped = Outcome::of(child.wait_with_output().unwrap());
        assert_eq!(stopped.code, 0, "{}", stopped.err);
        let newest = checkpoints(&out).pop().unwrap();
        let step: u64 = newest.to_str().unwrap().rsplit_once('-').unwrap().1.parse().unwrap();
        let told = format!(
            "stopped at step {step}; go on with: elapid train runs/first/config.toml --resume"
        );
        assert!(stopped.err.contains(&told), "{}", stopped.err);
        assert!((10..150).contains(&step), "{step}");
    }
    program.run(&["train", "runs/first/config.toml", "--resume"]).ok();
    assert_equal(&out, &program.path("whole"));
}

#[cfg(unix)]
#[test]
fn kill_9_at_any_moment_costs_nothing_but_time() {
    let program = program();
    let call = longer(&program, "checkpoint_every = 1");
    let out = program.path("runs/first");
    let mut rng = elapid::tensor::rng::Rng::new(9, 0);
    let mut kills = 0;
    loop {
        let resume: &[&str] = if checkpoints(&out).is_empty() { &[] } else { &["--resume"] };
        let mut child = start(&program, &[&call, resume].concat());
        // Some are killed while they start, most while they train and save.
        std::thread::sleep(Duration::from_millis(10 + rng.below(300)));
        child.kill().unwrap();
        let ended = child.wait_with_output().unwrap();
        if ended.status.success() {
            break;
        }
        let err = String::from_utf8_lossy(&ended.stderr);
        assert!(!err.contains("error") && !err.contains("warning"), "{err}");
        kills += 1;
        if kills == 15 {
            program.run(&[&call[..], &["--resume"]].concat()).ok();
            break;
        }
    }
    assert!(kills >= 3, "killed {kills} times only");
    assert_equal(&out, &program.path("whole"));
    // Nothing half written is left.
    let left: Vec<_> = std::fs::read_dir(out.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A small file system in memory on `runs/`, where the system allows one.
#[cfg(target_os = "linux")]
struct SmallDisk(PathBuf);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn mount(path: PathBuf, options: &str) -> Option<Self> {
        std::fs::create_dir_all(&path).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&path)
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("skipped: no right to mount a small file system");
        }
        mounted.then_some(Self(path))
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_the_earlier_checkpoint_stays() {
    let program = program();
    let call = longer(&program, "checkpoint_every = 1\nkeep_last = 100");
    let Some(disk) = SmallDisk::mount(program.path("runs"), "size=1m") else { return };
    program.run(&call).fails(1, &["No space left", "runs/first/"]);
    let out = program.path("runs/first");
    let saved = checkpoints(&out).len();
    assert!((1..100).contains(&saved), "{saved}");
    let sound = program.run(&[
        "generate",
        "--model",
        "runs/first",
        "--prompt",
        "a",
        "-n",
        "3",
        "--seed",
        "1",
    ]);
    assert!(!sound.err.contains("warning"), "{}", sound.err);
    sound.ok();
    // As full as it was, it fails in the same way; with room it goes on to the same end.
    program.run(&[&call[..], &["--resume"]].concat()).fails(1, &["No space left"]);
    assert_eq!(checkpoints(&out).len(), saved);
    let grown =
        std::process::Command::new("mount").args(["-o", "remount,size=100m"]).arg(&disk.0).status();
    assert!(grown.unwrap().success());
    program.run(&[&call[..], &["--resume"]].concat()).ok();
    assert_equal(&out, &program.path("whole"));
}
