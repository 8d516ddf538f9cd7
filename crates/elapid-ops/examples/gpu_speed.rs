//! Speed of the GPU kernels beside the card's copy bandwidth in the same run:
//! `cargo run --release -p elapid-ops --example gpu_speed [-- --quick]`
//!
//! Every figure is the median of 20 timed calls after 5, over inputs that rotate so that they do not stay in the
//! second-level cache; bf16, N = 16. `share` is the bytes that must move over the copy bandwidth's time, or for the
//! scan the state updates over 3.9e12 (forward) and 2.2e12 (backward) a second, the limits of an H200.

use elapid_ops::causal_conv1d::cuda as conv;
use elapid_ops::gpu::{DeviceSequences, Rows};
use elapid_ops::norm::cuda as norm;
use elapid_ops::selective_scan::cuda::{self as scan, Cut, Plan};
use elapid_tensor::cuda::{DeviceBuffer, Gpu, Result};
use elapid_tensor::rng::Rng;
use elapid_tensor::{Sequences, bf16};

const SETS: usize = 3;
const STATES: usize = 16;

fn main() -> Result<()> {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("no card: {error}");
            return Ok(());
        }
    };
    let bandwidth = copy_bandwidth(&gpu)?;
    println!("{} copy {:.2} TB/s", gpu.card().map_or("", |card| card.name()), bandwidth / 1e12);
    println!("{:<52} {:>10} {:>8}", "what", "ms", "share");
    for channels in [1536, 5120] {
        scans(&gpu, &Sequences::uniform(8, 2048), channels, Cut::Fill)?;
    }
    for length in [2048, 8192, 131_072] {
        scans(&gpu, &Sequences::uniform(1, length), 1024, Cut::Fill)?;
    }
    scans(&gpu, &Sequences::uniform(1, 1 << 20), 64, Cut::Fill)?;
    if !quick {
        for length in (9..=17).map(|power| 1usize << power) {
            scans(&gpu, &Sequences::uniform((1 << 17) / length, length), 512, Cut::Fill)?;
        }
    }
    for channels in [1536, 5120] {
        convolutions(&gpu, 8, 2048, channels, bandwidth)?;
    }
    for width in [768, 2560] {
        norms(&gpu, 16_384, width, bandwidth)?;
    }
    Ok(())
}

fn random(seed: u64, len: usize, scale: f32, shift: f32) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0x51);
    // Short of randomness on purpose: a long array repeats a block of odd length.
    let block: Vec<f32> = (0..len.min(1_000_003))
        .map(|_| ((rng.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale + shift)
        .collect();
    (0..len).map(|i| block[i % block.len()]).collect()
}

fn typed(gpu: &Gpu, seed: u64, len: usize) -> Result<DeviceBuffer<bf16>> {
    let values: Vec<bf16> =
        random(seed, len, 1.0, 0.0).iter().map(|&v| bf16::from_f32(v)).collect();
    gpu.upload(&values)
}

/// Median milliseconds of a call; `f` is given the number of the input set.
fn time(gpu: &Gpu, mut f: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    for i in 0..5 {
        f(i % SETS)?;
    }
    let mut times = Vec::new();
    for i in 0..20 {
        let begin = gpu.event()?;
        f(i % SETS)?;
        times.push(gpu.event()?.since(&begin)?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn row(what: &str, ms: f64, share: f64) {
    println!("{what:<52} {ms:>10.4} {:>7.1}%", share * 100.0);
}

/// Bytes read and written a second by copies within the card.
fn copy_bandwidth(gpu: &Gpu) -> Result<f64> {
    let from = gpu.zeros::<u8>(1 << 30)?;
    let ms = time(gpu, |_| from.duplicate().map(drop))?;
    Ok(2.0 * f64::from(1u32 << 30) / (ms / 1e3))
}

fn scans(gpu: &Gpu, sequences: &Sequences, e: usize, cut: Cut) -> Result<()> {
    let tokens = sequences.tokens();
    let plan = Plan::new(gpu, sequences, (e, 1, STATES), cut)?;
    let a: Vec<f32> = (0..e * STATES).map(|i| -((i % STATES) as f32 + 1.0)).collect();
    let a = gpu.upload(&a)?;
    let d = gpu.upload(&random(1, e, 1.0, 0.0))?;
    let bias = gpu.upload(&random(2, e, 1.0, -4.0))?;
    struct Set {
        rows: [DeviceBuffer<bf16>; 4],
        maps: [DeviceBuffer<bf16>; 2],
    }
    let sets: Vec<Set> = (0..SETS as u64)
        .map(|s| {
            let row = |k| typed(gpu, 10 * s + k, tokens * e);
            let map = |k| typed(gpu, 10 * s + k, tokens * STATES);
            Ok(Set { rows: [row(1)?, row(2)?, row(3)?, row(4)?], maps: [map(5)?, map(6)?] })
        })
        .collect::<Result<_>>()?;
    let inputs = |set: usize| {
        let [u, delta, z, _] = &sets[set].rows;
        let [b, c] = &sets[set].maps;
        scan::Inputs {
            u: Rows::new(u, e),
            delta: Rows::new(delta, e),
            a: a.slice(),
            b: Rows::new(b, STATES),
            c: Rows::new(c, STATES),
            d: Some(d.slice()),
            z: Some(Rows::new(z, e)),
            delta_bias: Some(bias.slice()),
            delta_softplus: true,
            state: None,
            plan: &plan,
        }
    };
    let updates = (tokens * e * STATES) as f64;
    let name = format!("{} x {}, E {e}", sequences.len(), tokens / sequences.len());
    let ms = time(gpu, |set| scan::forward(gpu, &inputs(set), false).map(drop))?;
    row(&format!("scan forward {name}"), ms, updates / 3.9e12 / (ms / 1e3));
    let saved = (0..SETS)
        .map(|set| Ok(scan::forward(gpu, &inputs(set), true)?.2))
        .collect::<Result<Vec<_>>>()?;
    let ms = time(gpu, |set| {
        let Some(chunks) = &saved[set] else { return Ok(()) };
        let dy = Rows::new(&sets[set].rows[3], e);
        scan::backward(gpu, &inputs(set), chunks, dy, None).map(drop)
    })?;
    row(&format!("scan backward {name}"), ms, updates / 2.2e12 / (ms / 1e3));
    gpu.trim()
}

fn convolutions(gpu: &Gpu, count: usize, length: usize, e: usize, bandwidth: f64) -> Result<()> {
    let tokens = count * length;
    let sequences = DeviceSequences::upload(gpu, &Sequences::uniform(count, length))?;
    let weight = gpu.upload(&random(1, e * 4, 0.5, 0.0))?;
    let bias = gpu.upload(&random(2, e, 0.5, 0.0))?;
    let rows = |k: u64| (0..SETS as u64).map(move |s| typed(gpu, 10 * s + k, tokens * e));
    let x: Vec<DeviceBuffer<bf16>> = rows(1).collect::<Result<_>>()?;
    let dy: Vec<DeviceBuffer<bf16>> = rows(2).collect::<Result<_>>()?;
    let inputs = |set: usize| conv::Inputs {
        x: Rows::new(&x[set], e),
        weight: weight.slice(),
        bias: Some(bias.slice()),
        state: None,
        sequences: &sequences,
        channels: e,
        width: 4,
        silu: true,
    };
    let bytes = (2 * tokens * e) as f64;
    let ms = time(gpu, |set| conv::forward(gpu, &inputs(set)).map(drop))?;
    row(
        &format!("conv forward {count} x {length}, E {e}"),
        ms,
        2.0 * bytes / bandwidth / (ms / 1e3),
    );
    let ms =
        time(gpu, |set| conv::backward(gpu, &inputs(set), Rows::new(&dy[set], e), None).map(drop))?;
    row(
        &format!("conv backward {count} x {length}, E {e}"),
        ms,
        3.0 * bytes / bandwidth / (ms / 1e3),
    );
    gpu.trim()
}

fn norms(gpu: &Gpu, rows: usize, width: usize, bandwidth: f64) -> Result<()> {
    let weight = gpu.upload(&random(1, width, 1.0, 0.0))?;
    let norm =
        norm::Norm { width, center: false, eps: 1e-5, weight: Some(weight.slice()), bias: None };
    let x = typed(gpu, 1, rows * width)?;
    let residual = gpu.upload(&random(2, rows * width, 1.0, 0.0))?;
    let add = || Some(Rows::new(&residual, width));
    let bytes = (rows * width) as f64;
    let ms = time(gpu, |_| norm::forward(gpu, &norm, rows, Rows::new(&x, width), add()).map(drop))?;
    row(
        &format!("add + RMSNorm forward {rows} x {width}"),
        ms,
        12.0 * bytes / bandwidth / (ms / 1e3),
    );
    let ms = time(gpu, |_| {
        let (r, dy) = (Rows::new(&residual, width), Rows::new(&x, width));
        norm::backward(gpu, &norm, rows, r, dy, add()).map(drop)
    })?;
    row(
        &format!("add + RMSNorm backward {rows} x {width}"),
        ms,
        16.0 * bytes / bandwidth / (ms / 1e3),
    );
    gpu.trim()
}
