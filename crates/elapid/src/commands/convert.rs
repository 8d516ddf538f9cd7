//! `elapid convert`: a model from one format into another, bit for bit where the element type stays.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use elapid_formats::{ModelSource, convert, gguf};
use elapid_ops::blocks::Encoding;
use elapid_tensor::DType;
use serde_json::json;

use crate::cli::JsonArgument;
use crate::model_folder;
use crate::output::{bytes, grouped, print_json};
use crate::progress::{Bar, Unit};

const EXAMPLES: &str = "\
Examples:
  elapid convert mamba-130m mamba-130m-hf               original layout to Hugging Face
  elapid convert mamba-130m-hf out --to original        a pytorch_model.bin that torch.load opens
  elapid convert falcon-mamba out --to hf-bin           likewise, names and config.json of Hugging Face
  elapid convert mamba-130m-hf mamba.npz                one NumPy archive, configuration included
  elapid convert mamba-130m-hf mamba.gguf               for llama.cpp
  elapid convert mamba-130m-hf half --dtype bf16        rounded to nearest

SRC is what --model takes: a folder or a file of any format. Bits stay where the element type stays; GGUF \
files keep -exp(A_log), and everything but projections and embedding in f32. From blocks of integers \
to other formats their values are written, in f32; elapid quantize makes blocks.
The tokenizer's files come along into a folder.";

/// Arguments of `elapid convert`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Model to read
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Folder or file to write
    #[arg(value_name = "DST")]
    target: PathBuf,
    /// Format to write [default: by the ending of DST: .npz, .gguf, else hf]
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<Target>,
    /// Element type to write: f32, bf16 or f16 [default: each tensor's own]
    #[arg(id = "dtype", long = "dtype", value_name = "TYPE", value_parser = dtype)]
    written: Option<DType>,
    #[command(flatten)]
    json: JsonArgument,
}

/// A format that models are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// A folder as transformers has it: config.json, model.safetensors
    Hf,
    /// A folder as transformers has it, with PyTorch's pickle: config.json, pytorch_model.bin
    HfBin,
    /// A folder as the original code has it: config.json, pytorch_model.bin
    Original,
    /// One NumPy archive
    Npz,
    /// One file as llama.cpp has it
    Gguf,
}

impl Target {
    fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("npz") => Self::Npz,
            Some("gguf") => Self::Gguf,
            _ => Self::Hf,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Hf => "hf",
            Self::HfBin => "hf-bin",
            Self::Original => "original",
            Self::Npz => "npz",
            Self::Gguf => "gguf",
        }
    }
}

/// Reads and writes.
pub fn run(arguments: &Arguments) -> Result<()> {
    let (from, to) = (model_folder::resolve(&arguments.source)?, &arguments.target);
    let source = ModelSource::open(&from)?;
    let target = arguments.to.unwrap_or_else(|| Target::of(to));
    match target {
        Target::Hf => convert::save_hugging_face(&source, to, arguments.written)?,
        Target::HfBin => {
            convert::save_hugging_face_pytorch(&source, to, arguments.written)?;
        }
        Target::Original => convert::save_original(&source, to, arguments.written)?,
        Target::Npz => convert::save_npz(&source, to, arguments.written)?,
        Target::Gguf => save_gguf(&source, to, arguments.written)?,
    }
    let size = size(to)?;
    if arguments.json.json {
        return print_json(&json!({
            "source": from.display().to_string(),
            "source_format": source.format().to_string(),
            "target": to.display().to_string(),
            "target_format": target.name(),
            "parameters": source.config().parameter_count(),
            "bytes": size,
        }));
    }
    eprintln!(
        "{} ({}) to {} ({}): {} parameters, {}",
        from.display(),
        source.format(),
        to.display(),
        target.name(),
        grouped(source.config().parameter_count() as u64),
        bytes(size)
    );
    Ok(())
}

fn save_gguf(source: &ModelSource, path: &Path, dtype: Option<DType>) -> Result<()> {
    let projections = match dtype {
        Some(DType::F16) => Some(Encoding::F16),
        Some(DType::BF16) => Some(Encoding::BF16),
        Some(_) => Some(Encoding::F32),
        None => None,
    };
    let plan = gguf::Plan::new(source, gguf::WeightTypes { projections, embedding: None })?;
    let vocabulary = gguf::vocabulary_of(source)?;
    let mut bar = Bar::new("converting", Unit::Bytes, 0, plan.bytes());
    Ok(gguf::save_gguf(source, &plan, vocabulary, path, &mut |done| bar.at(done))?)
}

/// Bytes of a file, or of a folder's files.
fn size(path: &Path) -> Result<u64> {
    let context = || format!("cannot read {}", path.display());
    let metadata = fs::metadata(path).with_context(context)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let entries = fs::read_dir(path).with_context(context)?;
    Ok(entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|file| file.len()).sum())
}

fn dtype(text: &str) -> Result<DType, String> {
    match text.parse::<DType>() {
        Ok(dtype @ (DType::F32 | DType::BF16 | DType::F16)) => Ok(dtype),
        _ => Err("expected f32, bf16 or f16; elapid quantize writes blocks of integers".into()),
    }
}
