//! `elapid eval` from files to figures.

mod program;

use program::{Program, golden};

fn eval<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["eval", "--model", "model"], more].concat()
}

fn figure(report: &serde_json::Value, name: &str) -> f64 {
    report[name].as_f64().unwrap()
}

#[test]
fn figures_agree_with_each_other_and_with_the_reading() {
    let program = Program::with_model();
    let text = "The elapids are a family of snakes.\n".repeat(30);
    program.write("text.txt", &text);
    let run = |more: &[&str]| {
        program.run(&eval(&[&["--perplexity", "text.txt", "--json"], more].concat())).json()
    };
    let carried = run(&["--carry-state"]);
    assert_eq!(carried["reading"], "carried");
    assert_eq!(carried["tokens"], text.len());
    assert_eq!(carried["predicted"], text.len() - 1);
    assert_eq!(carried["words"], 30 * 7);
    let ce = figure(&carried, "cross_entropy");
    assert!((figure(&carried, "bits_per_byte") - ce / 2f64.ln()).abs() < 1e-9);
    assert!((figure(&carried, "token_perplexity") - ce.exp()).abs() < 1e-6);
    let words = (ce * text.len() as f64 / 210.0).exp();
    assert!((figure(&carried, "word_perplexity") / words - 1.0).abs() < 1e-9);

    // A window as long as the text sees all of it; a short one does not.
    let windows = run(&["--window", "5000"]);
    assert_eq!(windows["reading"]["windows"]["stride"], 2500);
    assert!((figure(&windows, "cross_entropy") - ce).abs() < 1e-5);
    let chunks = run(&["--carry-state", "--chunk", "100"]);
    assert!((figure(&chunks, "cross_entropy") - ce).abs() < 1e-5);
    let short = run(&["--window", "4", "--stride", "2"]);
    assert!((figure(&short, "cross_entropy") - ce).abs() > 1e-5);
    let all = run(&["--start-token", "10"]);
    assert_eq!(all["predicted"], text.len());

    let human = program.run(&eval(&["--perplexity", "text.txt", "--carry-state"]));
    let human = human.ok();
    assert!(human.contains("bits per byte") && human.contains("state carried"), "{human}");
}

#[test]
fn documents_come_from_files_and_separators() {
    let program = Program::with_model();
    program.write("two.bin", b"first text\0second text");
    program.write("a.txt", "first text");
    program.write("b.txt", "second text");
    let ce = |more: &[&str]| {
        let report = program.run(&eval(&[more, &["--json"]].concat())).json();
        (report["documents"].as_u64().unwrap(), figure(&report, "cross_entropy"))
    };
    let files = ce(&["--perplexity", "a.txt", "--perplexity", "b.txt"]);
    assert_eq!(files.0, 2);
    assert_eq!(ce(&["--perplexity", "two.bin", "--nul"]), files);
    assert_eq!(ce(&["--perplexity", "two.bin"]).0, 1);
    program.write("bad.txt", [b'a', 0xFF, b'b']);
    let note = program.run(&eval(&["--perplexity", "bad.txt"]));
    assert!(note.err.contains("not UTF-8 from byte 1"), "{}", note.err);
    note.ok();
}

#[test]
fn wrong_calls_are_told() {
    let program = Program::with_model();
    program.write("a.txt", "text");
    program.write("one.txt", "x");
    let run = |more: &[&str]| program.run(&eval(&[&["--perplexity"], more].concat()));
    run(&["none.txt"]).fails(1, &["none.txt"]);
    run(&["one.txt"]).fails(1, &["nothing can be predicted"]);
    run(&["a.txt", "--window", "0"]).fails(2, &["--window"]);
    run(&["a.txt", "--window", "4", "--stride", "5"])
        .fails(2, &["--stride", "5 for a window of 4"]);
    run(&["a.txt", "--start-token", "256"]).fails(2, &["token 256"]);
    run(&["a.txt", "--carry-state", "--window", "4"]).fails(2, &[]);
    let golden = golden().join("hf");
    program
        .run(&["eval", "--model", golden.to_str().unwrap(), "--perplexity", "a.txt"])
        .fails(2, &["264 tokens", "tokenizer"]);
}
