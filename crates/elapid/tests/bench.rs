//! `elapid bench`: a quick run gives every figure, each positive and finite, also of the emulated GPU; wrong words are
//! refused.

mod program;

use program::Program;
use serde_json::Value;

/// Every number under `value` with the path to it.
fn numbers(value: &Value, path: String, found: &mut Vec<(String, f64)>) {
    match value {
        Value::Number(number) => found.push((path, number.as_f64().unwrap())),
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                numbers(item, format!("{path}[{i}]"), found);
            }
        }
        Value::Object(fields) => {
            for (name, item) in fields {
                numbers(item, format!("{path}.{name}"), found);
            }
        }
        // A float that is not finite becomes null in JSON.
        Value::Null => found.push((path, f64::NAN)),
        Value::Bool(_) | Value::String(_) => {}
    }
}

fn names(report: &Value) -> Vec<&str> {
    let figures = report["figures"].as_array().unwrap();
    figures.iter().map(|figure| figure["name"].as_str().unwrap()).collect()
}

#[test]
fn a_quick_run_has_every_figure() {
    let outcome = Program::new().run(&["bench", "--quick", "--json"]);
    for word in ["limit", "share", "selective_scan forward", "training step", "8 decode steps"] {
        assert!(outcome.err.contains(word), "{word} is not in {}", outcome.err);
    }
    let report = outcome.json();

    let names = names(&report);
    for operation in [
        "selective_scan",
        "causal_conv1d",
        "rms_norm",
        "matmul in_proj",
        "matmul x_proj",
        "matmul dt_proj",
        "matmul out_proj",
        "linear_cross_entropy",
    ] {
        assert!(names.contains(&format!("{operation} forward").as_str()), "{operation}: {names:?}");
        let backward = |name: &&str| name.starts_with(operation) && name.ends_with("backward");
        assert_eq!(names.iter().copied().filter(backward).count(), 1, "{operation}");
    }
    // A kind of float and one of blocks; two numbers of sequences.
    for (job, count) in [("training step", 1), ("prefill", 2), ("8 decode steps", 4)] {
        assert_eq!(names.iter().filter(|&&name| name == job).count(), count, "{job}: {names:?}");
    }

    let mut found = Vec::new();
    for part in ["limits", "figures", "scan_scaling", "training", "inference", "seconds", "threads"]
    {
        assert!(!report[part].is_null(), "{part} is missing");
        numbers(&report[part], part.into(), &mut found);
    }
    // Resources that a task does not use, and what only Linux tells.
    found.retain(|(path, _)| !path.contains(".work.") && !path.ends_with(".process_peak_bytes"));
    for (path, number) in found {
        assert!(number.is_finite() && number > 0.0, "{path} is {number}");
    }

    let limits = report["limits"].as_array().unwrap();
    assert_eq!(limits.len(), 3);
    for figure in report["figures"].as_array().unwrap() {
        assert_eq!(figure["samples"].as_array().unwrap().len(), 3, "{figure}");
        let value = |name: &str| figure[name].as_f64().unwrap();
        assert!((value("rate") / value("limit") / value("share") - 1.0).abs() < 1e-9, "{figure}");
        assert!(value("share_of_floor") >= value("share") * 0.999, "{figure}");
        let bound = figure["bound_by"].as_str().unwrap();
        assert!(limits.iter().any(|limit| limit["limit"] == bound), "{figure}");
    }
    let points = report["scan_scaling"]["points"].as_array().unwrap();
    assert!(points.windows(2).all(|p| p[1]["length"].as_u64() > p[0]["length"].as_u64()));
    assert!(report["machine"]["cores"].as_u64().unwrap() > 0);
}

#[test]
fn single_subjects_repeats_and_threads() {
    let program = Program::new();
    let call = "bench decode prefill --quick --repeats 2 --threads 1 --weights bf16,q4_0 --batch 2 \
                --prompt-tokens 5 --model-shape tiny --json";
    let outcome = program.run(&call.split_whitespace().collect::<Vec<_>>());
    assert!(outcome.err.contains("tiny in q4_0") && outcome.err.contains("peak memory"));
    let printed = outcome.err.contains("peak memory: of the process");
    let report = outcome.json();
    let shapes: Vec<&str> = report["figures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|figure| figure["shape"].as_str().unwrap())
        .collect();
    // Where the system tells it.
    let peak = &report["figures"][0]["process_peak_bytes"];
    assert_eq!(peak.as_u64().is_some_and(|peak| peak > 1 << 20), printed);
    assert!(report["figures"][1]["process_peak_bytes"].is_null());
    let expected = ["5 tokens, bf16", "batch 2, bf16", "5 tokens, q4_0", "batch 2, q4_0"];
    assert_eq!(shapes, expected.map(|shape| format!("tiny, {shape}")));
    let inference = report["inference"].as_array().unwrap();
    assert_eq!((inference.len(), &inference[1]["weights"]), (2, &"q4_0".into()));
    assert_eq!(names(&report), ["prefill", "8 decode steps", "prefill", "8 decode steps"]);
    assert_eq!(report["figures"][1]["samples"].as_array().unwrap().len(), 2);
    assert_eq!(report["threads"], 1);
    assert_eq!(report["limits"][0]["all_threads"]["threads"], 1);
    assert!(report["training"].is_null() && report["scan_scaling"].is_null());
    // Without --json nothing but the table, which is for people.
    assert_eq!(program.run(&["bench", "scan", "--quick", "--repeats", "1"]).ok(), "");
}

#[test]
fn decode_steps_on_the_emulated_gpu() {
    if let Err(error) = elapid::tensor::cuda::Gpu::emulated() {
        eprintln!("SKIPPED: elapid bench decode on the emulated GPU: {error}");
        return;
    }
    let call =
        "bench --device cuda:emulated --quick decode --repeats 1 --batch 2 --weights q8_0 --json";
    let report = Program::new().run(&call.split(' ').collect::<Vec<_>>()).json();
    let figures = report["figures"].as_array().unwrap();
    assert_eq!(figures.len(), 1, "{figures:?}");
    assert_eq!(figures[0]["shape"], "tiny, batch 2, q8_0, after 5 tokens");
    assert_eq!(figures[0]["prompt_tokens"], 5);
    assert!(figures[0]["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(figures[0]["work"]["bytes"].as_f64().unwrap() > 0.0);
    let from_nothing = call.replace("--json", "--prompt-tokens 0,3 --json");
    let report = Program::new().run(&from_nothing.split(' ').collect::<Vec<_>>()).json();
    let figures = report["figures"].as_array().unwrap();
    assert_eq!(figures[0]["shape"], "tiny, batch 2, q8_0, from nothing");
    assert_eq!((figures.len(), &figures[1]["prompt_tokens"]), (2, &3.into()));
    let wrong = ["bench", "--device", "cuda:emulated", "--quick", "decode", "--weights", "q4_k"];
    Program::new().run(&wrong).fails(2, &["q4_k", "q8_0"]);
}

#[test]
fn prompts_and_their_memory_on_the_emulated_gpu() {
    if let Err(error) = elapid::tensor::cuda::Gpu::emulated() {
        eprintln!("SKIPPED: elapid bench prefill on the emulated GPU: {error}");
        return;
    }
    let call =
        "bench --device cuda:emulated --quick prefill --repeats 1 --prompt-tokens 3,40 --json";
    let outcome = Program::new().run(&call.split(' ').collect::<Vec<_>>());
    assert!(outcome.err.contains("peak memory: of the card"), "{}", outcome.err);
    let report = outcome.json();
    let figures = report["figures"].as_array().unwrap();
    let number = |of: usize, name: &str| figures[of][name].as_u64().unwrap();
    assert_eq!((number(0, "prompt_tokens"), number(1, "prompt_tokens")), (3, 40));
    assert!(number(1, "peak_bytes") > number(0, "peak_bytes") && number(0, "peak_bytes") > 0);
}

#[test]
fn a_quick_run_on_the_emulated_gpu() {
    if let Err(error) = elapid::tensor::cuda::Gpu::emulated() {
        eprintln!("SKIPPED: elapid bench on the emulated GPU: {error}");
        return;
    }
    let call = "bench --device cuda:emulated --quick ops train --repeats 2 --json";
    let outcome = Program::new().run(&call.split(' ').collect::<Vec<_>>());
    for word in ["emulated on the host", "constant of the H200", "share", "launch by launch"] {
        assert!(outcome.err.contains(word), "{word} is not in {}", outcome.err);
    }
    let report = outcome.json();
    assert_eq!(
        (&report["device"]["id"], &report["dtype"]),
        (&"cuda:emulated".into(), &"bf16".into())
    );
    let names = names(&report);
    for operation in ["selective_scan", "causal_conv1d", "rms_norm", "embedding"] {
        for pass in ["forward", "backward"] {
            let name = format!("{operation} {pass}");
            assert!(names.contains(&name.as_str()), "{name}: {names:?}");
        }
    }
    for job in ["linear_cross_entropy", "mamba mixer"] {
        let name = format!("{job} forward and backward");
        assert!(names.contains(&name.as_str()), "{name}: {names:?}");
    }
    assert!(names.contains(&"adamw step"), "{names:?}");
    let training = report["training"].as_array().unwrap();
    assert_eq!(training.len(), 2, "{training:?}");
    assert!(training.iter().all(|model| model["fits"] == true), "{training:?}");

    let mut found = Vec::new();
    for part in ["limits", "figures", "training", "seconds"] {
        numbers(&report[part], part.into(), &mut found);
    }
    found.retain(|(path, _)| !path.contains(".work."));
    assert!(found.len() > 100, "{}", found.len());
    for (path, number) in found {
        assert!(number.is_finite() && number > 0.0, "{path} is {number}");
    }
    assert!(report["inference"].is_null() && report["scan_scaling"].as_array().unwrap().is_empty());
}

#[test]
fn wrong_calls() {
    let program = Program::new();
    program.run(&["bench", "scam"]).fails(2, &["scam", "scan"]);
    program.run(&["bench", "--repeats", "0"]).fails(2, &["--repeats"]);
    program.run(&["bench", "--quick", "--weights", "q3"]).fails(2, &["q3", "q4_k"]);
    program.run(&["bench", "decode", "--quick", "--batch", "0"]).fails(2, &["--batch", "65536"]);
    program.run(&["bench", "--quick", "--dtype", "bf16"]).fails(2, &["f32"]);
    program.run(&["bench", "--quick", "--prompt-tokens", "0"]).fails(2, &["--prompt-tokens"]);
    let unknown = ["bench", "--device", "cuda:emulated", "--model-shape", "131m"];
    program.run(&unknown).fails(2, &["131m", "mamba-130m"]);
    if elapid::tensor::cuda::Gpu::emulated().is_ok() {
        program.run(&["bench", "--device", "cuda:emulated"]).fails(2, &["--quick"]);
        for prompts in ["prefill --prompt-tokens 0", "decode --dtype f32 --prompt-tokens 4"] {
            let call = format!("bench --device cuda:emulated --quick {prompts}");
            program.run(&call.split(' ').collect::<Vec<_>>()).fails(2, &["--prompt-tokens"]);
        }
    }
}
