//! `elapid generate` from prompt to text.

mod program;

use program::{Program, golden, golden_with_tokenizer};

fn generate<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "--model", "model"], more].concat()
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let program = Program::with_model();
    let sample = |seed: &str, threads: &str| {
        let call = ["--prompt", "The ", "-n", "60", "--seed", seed, "--threads", threads];
        program.run(&generate(&call)).ok()
    };
    let text = sample("1", "2");
    assert!(!text.is_empty());
    assert_eq!(text, sample("1", "2"));
    assert_eq!(text, sample("1", "1"));
    assert_ne!(text, sample("2", "2"));
}

#[test]
fn json_is_one_object_that_says_the_same() {
    let program = Program::with_model();
    let call = ["--prompt", "The ", "-n", "60", "--seed", "1"];
    let text = program.run(&generate(&call)).ok();
    let report = program.run(&generate(&[&call[..], &["--json"]].concat())).json();
    assert_eq!(report["text"], text.as_str());
    assert_eq!(report["tokens"].as_array().unwrap().len(), 60);
    assert_eq!(report["prompt_tokens"], 4);
    assert_eq!(report["finish"], "length");
    assert_eq!(report["seed"], 1);
    assert!(report["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
    let bytes: Vec<u8> = report["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| u8::try_from(token.as_u64().unwrap()).unwrap())
        .collect();
    assert_eq!(text, String::from_utf8_lossy(&bytes));
}

#[test]
fn a_drawn_seed_is_told_and_can_be_used_again() {
    let program = Program::with_model();
    let first = program.run(&generate(&["-n", "40", "--json"])).json();
    let seed = first["seed"].to_string();
    let again = program.run(&generate(&["-n", "40", "--json", "--seed", &seed])).json();
    assert_eq!(first["tokens"], again["tokens"]);
    let human = program.run(&generate(&["-n", "4", "--seed", &seed]));
    assert!(human.err.contains(&format!("seed {seed}")), "{}", human.err);
}

#[test]
fn the_prompt_comes_from_text_file_input_or_ids() {
    let program = Program::with_model();
    program.write("prompt.txt", "snake");
    let rest = ["-n", "30", "--temperature", "0"];
    let with = |more: &[&str]| program.run(&generate(&[more, &rest[..]].concat())).ok();
    let text = with(&["--prompt", "snake"]);
    assert_eq!(text, with(&["--prompt-file", "prompt.txt"]));
    assert_eq!(text, with(&["--tokens", "115,110,97,107,101"]));
    let piped = generate(&[&["--prompt-file", "-"], &rest[..]].concat());
    assert_eq!(text, program.run_with(b"snake", &piped).ok());
    assert_eq!(with(&[]), with(&["--prompt", "\n"]));
    // Bytes that are no text are a prompt too.
    program.run_with(&[0xFF, 0x00, 0xC3], &piped).ok();
    program.run_with(b"", &piped).fails(2, &["empty"]);
    program.run(&generate(&["--prompt-file", "none.txt"])).fails(1, &["none.txt"]);
}

#[test]
fn stop_strings_end_the_text_and_are_not_printed() {
    let program = Program::with_model();
    let call = ["--prompt", "x", "-n", "200", "--seed", "5"];
    let text = program.run(&generate(&call)).ok();
    // Some neighbouring pair of ASCII characters of the free text.
    let chars: Vec<char> = text.chars().collect();
    let pair = chars.windows(2).skip(20).find(|pair| pair.iter().all(char::is_ascii_graphic));
    let stop: String = pair.unwrap().iter().collect();
    let call = [&call[..], &["--stop", "not in there", "--stop", &stop]].concat();
    let stopped = program.run(&generate(&call));
    assert!(stopped.err.contains("stop string"), "{}", stopped.err);
    let stopped = stopped.ok();
    assert_eq!(Some(stopped.as_str()), text.split(&stop).next());
    let report = program.run(&generate(&[&call[..], &["--json"]].concat())).json();
    assert_eq!(
        (report["text"].as_str(), report["finish"].as_str()),
        (Some(&*stopped), Some("stop"))
    );
}

#[test]
fn a_saved_state_goes_on_as_if_never_interrupted() {
    let program = Program::with_model();
    let sampling = ["--seed", "8", "--json"];
    let run = |more: &[&str]| program.run(&generate(&[more, &sampling[..]].concat())).json();
    let tokens = |report: &serde_json::Value| report["tokens"].as_array().unwrap().clone();

    // The prompt in two parts.
    let whole = run(&["--prompt", "Once upon a time", "-n", "30"]);
    run(&["--prompt", "Once upon", "-n", "0", "--state-out", "half.state"]);
    let rest = run(&["--prompt", " a time", "-n", "30", "--state-in", "half.state"]);
    assert_eq!(tokens(&whole), tokens(&rest));

    // Interrupted in the middle of generating, or right after the prompt: it goes on by itself.
    let first = run(&["--prompt", "Once upon a time", "-n", "10", "--state-out", "ten.state"]);
    assert_eq!(tokens(&first), tokens(&whole)[..10]);
    let rest = run(&["-n", "20", "--state-in", "ten.state"]);
    assert_eq!(tokens(&rest), tokens(&whole)[10..]);
    assert_eq!(rest["prompt_tokens"], 0);
    // Where nothing was read, or nothing decoded, there is no speed of it.
    let human = program.run(&generate(&["-n", "1", "--seed", "8", "--state-in", "ten.state"])).err;
    assert!(human.contains("prompt: 0 tokens · new: 1 token · length reached"), "{human}");
    run(&["--prompt", "Once upon a time", "-n", "0", "--state-out", "read.state"]);
    let all = run(&["-n", "30", "--state-in", "read.state"]);
    assert_eq!(tokens(&all), tokens(&whole));
    // What comes next may also be given.
    let next = tokens(&whole)[10].to_string();
    let rest = run(&["--tokens", &next, "-n", "19", "--state-in", "ten.state"]);
    assert_eq!(tokens(&rest), tokens(&whole)[11..]);

    // A state without logits needs something to go on with.
    program.write("ids.json", "[72, 101]");
    let forward = ["forward", "--model", "model", "--tokens", "ids.json", "--out", "l.safetensors"];
    program.run(&[&forward[..], &["--state-out", "bare.state"]].concat()).ok();
    program.run(&generate(&["--state-in", "bare.state"])).fails(2, &["bare.state", "--prompt"]);
    let damaged = {
        let mut bytes = std::fs::read(program.path("ten.state")).unwrap();
        let last = bytes.len() - 9;
        bytes[last] ^= 4;
        bytes
    };
    program.write("bad.state", damaged);
    let call = generate(&["--prompt", "a", "--state-in", "bad.state"]);
    program.run(&call).fails(1, &["bad.state", "checksum"]);
    let golden = golden().join("hf");
    let golden = golden.to_str().unwrap();
    program
        .run(&["generate", "--model", golden, "--tokens", "1", "--state-in", "ten.state"])
        .fails(1, &["ten.state", "another model"]);
}

#[test]
fn a_model_without_bytes_takes_and_prints_ids() {
    let program = Program::new();
    let folder = golden().join("hf");
    let model = folder.to_str().unwrap();
    let call = |more: &[&str]| program.run(&[&["generate", "--model", model], more].concat());
    call(&["--prompt", "text"]).fails(2, &["264 tokens", "tokenizer.json", "--tokens"]);
    call(&["--tokens", "1", "--stop", "x"]).fails(2, &["--stop"]);
    let text = call(&["--tokens", "5,9,200", "-n", "6", "--temperature", "0"]).ok();
    let ids: Vec<u32> = text.trim().split(',').map(|id| id.parse().unwrap()).collect();
    assert_eq!(ids.len(), 6);
    let report = call(&["--tokens", "5,9,200", "-n", "6", "--temperature", "0", "--json"]).json();
    assert_eq!(report["tokens"], serde_json::json!(ids));
    assert!(report["text"].is_null());
}

#[test]
fn a_model_with_a_tokenizer_reads_and_writes_text() {
    use elapid::formats::Tokenizer;

    let program = Program::new();
    golden_with_tokenizer(&program);
    let call = |more: &[&str]| {
        let fixed = ["--temperature", "0", "--ignore-eos"];
        program.run(&[&["generate", "--model", "words"], &fixed[..], more].concat())
    };
    let report = call(&["--prompt", "the the", "-n", "24", "--json"]).json();
    assert_eq!(report["prompt_tokens"], 2);
    let ids: Vec<u32> = serde_json::from_value(report["tokens"].clone()).unwrap();
    let same = call(&["--tokens", "257,258", "-n", "24", "--json"]).json();
    assert_eq!(report["tokens"], same["tokens"]);
    let tokenizer = Tokenizer::open(&program.path("words/tokenizer.json")).unwrap();
    let text = tokenizer.decode(&ids, true).unwrap();
    assert_eq!(report["text"], text.as_str());
    assert_eq!(call(&["--prompt", "the the", "-n", "24"]).ok(), text);

    // The last token of some run, as the model's end of sequence.
    let end = ids[7];
    let first = ids.iter().position(|&id| id == end).unwrap();
    program.write("words/generation_config.json", format!("{{\"eos_token_id\": [{end}]}}"));
    assert_eq!(call(&["--prompt", "the the", "-n", "24"]).ok(), text);
    let honoured = ["generate", "--model", "words", "--temperature", "0", "--json"];
    let more = ["--prompt", "the the", "-n", "24"];
    let stopped = program.run(&[&honoured[..], &more[..]].concat()).json();
    assert_eq!(stopped["finish"], "end_of_sequence");
    assert_eq!(stopped["tokens"], serde_json::json!(ids[..=first]));
    let before = tokenizer.decode(&ids[..first], true).unwrap();
    assert_eq!(stopped["text"], before.as_str());

    // A stop string, from the middle of a token where it can be.
    let chars: Vec<char> = text.chars().collect();
    let pair = chars.windows(2).skip(1).find(|pair| pair.iter().all(char::is_ascii_graphic));
    let stop: String = pair.unwrap().iter().collect();
    let stopped = call(&["--prompt", "the the", "-n", "24", "--stop", &stop]).ok();
    assert_eq!(Some(stopped.as_str()), text.split(&stop).next());
    call(&["--prompt", ""]).fails(2, &["empty"]);
    let piped = ["generate", "--model", "words", "--prompt-file", "-"];
    program.run_with(&[0xFF], &piped).fails(1, &["tokenizer.json", "UTF-8"]);
}

#[test]
fn a_tokenizer_may_lie_elsewhere() {
    let program = Program::new();
    golden_with_tokenizer(&program);
    let bare = golden().join("hf");
    let call = |tokenizer: &str| {
        let call = ["generate", "--model", bare.to_str().unwrap(), "--prompt", "the", "--json"];
        program.run(&[&call[..], &["-n", "3", "--tokenizer", tokenizer]].concat())
    };
    assert_eq!(call("words/tokenizer.json").json()["prompt_tokens"], 1);
    assert_eq!(call("words").json()["prompt_tokens"], 1);
    call("none.json").fails(1, &["none.json"]);
    program.write("words/tokenizer.json", "{\"model\": 3}");
    call("words").fails(1, &["tokenizer.json", "no usable tokenizer"]);
}

/// The lines of JSON, by their index.
fn lines(text: &str) -> Vec<serde_json::Value> {
    let mut lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines.sort_by_key(|line| line["index"].as_u64());
    lines
}

#[test]
fn many_prompts_get_what_each_gets_alone() {
    let program = Program::with_model();
    program.write("prompts.txt", "The snake\n\nx\nOnce upon a time there was\n");
    let call = ["-n", "25", "--temperature", "0"];
    let text = program.run(&generate(&[&["--prompts", "prompts.txt"], &call[..]].concat())).ok();
    let found = lines(&text);
    assert_eq!(found.len(), 3);
    for (line, prompt) in found.iter().zip(["The snake", "x", "Once upon a time there was"]) {
        let alone = program.run(&generate(&[&["--prompt", prompt], &call[..]].concat())).ok();
        assert_eq!(line["text"], alone);
        assert_eq!(
            (&line["finish"], &line["prompt_tokens"]),
            (&"length".into(), &prompt.len().into())
        );
    }
    let human = program.run(&generate(&[&["--prompts", "prompts.txt"], &call[..]].concat())).err;
    assert!(human.contains("3 prompts: 36 tokens at "), "{human}");
    assert!(human.contains(" · new: 75 tokens at "), "{human}");
    // A small batch, standard input, and options of their own.
    let json = r#"{"prompt": "The snake", "max_tokens": 3}
        {"tokens": [120], "temperature": 0.9, "seed": 5, "id": 0, "max_tokens": 40}
        {"prompt": "y", "stop": ["e", "o", "a", "i"], "seed": 1, "temperature": 1.0, "max_tokens": 500}"#;
    let call = ["--prompts", "-", "--jsonl", "--batch", "2", "-n", "25", "--temperature", "0"];
    let text = program.run_with(json.as_bytes(), &generate(&call)).ok();
    let own = lines(&text);
    assert_eq!(
        own[0]["tokens"].as_array().unwrap()[..],
        found[0]["tokens"].as_array().unwrap()[..3]
    );
    let call = ["--prompt", "x", "-n", "40", "--temperature", "0.9", "--seed", "5"];
    assert_eq!(own[1]["text"], program.run(&generate(&call)).ok());
    assert_eq!(own[1]["seed"], 5);
    // In the order of their ends.
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(first, own[0]);
    assert_eq!(own[2]["finish"], "stop");
}

#[test]
fn wrong_lines_are_named_and_those_before_them_run() {
    let program = Program::with_model();
    let run = |name: &str, content: &str| {
        program.write(name, content);
        program.run(&generate(&["--prompts", name, "-n", "2"]))
    };
    let outcome = run("a.jsonl", "{\"prompt\": \"a\"}\n{\"promt\": \"b\"}\n");
    assert_eq!(lines(&outcome.out).len(), 1);
    outcome.fails(2, &["a.jsonl, line 2", "promt"]);
    run("b.jsonl", "{\"prompt\": \"a\", \"tokens\": [1]}").fails(2, &["line 1", "either"]);
    run("c.jsonl", "{\"tokens\": [256]}").fails(2, &["prompt 0", "token 256"]);
    run("d.jsonl", "{\"prompt\": \"a\", \"top_p\": 2}").fails(2, &["top_p"]);
    program.run(&generate(&["--prompts", "none.txt"])).fails(1, &["none.txt"]);
    let both = ["--prompts", "a.jsonl", "--prompt", "x"];
    program.run(&generate(&both)).fails(2, &["--prompt"]);
    assert_eq!(run("empty.txt", "\n").ok(), "");
}

#[test]
fn samples_of_a_prompt_differ_and_the_first_is_the_usual_one() {
    let program = Program::with_model();
    let call = ["--prompt", "Once upon", "-n", "20", "--seed", "3"];
    let usual = program.run(&generate(&call)).ok();
    let samples = program.run(&generate(&[&call[..], &["--samples", "3"]].concat()));
    // The prompt was read once, before the samples.
    assert!(samples.err.contains("prompt: 9 tokens at "), "{}", samples.err);
    assert!(!samples.err.contains("at 0.0 tokens/s"), "{}", samples.err);
    assert!(samples.err.contains(" · 3 samples: 60 tokens at "), "{}", samples.err);
    let samples = lines(&samples.ok());
    assert_eq!(samples.len(), 3);
    assert_eq!(samples[0]["text"], usual);
    assert_ne!(samples[0]["text"], samples[1]["text"]);
    assert_ne!(samples[1]["text"], samples[2]["text"]);
    assert_eq!(samples[2]["prompt_tokens"], 9);
}

#[test]
fn weights_of_few_bits_run_on_the_decode_engine() {
    let program = Program::with_model();
    let call = ["--prompt", "The ", "-n", "30", "--seed", "1", "--device", "cpu", "--json"];
    let exact = program.run(&generate(&call)).json();
    for weights in ["f32", "bf16", "q8_0"] {
        let report = program.run(&generate(&[&call[..], &["--weights", weights]].concat())).json();
        assert_eq!(report["tokens"].as_array().unwrap().len(), 30);
        assert_eq!(report["dtype"], weights);
        if weights == "f32" {
            assert_eq!(report["tokens"], exact["tokens"]);
        }
        let threads = [&call[..], &["--weights", weights, "--threads", "1"]].concat();
        assert_eq!(program.run(&generate(&threads)).json()["tokens"], report["tokens"]);
    }
    let refused = program.run(&generate(&["--weights", "q3_0", "--prompt", "x"]));
    assert!(refused.err.contains("q3_0") && refused.err.contains("q8_0"), "{}", refused.err);
}

#[test]
fn the_state_of_decode_steps_has_its_type_on_a_gpu_only() {
    let program = Program::with_model();
    let call = |more: &[&str]| {
        let narrow = ["-n", "1", "--state-dtype", "bf16"];
        program.run(&generate(&[&narrow[..], more].concat()))
    };
    call(&["--device", "cpu"]).fails(2, &["--state-dtype", "--device cuda"]);
    let half = generate(&["-n", "1", "--state-dtype", "f16"]);
    program.run(&half).fails(2, &["--state-dtype", "f16", "bf16"]);
    if let Err(error) = elapid::tensor::cuda::Gpu::emulated() {
        eprintln!("SKIPPED: the state's type on the emulated GPU: {error}");
        return;
    }
    call(&["--device", "cuda:emulated"]).fails(2, &["--state-dtype", "--dtype bf16"]);
}

#[test]
fn on_a_gpu_blocks_of_a_file_stay_blocks() {
    if let Err(error) = elapid::tensor::cuda::Gpu::emulated() {
        eprintln!("SKIPPED: a file's blocks on the emulated GPU: {error}");
        return;
    }
    let program = Program::with_model();
    let wide = elapid::MambaConfig::bytes(256, 1);
    let mut wide = elapid::LanguageModel::new(&wide, 4).unwrap();
    elapid::formats::hf::save_model(&program.path("wide"), &mut wide, elapid::tensor::DType::F32)
        .unwrap();
    let write = |model: &str, file: &str, more: &[&str]| {
        program.run(&[&["quantize", model, file], more].concat()).ok();
    };
    write("model", "q8_0.gguf", &["--type", "q8_0"]);
    write("model", "q4_0.gguf", &["--type", "q4_0", "--embedding", "f16"]);
    write("wide", "q4_k.gguf", &["--type", "q4_k", "--embedding", "q6_k"]);
    let on_gpu = ["--device", "cuda:emulated", "--dtype", "bf16"];
    let on_cpu = ["--device", "cpu"];
    let run = |model: &str, device: &[&str], more: &[&str]| {
        let call = ["generate", "--model", model, "--prompt", "The ", "-n", "4", "--json"];
        let fixed = ["--temperature", "0"];
        program.run(&[&call[..], &fixed, device, more].concat())
    };
    for (model, kept) in
        [("model", "bf16"), ("q8_0.gguf", "q8_0"), ("q4_0.gguf", "q8_0"), ("q4_k.gguf", "q8_0")]
    {
        let report = run(model, &on_gpu, &[]).json();
        assert_eq!(report["dtype"], kept, "{model}");
        assert_eq!(report["tokens"].as_array().unwrap().len(), 4, "{model}");
        if model == "q8_0.gguf" {
            let given = run(model, &on_gpu, &["--weights", kept]).json();
            assert_eq!(given["tokens"], report["tokens"]);
        }
        let cpu = run(model, &on_cpu, &[]).json();
        assert_eq!(cpu["tokens"][0], report["tokens"][0], "{model}");
    }
    for weights in ["bf16", "q8_0"] {
        let report = run("q4_k.gguf", &on_gpu, &["--weights", weights]).json();
        assert_eq!(report["dtype"], weights);
    }
    run("q4_k.gguf", &on_gpu, &["--weights", "q4_k"]).fails(2, &["q4_k", "bf16 or q8_0"]);
    // What only reads text has no decode steps.
    program.write("book.txt", "The snake");
    program.write("ids.json", "[84, 104]");
    for command in [
        "eval --model q8_0.gguf --perplexity book.txt --weights q8_0",
        "forward --model q8_0.gguf --tokens ids.json --out out.safetensors --weights q8_0",
    ] {
        let call: Vec<&str> = command.split(' ').chain(on_gpu).collect();
        program.run(&call).fails(2, &["--weights", "generate", "--device cpu"]);
        let without: Vec<&str> =
            call.into_iter().filter(|a| !["--weights", "q8_0"].contains(a)).collect();
        program.run(&without).ok();
    }
}
