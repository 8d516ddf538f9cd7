//! Times the parts of loading a model for decoding in bf16 on a GPU, and the self-check's share of them:
//! `cargo run --release -p elapid-infer --example load_speed MODEL [REPEATS]`. MODEL is a folder or a file.
//!
//! The first round also loads kernels, which reading a prompt and the first step need anyway; medians are of the others.

use std::path::Path;
use std::time::Instant;

use elapid_formats::ModelSource;
use elapid_infer::{GpuEngine, Rows, SelfCheck};
use elapid_tensor::{DType, Device};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let model = std::env::args().nth(1).ok_or("the model's folder or file is missing")?;
    let repeats: usize = std::env::args().nth(2).map_or(Ok(9), |text| text.parse())?;
    let started = Instant::now();
    let (device, reason) = Device::best();
    let Some(gpu) = device.gpu()? else {
        return Err(reason.map_or("there is no GPU".into(), Into::into));
    };
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
    let median = |part: usize| {
        let mut times: Vec<f64> = rounds.iter().map(|parts| parts[part]).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    };
    println!("medians:     {}", text(&[0, 1, 2, 3].map(median)));
    Ok(())
}

fn text([load, check, engine, steps]: &[f64; 4]) -> String {
    let share = 100.0 * (check + steps) / (load + engine);
    format!(
        "load {load:.1} ms, its check {check:.1}, engine {engine:.1}, its check {steps:.1}: checks are {share:.1} % of the rest"
    )
}
