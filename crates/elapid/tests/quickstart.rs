//! `elapid quickstart`: from nothing to a sample.

mod program;

use std::fs;
use std::process::Stdio;

use elapid::tensor::rng::Rng;
use program::{Outcome, Program};
use serde_json::Value;

/// A model of a moment.
const SMALL: [&str; 8] = [
    "--set",
    "model.d_model=16",
    "--set",
    "model.n_layer=1",
    "--set",
    "data.context=32",
    "--set",
    "train.batch_size=2",
];

/// Prose of `words` made-up words.
fn prose(seed: u64, words: usize) -> String {
    let mut rng = Rng::new(seed, 0);
    let mut text = String::new();
    for word in 0..words {
        for _ in 0..2 + rng.below(7) {
            text.push((b'a' + rng.below(26) as u8) as char);
        }
        text.push_str(if word % 40 == 39 { ".\n\n" } else { " " });
    }
    text
}

fn call<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["quickstart"], &SMALL[..], more].concat()
}

/// With this as cargo's home, and no toolchain to be found.
fn run_at_home(program: &Program, home: &str, arguments: &[&str]) -> Outcome {
    let mut command = program.command(arguments);
    command.env("CARGO_HOME", program.path(home)).env("PATH", "").stdin(Stdio::null());
    Outcome::of(command.output().unwrap())
}

fn metric_count(program: &Program, out: &str) -> usize {
    fs::read_to_string(program.path(out).join("metrics.jsonl")).unwrap().lines().count()
}

#[test]
fn on_given_data_it_trains_compares_and_says_what_next() {
    let program = Program::new();
    program.write("book.txt", prose(1, 2000));
    let arguments = call(&["--steps", "3", "--data", "book.txt", "--out", "mine", "--json"]);
    let run = program.run(&arguments);
    for part in ["order-2", "gzip -9", "zstd -19", "Mamba, this run", "mine/loss.svg", "Try next"] {
        assert!(run.err.contains(part), "{part:?} is not in {}", run.err);
    }
    let report = run.json();
    assert_eq!((report["steps"].as_u64(), report["interrupted"].as_bool()), (Some(3), Some(false)));
    assert_eq!(report["out"], "mine");
    let figures = [
        &report["bits_per_byte"],
        &report["baselines"]["order2"],
        &report["baselines"]["gzip"]["whole"],
        &report["baselines"]["gzip"]["per_window"],
        &report["baselines"]["zstd"]["whole"],
        &report["baselines"]["zstd"]["per_window"],
    ];
    for figure in figures {
        let bits = figure.as_f64().unwrap();
        assert!(bits > 1.0 && bits < 40.0, "{report}");
    }
    assert!(!report["sample"].as_str().unwrap().is_empty());
    for file in ["plot", "checkpoint"] {
        assert!(program.path(report[file].as_str().unwrap()).exists(), "{file}");
    }
    // A folder that is in use is left alone.
    program.run(&arguments).fails(2, &["--out mine", "not empty"]);
    program.write("file", "");
    program.run(&call(&["--data", "book.txt", "--out", "file"])).fails(2, &["--out file"]);
    // The run is one like any other: it goes on.
    let more = ["train", "mine/config.toml", "--resume", "--set", "train.steps=5", "--json"];
    assert_eq!(program.run(&more).json()["step"], 5);
    let sample = ["generate", "--model", "mine", "--prompt", "The ", "-n", "9", "--seed", "1"];
    assert_eq!(program.run(&sample).ok(), program.run(&sample).ok());
}

#[test]
fn wrong_data_is_named() {
    let program = Program::new();
    program.run(&call(&["--data", "none"])).fails(1, &["none"]);
    program.write("tiny.txt", "ab");
    program.run(&call(&["--data", "tiny.txt"])).fails(1, &["byte"]);
    program.write("some.txt", prose(1, 100));
    let all = call(&["--data", "some.txt", "--set", "data.validation_fraction=0"]);
    program.run(&all).fails(2, &["held out"]);
    program.run(&call(&["--set", "data.paths=some.txt"])).fails(2, &["--data"]);
    program.run(&call(&["--data", "some.txt", "--steps", "0"])).fails(2, &["--steps"]);
    assert!(!program.path("runs").exists());
}

#[test]
fn without_data_it_reads_the_crates_that_cargo_fetched() {
    let program = Program::new();
    for i in 0..12 {
        let folder = program.path(&format!("home/registry/src/index-1/crate{i}-1.0.0"));
        fs::create_dir_all(&folder).unwrap();
        // 12 files of about 40 kB: enough for a corpus.
        fs::write(folder.join("README.md"), prose(i, 6500)).unwrap();
    }
    let arguments = call(&["--steps", "2", "--json"]);
    let first = run_at_home(&program, "home", &arguments);
    assert!(
        first.err.contains("fetched crates") && first.err.contains("12 files"),
        "{}",
        first.err
    );
    assert_eq!(first.json()["out"], "runs/quickstart");
    // The text is kept with the run, which goes on without cargo.
    fs::rename(program.path("home"), program.path("gone")).unwrap();
    let config = "runs/quickstart/config.toml";
    let more = ["train", config, "--resume", "--set", "train.steps=4", "--json"];
    assert_eq!(program.run(&more).json()["step"], 4);
    assert_eq!(metric_count(&program, "runs/quickstart"), 6);

    // Another run gets another folder.
    let second: Value = run_at_home(&program, "gone", &arguments).json();
    assert_eq!(second["out"], "runs/quickstart-2");
    assert_eq!(metric_count(&program, "runs/quickstart-2"), 3);
}

/// On Linux the documentation of the system can be hidden from one process, with the right to mount.
#[cfg(target_os = "linux")]
#[test]
fn with_nothing_to_read_it_asks_for_data() {
    let program = Program::new();
    fs::create_dir(program.path("home")).unwrap();
    let hide = "for folder in /usr/share/doc /usr/share/man /usr/local/share/doc \
                /usr/local/share/man /usr/share/common-licenses; do \
                test ! -d $folder || mount -t tmpfs tmpfs $folder || exit 99; done; \
                PATH= exec \"$@\"";
    let inner = program.command(&call(&["--steps", "1"]));
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", hide, "sh"]).arg(inner.get_program());
    command.args(inner.get_args()).current_dir(program.path("."));
    command.env("CARGO_HOME", program.path("home")).stdin(Stdio::null());
    match command.output() {
        Ok(output) if output.status.code() == Some(1) && output.stderr.starts_with(b"error: ") => {
            Outcome::of(output).fails(1, &["--data PATH", "text on this machine"]);
            assert!(!program.path("runs").exists());
        }
        Ok(output) if output.status.success() => panic!("it found text: {output:?}"),
        _ => eprintln!("skipped: no right to mount"),
    }
}
