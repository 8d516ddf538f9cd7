//! `elapid inspect` and `elapid doctor`.

mod program;

use program::{Program, golden};

#[test]
fn a_model_folder_is_described_from_its_headers() {
    let program = Program::new();
    let folder = golden().join("hf_bf16");
    let folder = folder.to_str().unwrap();
    let report = program.run(&["inspect", folder, "--json"]).json();
    assert_eq!(report["kind"], "model");
    assert_eq!(report["model"]["parameters"], 147_776);
    assert_eq!(report["model"]["config"]["n_layer"], 4);
    let file = &report["files"][0];
    assert_eq!(file["name"], "model.safetensors");
    assert_eq!(file["elements"], 147_776);
    assert_eq!(file["dtypes"]["BF16"], 147_776);
    assert_eq!(file["tensors"].as_array().unwrap().len(), 4 * 10 + 2);
    let text = program.run(&["inspect", folder, "--tensors"]).ok();
    for part in ["model folder", "147,776", "BF16", "backbone.layers.3.mixer.A_log", "[128, 16]"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!program.run(&["inspect", folder]).ok().contains("A_log"));
}

#[test]
fn state_files_and_other_files() {
    let program = Program::with_model();
    let call = ["generate", "--model", "model", "--prompt", "abc", "-n", "5"];
    program.run(&[&call[..], &["--state-out", "s.state"]].concat()).ok();
    let report = program.run(&["inspect", "s.state", "--json"]).json();
    assert_eq!(report["kind"], "state");
    assert_eq!(report["state"]["positions"], serde_json::json!([8]));
    assert_eq!(report["state"]["model"]["d_model"], 32);
    let text = program.run(&["inspect", "s.state"]).ok();
    assert!(text.contains("recurrent state") && text.contains("checksum"), "{text}");

    let expected = golden().join("expected.safetensors");
    let text = program.run(&["inspect", expected.to_str().unwrap(), "--tensors"]).ok();
    assert!(text.contains("safetensors file") && text.contains("grad.backbone"), "{text}");
    program.run(&["convert", "model", "model.gguf"]).ok();
    let text = program.run(&["inspect", "model.gguf"]).ok();
    assert!(text.contains("GGUF, names of the llama.cpp layout"), "{text}");
    program.write("junk", "this is no tensor file");
    for call in [&["inspect"][..], &["generate", "--tokens", "1", "--model"]] {
        let known = ["junk", "safetensors", "PyTorch", ".npz", "GGUF"];
        program.run(&[call, &["junk"]].concat()).fails(1, &known);
    }
    program.write("junk.safetensors", "this is no tensor file");
    program.run(&["inspect", "junk.safetensors"]).fails(1, &["junk.safetensors", "header"]);
    program.run(&["inspect", "none"]).fails(1, &["none"]);
}

/// A Mamba-2 cannot be loaded, but looked into.
#[test]
fn a_gguf_of_mamba_2() {
    use elapid::formats::gguf::{ElementType, Planned, Value, write_gguf};

    let program = Program::new();
    let tensors = [
        ("token_embd.weight", vec![10, 8]),
        ("blk.0.ssm_norm.weight", vec![2, 8]),
        ("blk.0.ssm_dt.bias", vec![4]),
    ];
    let plan = tensors.each_ref().map(|(name, shape)| Planned {
        name: (*name).into(),
        shape: shape.clone(),
        element: ElementType::new(0).unwrap(),
        bytes: 4 * shape.iter().product::<usize>() as u64,
    });
    let metadata = [
        ("general.architecture".to_owned(), Value::from("mamba2")),
        ("mamba2.block_count".to_owned(), Value::U32(1)),
        ("mamba2.ssm.group_count".to_owned(), Value::U32(2)),
    ];
    let mut file = std::fs::File::create(program.path("m2.gguf")).unwrap();
    write_gguf(&mut file, &metadata, &plan, |index, out| {
        out.write_all(&vec![0; plan[index].bytes as usize])
    })
    .unwrap();
    let text = program.run(&["inspect", "m2.gguf", "--tensors"]).ok();
    for part in
        ["file of tensors", "general.architecture: mamba2", "layers.0.mixer.norm.weight", "[2, 8]"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let load = ["generate", "--model", "m2.gguf", "--tokens", "1"];
    program.run(&load).fails(1, &["m2.gguf", "Mamba-2 can be inspected, but not loaded"]);
}

#[test]
fn doctor_finds_this_machine_sound() {
    let program = Program::with_model();
    let report = program.run(&["doctor", "--model", "model", "--json", "--threads", "1"]).json();
    assert_eq!(report["healthy"], true);
    assert_eq!(report["threads"], 1);
    assert_eq!(report["model"]["logits_finite"], true);
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 6 && checks.iter().all(|check| check["passed"] == true), "{checks:?}");
    let human = program.run(&["doctor"]);
    assert!(human.err.contains("selective_scan") && human.out.is_empty(), "{}", human.err);

    // A weight that is not a number is found.
    let weights = program.path("model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    program.run(&["doctor", "--model", "model"]).fails(1, &["model.safetensors", "finite", "NaN"]);
}
