//! Drives the real binary in a fresh folder.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use elapid::formats::hf;
use elapid::formats::tokenizer::{TokenKind, Vocabulary};
use elapid::tensor::DType;
use elapid::{LanguageModel, MambaConfig};
use tempfile::TempDir;

/// A fresh folder and the binary.
pub struct Program {
    folder: TempDir,
}

/// What a call gave.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Program {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// A fresh folder with a small byte-level model in `model/`.
    pub fn with_model() -> Self {
        let program = Self::new();
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 2), 4).unwrap();
        hf::save_model(&program.path("model"), &mut model, DType::F32).unwrap();
        program
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// The binary with these arguments, to be started in the folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        command.args(arguments).current_dir(self.folder.path()).env("NO_COLOR", "1");
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.command(arguments).stdin(Stdio::null()).output().unwrap())
    }

    /// With bytes on standard input.
    pub fn run_with(&self, input: &[u8], arguments: &[&str]) -> Outcome {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        Outcome::of(child.wait_with_output().unwrap())
    }

    /// With a standard output that nobody reads.
    pub fn run_into_closed_pipe(&self, arguments: &[&str]) -> Outcome {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        Outcome::of(child.wait_with_output().unwrap())
    }
}

impl Outcome {
    /// What a finished process said.
    pub fn of(output: Output) -> Self {
        let outcome = Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!outcome.err.contains("bug in elapid"), "{outcome:?}");
        outcome
    }

    /// The output of a call that must have worked.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}", self.err);
        self.out
    }

    /// The output as JSON.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// The message of a call that must have failed with `code`; it must contain `parts`.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains("error: "), "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is not in {}", self.err);
        }
    }
}

/// The golden Mamba-1 model, whose vocabulary is not bytes.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../elapid-formats/tests/fixtures/golden/mamba1")
}

/// The golden model in `words/` with a tokenizer of its size: the 256 bytes, some words, and a mark.
pub fn golden_with_tokenizer(program: &Program) {
    std::fs::create_dir(program.path("words")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join("hf").join(name), program.path("words").join(name)).unwrap();
    }
    let alphabet = (0..=255u8).map(|byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        0..=32 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        127..=160 => char::from_u32(0x121 + u32::from(byte) - 127).unwrap(),
        _ => '\u{143}',
    });
    let mut tokens: Vec<String> = alphabet.map(String::from).collect();
    tokens.extend(["th", "the", "Ġthe", "<|end|>"].map(String::from));
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    kinds[259] = TokenKind::Control;
    let merges = ["t h", "th e", "Ġ the"].map(String::from).into();
    let tokens = tokens.into_iter().collect();
    let words = Vocabulary { model: "gpt2".into(), tokens, kinds, merges, ..Vocabulary::default() };
    let text = words.to_json(Path::new("words")).unwrap().unwrap().to_string();
    program.write("words/tokenizer.json", text);
}
