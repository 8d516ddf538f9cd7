//! Times the parts of loading a model for decoding, and the self-check's share of them:
//! `cargo run --release -p elapid-infer --example load_speed MODEL [REPEATS]`. MODEL is a folder or a file.
//!
//! On a GPU it decodes in bf16, and the first round also loads kernels, which reading a prompt and the first step need anyway.
//! Without one it decodes on all processors, as the file is stored, in f32 and in q8_0, with and without the check in turns,
//! each time in a process of its own, as memory that was used before loads faster. The first round also brings the file into
//! memory. Medians are of the other rounds.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use elapid_formats::ModelSource;
use elapid_infer::{CpuEngine, GpuEngine, Loading, Rows, SelfCheck};
use elapid_ops::blocks::Encoding;
use elapid_tensor::{DType, Device};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let model = std::env::args().nth(1).ok_or("the model's folder or file is missing")?;
    let repeats: usize = match std::env::args().nth(2) {
        Some(text) => {
            text.parse().map_err(|_| format!("REPEATS is {text:?}, expected a number"))?
        }
        None => 9,
    };
    if let Some(encoding) = std::env::args().nth(3) {
        let checked = std::env::args().nth(4).is_some();
        println!("{}", load_once(Path::new(&model), encoding.parse().ok(), checked)?);
        return Ok(());
    }
    let started = Instant::now();
    let (device, _) = Device::best();
    let Some(gpu) = device.gpu()? else { return on_cpu(Path::new(&model), repeats) };
    println!("{device} found in {:.1} ms", 1e3 * started.elapsed().as_secs_f64());
    let source = ModelSource::open(Path::new(&model))?;
    let mut rounds = Vec::new();
    for round in 0..=repeats {
        let mut parts = [0.0; 4];
        let mut last = Instant::now();
        let mut end_of = |part: usize| {
            gpu.synchronize()?;
            parts[part] = 1e3 * last.elapsed().as_secs_f64();
            last = Instant::now();
            Ok::<_, Failure>(())
        };
        let mut model = source.load_on(device)?;
        model.place(device, DType::BF16)?;
        end_of(0)?;
        SelfCheck::of_source(&source).check(&mut model, Rows::AT_LOAD)?;
        end_of(1)?;
        let mut engine = GpuEngine::of_source(&mut model, &source, None)?;
        end_of(2)?;
        engine.check()?;
        end_of(3)?;
        match round {
            0 => println!("first round: {}", text(&parts)),
            _ => rounds.push(parts),
        }
    }
    let part = |part: usize| median(rounds.iter().map(|parts| parts[part]).collect());
    println!("medians:     {}", text(&[0, 1, 2, 3].map(part)));
    Ok(())
}

/// Milliseconds of a load on the CPU.
fn load_once(model: &Path, encoding: Option<Encoding>, checked: bool) -> Result<f64, Failure> {
    let threads = std::thread::available_parallelism()?.get();
    let check = checked.then_some(Rows::AT_LOAD);
    let loading = Loading { encoding, threads, check, progress: &mut |_, _| {} };
    let started = Instant::now();
    let source = ModelSource::open(model)?;
    let engine = CpuEngine::load(&source, loading)?;
    let time = started.elapsed();
    drop(engine);
    Ok(1e3 * time.as_secs_f64())
}

fn on_cpu(model: &Path, repeats: usize) -> Result<(), Failure> {
    for encoding in ["stored", "f32", "q8_0"] {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for round in 0..=repeats {
            // Either comes first in every other round.
            for checked in [round % 2 == 0, round % 2 != 0] {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(model).args(["1", encoding]).args(checked.then_some("checked"));
                let output = command.output()?;
                if !output.status.success() {
                    return Err(String::from_utf8_lossy(&output.stderr).into());
                }
                let time: f64 = std::str::from_utf8(&output.stdout)?.trim().parse()?;
                match (round, checked) {
                    (0, _) => {}
                    (_, true) => with.push(time),
                    (_, false) => without.push(time),
                }
            }
        }
        let extra =
            median(with.iter().zip(&without).map(|(with, without)| with - without).collect());
        let (with, without) = (median(with), median(without));
        println!(
            "cpu, {encoding}: load {without:.1} ms, with its check {with:.1}; in neighbours the check is {extra:.1} ms, {:.1} % of the rest",
            100.0 * extra / without
        );
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn text([load, check, engine, steps]: &[f64; 4]) -> String {
    let share = 100.0 * (check + steps) / (load + engine);
    format!(
        "load {load:.1} ms, its check {check:.1}, engine {engine:.1}, its check {steps:.1}: checks are {share:.1} % of the rest"
    )
}
