//! Wrong calls, help and completions.

mod program;

use program::Program;

const COMMANDS: [&str; 6] = ["bench", "generate", "forward", "inspect", "doctor", "completions"];

#[test]
fn every_command_has_help_with_examples() {
    let program = Program::new();
    let help = program.run(&["--help"]).ok();
    for command in COMMANDS {
        assert!(help.contains(command), "{help}");
        let help = program.run(&[command, "--help"]).ok();
        assert!(
            help.contains("Examples:") && help.contains(&format!("elapid {command}")),
            "{help}"
        );
        assert!(help.contains("--threads"), "{help}");
    }
    assert!(program.run(&["--version"]).ok().contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_for_every_shell() {
    let program = Program::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = program.run(&["completions", shell]).ok();
        assert!(script.contains("generate") && script.contains("max-tokens"), "{shell}");
    }
    program.run(&["completions", "tcsh"]).fails(2, &["tcsh", "bash"]);
}

#[test]
fn wrong_calls_exit_with_2_and_say_why() {
    let program = Program::with_model();
    let nothing = program.run(&[]);
    assert_eq!((nothing.code, nothing.err.contains("Usage:")), (2, true));
    program.run(&["generat"]).fails(2, &["generat", "generate"]);
    program.run(&["generate"]).fails(2, &["--model"]);
    let generate = |more: &[&str]| program.run(&[&["generate", "--model", "model"], more].concat());
    generate(&["--temprature", "1"]).fails(2, &["--temprature", "--temperature"]);
    generate(&["--temperature", "warm"]).fails(2, &["warm"]);
    generate(&["--temperature", "-1"]).fails(2, &["--temperature", "-1"]);
    generate(&["--top-p", "1.5"]).fails(2, &["--top-p", "at most 1", "1.5"]);
    generate(&["--min-p", "-0.1"]).fails(2, &["--min-p"]);
    generate(&["--repetition-penalty", "0"]).fails(2, &["--repetition-penalty"]);
    generate(&["--stop", ""]).fails(2, &["--stop"]);
    generate(&["--prompt", ""]).fails(2, &["prompt is empty"]);
    generate(&["--prompt", "a", "--tokens", "1"]).fails(2, &["--prompt", "--tokens"]);
    generate(&["--tokens", "1,x"]).fails(2, &["x"]);
    generate(&["--tokens", "1,256"]).fails(2, &["token 256", "256 tokens"]);
    generate(&["--threads", "0"]).fails(2, &["--threads"]);
    generate(&["--device", "tpu"]).fails(2, &["tpu", "cpu"]);
    // Whether the driver or only the card is missing.
    generate(&["--device", "cuda:99"]).fails(1, &["--device cuda:99", "--device cpu"]);
    generate(&["--device", "cpu", "--dtype", "bf16"]).fails(2, &["f32", "bf16"]);
    generate(&["--dtype", "f64"]).fails(2, &["f64", "bf16"]);
}

#[test]
fn missing_and_damaged_models_exit_with_1_and_name_the_file() {
    let program = Program::with_model();
    let generate = |model| program.run(&["generate", "--model", model, "--prompt", "a"]);
    generate("nowhere").fails(1, &["nowhere", "No such file"]);
    program.write("note.txt", "hello");
    generate("note.txt").fails(1, &["note.txt", "safetensors"]);
    std::fs::create_dir(program.path("empty")).unwrap();
    generate("empty").fails(1, &["empty", "config.json"]);

    let weights = program.path("model/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for keep in [0, 5, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&weights, &whole[..keep]).unwrap();
        generate("model").fails(1, &["model.safetensors"]);
    }
    std::fs::write(&weights, whole).unwrap();
    generate("model").ok();
    program.write("model/config.json", r#"{"model_type": "gpt2"}"#);
    generate("model").fails(1, &["config.json", "gpt2"]);
    program.write("model/config.json", "{");
    generate("model").fails(1, &["config.json"]);
}

#[test]
fn a_closed_pipe_is_silent() {
    let program = Program::with_model();
    for arguments in [
        &["generate", "--model", "model", "--max-tokens", "400"][..],
        &["inspect", "model", "--tensors"],
        &["completions", "bash"],
    ] {
        let outcome = program.run_into_closed_pipe(arguments);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        assert!(!outcome.err.contains("error"), "{outcome:?}");
    }
}
