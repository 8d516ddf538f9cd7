//! `elapid inspect` and `elapid doctor`.

mod program;

use program::{Program, golden};
use serde_json::Value;

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
    for part in [
        "model file",
        "mamba2",
        "cannot be run",
        "general.architecture: mamba2",
        "layers.0.mixer.norm.weight",
        "[2, 8]",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let load = ["generate", "--model", "m2.gguf", "--tokens", "1"];
    program.run(&load).fails(1, &["m2.gguf", "Mamba-2 can be inspected, but not loaded"]);
}

/// Without a configuration, weights are shown as they are, with the architecture that their names tell.
#[test]
fn files_without_a_configuration() {
    let program = Program::new();
    let files = [
        ("hf/model.safetensors", "bare.safetensors"),
        ("original/pytorch_model.bin", "bare.bin"),
        ("original/pytorch_model.bin", "bare.pt"),
        ("original/pytorch_model.bin", "bare.pth"),
        ("../../numpy/arrays.npz", "arrays.npz"),
        ("../../pytorch/zip_2.pt", "zip_2.pt"),
    ];
    for (from, to) in files {
        std::fs::copy(golden().join(from), program.path(to)).unwrap();
    }
    for (_, file) in &files[..4] {
        let report = program.run(&["inspect", file, "--json"]).json();
        assert_eq!(report["kind"], "model", "{file}");
        let model = &report["model"];
        assert_eq!(model["architecture"], "mamba or falcon_mamba", "{file}");
        assert_eq!((&model["problem"], &model["config"]), (&"no config".into(), &Value::Null));
        assert_eq!(model["parameters"], 147_776, "{file}");
        let sizes = ["layers", "d_model", "d_inner", "d_state", "d_conv", "dt_rank"];
        assert_eq!(sizes.map(|size| model[size].as_u64().unwrap()), [4, 64, 128, 16, 4, 4]);
        assert_eq!(report["files"][0]["dtypes"]["F32"], report["files"][0]["elements"]);
        let text = program.run(&["inspect", file, "--tensors"]).ok();
        for part in ["model file", "(no config)", "147,776", "A_log", "[128, 16]", "8.2 kB"] {
            assert!(text.contains(part), "{file}: {part}: {text}");
        }
    }
    for (file, tensor, shape) in
        [("arrays.npz", "  b  BF16", "[3]"), ("zip_2.pt", "transposed", "[6, 4]")]
    {
        let report = program.run(&["inspect", file, "--json"]).json();
        assert_eq!(report["kind"], "tensors", "{file}");
        assert_eq!(report["model"]["architecture"], Value::Null, "{file}");
        let text = program.run(&["inspect", file, "--tensors"]).ok();
        for part in ["file of tensors", "not known: no config", tensor, shape] {
            assert!(text.contains(part), "{file}: {part}: {text}");
        }
    }
    // A folder of weights alone is no different.
    std::fs::create_dir(program.path("folder")).unwrap();
    std::fs::copy(program.path("bare.pt"), program.path("folder/bare.pt")).unwrap();
    let text = program.run(&["inspect", "folder"]).ok();
    assert!(text.contains("model folder") && text.contains("(no config)"), "{text}");
    // A configuration that is damaged is another matter.
    program.write("folder/config.json", "{");
    program.run(&["inspect", "folder"]).fails(1, &["config.json", "JSON"]);
    program.write("folder/config.json", r#"{"model_type": "mamba", "hidden_size": -1}"#);
    program.run(&["inspect", "folder"]).fails(1, &["config.json", "hidden_size"]);
}

/// The tensors of a Mamba-2 of two layers: D 8, E 16, N 4, G 2, 4 heads, V 16.
fn mamba2(program: &Program, file: &str, embedding: &str) {
    use elapid::tensor::Tensor;

    let mut tensors = vec![(embedding.to_owned(), Tensor::zeros::<f32>([16, 8]))];
    tensors.push(("backbone.norm_f.weight".into(), Tensor::zeros::<f32>([8])));
    for layer in 0..2 {
        for (name, shape) in [
            ("norm.weight", &[8][..]),
            ("mixer.in_proj.weight", &[2 * 16 + 2 * 8 + 4, 8]),
            ("mixer.conv1d.weight", &[16 + 2 * 8, 1, 4]),
            ("mixer.conv1d.bias", &[16 + 2 * 8]),
            ("mixer.dt_bias", &[4]),
            ("mixer.A_log", &[4]),
            ("mixer.D", &[4]),
            ("mixer.norm.weight", &[16]),
            ("mixer.out_proj.weight", &[8, 16]),
        ] {
            tensors.push((format!("backbone.layers.{layer}.{name}"), Tensor::zeros::<f32>(shape)));
        }
    }
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    elapid::formats::save_tensors(&program.path(file), tensors, []).unwrap();
}

/// Nor can a folder of a Mamba-2 be loaded, of either layout, but looked into.
#[test]
fn folders_of_mamba_2() {
    let program = Program::new();
    let parameters = 16 * 8 + 8 + 2 * (8 + 52 * 8 + 32 * 4 + 32 + 3 * 4 + 16 + 8 * 16);
    // As transformers writes it, with numbers that JSON does not know.
    let hf = r#"{"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_size": 8, "state_size": 4,
        "n_groups": 2, "num_heads": 4, "head_dim": 4, "time_step_limit": [0.0, Infinity]}"#;
    let original = r#"{"d_model": 8, "d_intermediate": 0, "n_layer": 2, "vocab_size": 15, "attn_layer_idx": [],
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "ngroups": 2, "headdim": 4}, "pad_vocab_size_multiple": 16}"#;
    for (folder, config, embedding) in [
        ("hf", Some(hf), "backbone.embeddings.weight"),
        ("original", Some(original), "backbone.embedding.weight"),
        ("bare", None, "backbone.embeddings.weight"),
    ] {
        std::fs::create_dir(program.path(folder)).unwrap();
        let weights = format!("{folder}/model.safetensors");
        mamba2(&program, &weights, embedding);
        if let Some(config) = config {
            program.write(&format!("{folder}/config.json"), config);
        }
        for path in [folder, &weights] {
            let report = program.run(&["inspect", path, "--json"]).json();
            assert_eq!(report["kind"], "model", "{path}");
            let model = &report["model"];
            assert_eq!(model["architecture"], "mamba2", "{path}");
            assert_eq!(model["layout"], if folder == "original" { "original" } else { "hf" });
            assert_eq!(model["parameters"], parameters, "{path}");
            let sizes = ["layers", "d_model", "d_inner", "heads", "head_width", "vocabulary_rows"];
            assert_eq!(sizes.map(|size| model[size].as_u64().unwrap()), [2, 8, 16, 4, 4, 16]);
            let divided = [&model["groups"], &model["d_state"]];
            match config {
                Some(_) => assert_eq!(divided.map(Value::as_u64), [Some(2), Some(4)]),
                None => assert!(divided[0].is_null() && model["groups_times_state"] == 8),
            }
            let text = program.run(&["inspect", path, "--tensors"]).ok();
            let problem = match config {
                Some(_) => "cannot be run",
                None => "mamba2 (no config)",
            };
            for part in [problem, "mixer.dt_bias", "F32", "[52, 8]", "conv taps W"] {
                assert!(text.contains(part), "{path}: {part}: {text}");
            }
        }
        let load = ["generate", "--model", folder, "--tokens", "1"];
        program.run(&load).fails(1, &["config.json"]);
    }
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
