//! `elapid forward`: logits and states in a file.

mod program;

use elapid::formats::TensorFile;
use program::{Program, golden};

fn values(file: &TensorFile, name: &str) -> Vec<f64> {
    file.tensor(name).unwrap().to_f64_vec().unwrap()
}

#[track_caller]
fn assert_close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 2e-4, "{a} {b}");
    }
}

#[test]
fn golden_logits_and_states() {
    let program = Program::new();
    let model = golden().join("hf");
    let expected = TensorFile::open(&golden().join("expected.safetensors")).unwrap();
    let prompts: Vec<Vec<u64>> = (0..2)
        .map(|i| {
            values(&expected, &format!("prompt{i}.input_ids")).iter().map(|&v| v as u64).collect()
        })
        .collect();
    program.write("ids.json", serde_json::json!(prompts).to_string());
    let (first, second) = (prompts[0].len(), prompts[1].len());
    for chunk in ["1000", "50"] {
        let call = ["forward", "--model", model.to_str().unwrap(), "--tokens", "ids.json"];
        let call = [&call[..], &["--out", "out.safetensors", "--chunk", chunk, "--json"]].concat();
        let report = program.run(&call).json();
        assert_eq!(report["tokens"], first + second);
        let file = TensorFile::open(&program.path("out.safetensors")).unwrap();
        assert_eq!(file.shape("logits").unwrap(), [first + second, 264]);
        let logits = values(&file, "logits");
        assert_close(&logits[..first * 264], &values(&expected, "prompt0.logits"));
        assert_close(&logits[first * 264..], &values(&expected, "prompt1.logits"));
        for layer in 0..4 {
            let name = format!("layers.{layer}.ssm_state");
            assert_eq!(file.shape(&name).unwrap(), [2, 128, 16]);
            let goal: Vec<f64> = (0..2)
                .flat_map(|i| values(&expected, &format!("prompt{i}.cache.{name}")))
                .collect();
            assert_close(&values(&file, &name), &goal);
            assert_eq!(file.shape(&format!("layers.{layer}.conv_state")).unwrap(), [2, 128, 3]);
        }
    }
}

#[test]
fn two_halves_through_a_state_file_are_the_whole() {
    let program = Program::with_model();
    program.write("whole.json", "[1,2,3,4,5,6,7]");
    program.write("first.json", "[1,2,3]");
    program.write("second.json", "[4,5,6,7]");
    let run = |tokens: &str, out: &str, more: &[&str]| {
        let call = ["forward", "--model", "model", "--tokens", tokens, "--out", out];
        program.run(&[&call[..], more].concat()).ok();
        TensorFile::open(&program.path(out)).unwrap()
    };
    let whole = run("whole.json", "w.safetensors", &[]);
    let first = run("first.json", "f.safetensors", &["--state-out", "s.state"]);
    let second = run("second.json", "g.safetensors", &["--state-in", "s.state"]);
    let both = [values(&first, "logits"), values(&second, "logits")].concat();
    assert_close(&both, &values(&whole, "logits"));
    for name in whole.names().iter().filter(|name| name.starts_with("layers.")) {
        assert_close(&values(&second, name), &values(&whole, name));
    }
}

#[test]
fn wrong_token_files() {
    let program = Program::with_model();
    let run = |content: &str| {
        program.write("ids.json", content);
        let call = ["forward", "--model", "model", "--tokens", "ids.json", "--out", "out"];
        program.run(&call)
    };
    run("[1, 2").fails(2, &["ids.json", "JSON array"]);
    run("{\"a\": 1}").fails(2, &["ids.json", "JSON array"]);
    run("[1, -2]").fails(2, &["ids.json"]);
    run("[[1], 2]").fails(2, &["ids.json"]);
    run("[[1], [2, 999]]").fails(2, &["token 999", "place 1", "sequence 1"]);
    assert!(!program.path("out").exists(), "a failed run leaves no file");
    run("[]").ok();
    let file = TensorFile::open(&program.path("out")).unwrap();
    assert_eq!(file.shape("logits").unwrap(), [0, 256]);
    program.write("ids.json", "[1]");
    let call = ["forward", "--model", "model", "--tokens", "ids.json", "--out", "no/such/out"];
    program.run(&call).fails(1, &["no/such/out"]);
    let call = ["forward", "--model", "model", "--tokens", "none.json", "--out", "out"];
    program.run(&call).fails(1, &["none.json"]);
}
