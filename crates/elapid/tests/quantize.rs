//! `elapid quantize`: smaller weights, what they cost, and that the file runs.

mod program;

use program::{Program, golden_with_tokenizer};

#[test]
fn a_model_of_blocks_is_smaller_close_to_the_original_and_runs() {
    let program = Program::with_model();
    program.write("text.txt", "The snake lay in the sun. ".repeat(30));
    let call = |blocks: &'static str| {
        let target = format!("{blocks}.gguf");
        let report = format!("{blocks}.json");
        let arguments = ["quantize", "model", &target, "--type", blocks, "--json"];
        let compare = ["--report", &report, "--text", "text.txt", "--tokens", "400"];
        let printed = program.run(&[&arguments[..], &compare].concat()).json();
        let written = std::fs::read_to_string(program.path(&report)).unwrap();
        let written: serde_json::Value = serde_json::from_str(&written).unwrap();
        assert_eq!(printed, written);
        assert_eq!(written["text"]["tokens"], 400);
        let size = std::fs::metadata(program.path(&target)).unwrap().len();
        assert!(size < 2 * written["bytes_before"].as_u64().unwrap(), "{size}");
        assert!(written["bytes"].as_u64() < written["bytes_before"].as_u64());
        let generate = ["generate", "--model", &target, "--prompt", "The ", "-n", "8", "--json"];
        let text = program.run(&generate).json();
        assert_eq!(text["tokens"].as_array().unwrap().len(), 8);
        let comparison = &written["comparison"];
        let perplexity = |of: &str| comparison[of]["token_perplexity"].as_f64().unwrap();
        let change = (perplexity("other") / perplexity("original") - 1.0).abs();
        (comparison["mean"].as_f64().unwrap(), change)
    };
    let (eight, four) = (call("q8_0"), call("q4_0"));
    assert!((0.0..1e-3).contains(&eight.0) && eight.1 < 0.01, "{eight:?}");
    assert!(four.0 > eight.0, "{four:?} {eight:?}");
}

#[test]
fn the_bytes_of_a_report_are_those_of_the_tokens_that_were_read() {
    let program = Program::new();
    golden_with_tokenizer(&program);
    // "the" and " the" are tokens; every other byte is one, so a letter with an accent is two and the snake four.
    let line = "the the th\u{e9} \u{1f40d} sun the ";
    program.write("text.txt", line.repeat(400));
    let report = |text: &str, tokens: &str| {
        let target = ["quantize", "words", "words.gguf", "--type", "q8_0", "--report", "r.json"];
        let more = ["--text", text, "--tokens", tokens, "--json"];
        program.run(&[&target[..], &more].concat()).json()
    };
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    for most in 2..40u64 {
        let report = report("text.txt", &most.to_string());
        let (tokens, bytes) = (number(&report["text"]["tokens"]), number(&report["text"]["bytes"]));
        // Tokens of a character that does not fit are left out: three at most.
        assert!((most.saturating_sub(3)..=most).contains(&tokens), "{tokens} of {most}");
        let comparison = &report["comparison"];
        for model in ["original", "other"] {
            assert_eq!(number(&comparison[model]["tokens"]), tokens);
            assert_eq!(number(&comparison[model]["bytes"]), bytes);
        }
        let own = &line.repeat(400)[..bytes as usize];
        // What `elapid eval` finds of a file that ends there.
        program.write("own.txt", own);
        let eval = ["eval", "--model", "words", "--perplexity", "own.txt", "--json"];
        let eval = program.run(&eval).json();
        for name in ["tokens", "bytes", "words", "bits_per_byte", "word_perplexity"] {
            let [found, goal] = [&comparison["original"][name], &eval[name]];
            let (found, goal) = (found.as_f64().unwrap(), goal.as_f64().unwrap());
            assert!((found / goal - 1.0).abs() < 1e-9, "{name} of {own:?}: {found}, {goal}");
        }
    }
    // Characters of two bytes, of which some must be cut where one begins.
    program.write("accents.txt", format!("x{}", "\u{e9}".repeat(100)));
    let report = report("accents.txt", "9");
    assert_eq!((&report["text"]["tokens"], &report["text"]["bytes"]), (&9.into(), &9.into()));
}

#[test]
fn wrong_calls_name_what_is_wrong() {
    let program = Program::with_model();
    program.run(&["quantize", "model", "x.gguf", "--type", "f16"]).fails(2, &["f16", "convert"]);
    program.run(&["quantize", "model", "x.gguf", "--type", "q3"]).fails(2, &["q3", "q4_k"]);
    program.run(&["quantize", "model", "x.gguf"]).fails(2, &["--type"]);
    let golden = program::golden().join("hf");
    let report =
        ["quantize", golden.to_str().unwrap(), "x.gguf", "--type", "q8_0", "--report", "r"];
    program.run(&report).fails(2, &["no tokenizer", "--tokenizer"]);
    let given = [&report[..], &["--tokenizer", "missing.json"]].concat();
    program.run(&given).fails(1, &["missing.json"]);
    program.run(&["quantize", "none", "x.gguf", "--type", "q8_0"]).fails(1, &["none"]);
    let empty = ["quantize", "model", "x.gguf", "--type", "q8_0", "--report", "r.json"];
    program.write("empty.txt", "");
    program.run(&[&empty[..], &["--text", "empty.txt"]].concat()).fails(1, &["empty.txt"]);
}
