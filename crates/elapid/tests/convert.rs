//! `elapid convert`, and every format behind `--model` and `elapid inspect`.

mod program;

use program::{Program, golden};

const FORMATS: [(&str, &[&str]); 5] = [
    ("hf", &[]),
    ("hf-bin", &["--to", "hf-bin"]),
    ("original", &["--to", "original"]),
    ("model.npz", &[]),
    ("model.gguf", &[]),
];

#[test]
fn every_format_is_written_read_and_inspected() {
    let program = Program::new();
    let source = golden().join("original");
    let source = source.to_str().unwrap();
    let call =
        ["--tokens", "1,2,3,4", "-n", "8", "--temperature", "0", "--device", "cpu", "--json"];
    let generated = |model: &str| {
        let report = program.run(&[&["generate", "--model", model], &call[..]].concat()).json();
        report["tokens"].clone()
    };
    let expected = generated(source);
    assert!(expected.as_array().is_some_and(|tokens| !tokens.is_empty()), "{expected}");
    for (name, to) in FORMATS {
        program.run(&[&["convert", source, name], to].concat()).ok();
        assert_eq!(generated(name), expected, "{name}");
        let report = program.run(&["inspect", name, "--json"]).json();
        assert_eq!(report["kind"], "model", "{name}");
        assert_eq!(report["model"]["parameters"], 147_776, "{name}");
        assert_eq!(report["model"]["architecture"], "mamba", "{name}");
        let text = program.run(&["inspect", name, "--tensors"]).ok();
        for part in ["147,776", "F32", "A_log"] {
            assert!(text.contains(part), "{name}: {part}: {text}");
        }
    }
    let file = generated("original/pytorch_model.bin");
    assert_eq!(file, expected);
    let report = program.run(&["inspect", "original/pytorch_model.bin", "--json"]).json();
    assert_eq!(report["model"]["layout"], "original");
}

/// What the original layout cannot say, a `pytorch_model.bin` of the Hugging Face layout can.
#[test]
fn falcon_mamba_as_a_pickle() {
    let program = Program::new();
    let falcon = golden().join("../falcon_mamba/hf");
    let falcon = falcon.to_str().unwrap();
    program
        .run(&["convert", falcon, "original", "--to", "original"])
        .fails(1, &["mixer_rms_eps", "pytorch_model.bin in the Hugging Face layout"]);
    let report = program.run(&["convert", falcon, "bin", "--to", "hf-bin", "--json"]).json();
    assert_eq!(report["target_format"], "hf-bin");
    program.run(&["convert", "bin", "back"]).ok();
    for folder in ["bin", "back"] {
        let report = program.run(&["inspect", folder, "--json"]).json();
        assert_eq!(report["model"]["architecture"], "falcon_mamba");
        assert_eq!(report["model"]["layout"], "hf");
    }
    let generate = |model: &str| {
        let call =
            ["--tokens", "1,2,3", "-n", "6", "--temperature", "0", "--device", "cpu", "--json"];
        program.run(&[&["generate", "--model", model], &call[..]].concat()).json()["tokens"].clone()
    };
    assert_eq!(generate("bin"), generate(falcon));
}

#[test]
fn types_and_refusals() {
    let program = Program::with_model();
    let report = program.run(&["convert", "model", "half.npz", "--dtype", "f16", "--json"]).json();
    assert_eq!(report["target_format"], "npz");
    let report = program.run(&["inspect", "half.npz", "--json"]).json();
    assert_eq!(report["files"][0]["dtypes"].as_object().unwrap().keys().next().unwrap(), "F16");
    program.run(&["convert", "model", "x", "--dtype", "f64"]).fails(2, &["f64", "f16"]);
    program.run(&["convert", "model", "x", "--dtype", "q8_0"]).fails(2, &["q8_0", "quantize"]);
    program.run(&["convert", "model", "x", "--to", "onnx"]).fails(2, &["onnx"]);
    program.run(&["convert", "none", "x"]).fails(1, &["none"]);
    program
        .run(&["convert", "model", "model", "--to", "original"])
        .fails(1, &["model.safetensors"]);
    program.write("pytorch_model.bin", "no pickle");
    program.run(&["inspect", "pytorch_model.bin"]).fails(1, &["pytorch_model.bin"]);
}
