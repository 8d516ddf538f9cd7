//! Times products with stored weights that lie in memory, beside a plain read of the same bytes: `cargo run --release
//! -p elapid-ops --example linear_speed [ENCODINGS [TOKENS [THREADS [SHAPES]]]]`, each a list with commas, `all` for the
//! default; a shape is ROWSxCOLUMNS.
//!
//! Every shape gets as many copies as fill memory well beyond the last cache, worked off one after the other, each
//! thread with its share of the rows, as a decode step does. Prints GB/s of weights as stored and GFLOP/s, medians.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use elapid_ops::blocks::{Encoding, quantize};
use elapid_ops::quantized_linear::{Activations, Output, Storage, Weight, product};

/// Bytes of all copies.
const MEMORY: usize = 192 << 20;
/// Seconds a figure may take.
const BUDGET: f64 = 1.0;

type Failure = Box<dyn std::error::Error>;

#[derive(Clone, Copy)]
struct Shared(Output);
// SAFETY: threads write their own rows.
unsafe impl Send for Shared {}

fn main() -> Result<(), Failure> {
    let list = |at: usize, default: &str| {
        let text = std::env::args().nth(at).filter(|text| text != "all");
        text.unwrap_or_else(|| default.into()).split(',').map(String::from).collect::<Vec<_>>()
    };
    let encodings = list(1, "f32,bf16,q8_0,q4_0,q4_k");
    let tokens = list(2, "1,2,4,8,32,512");
    let threads = list(3, "1,2");
    let shapes = list(4, "3072x768,768x1536,80x1536,1536x48,50280x768");
    for shape in &shapes {
        let (rows, columns) = shape.split_once('x').ok_or("a shape is ROWSxCOLUMNS")?;
        let (rows, columns) = (rows.parse()?, columns.parse()?);
        for encoding in &encodings {
            let encoding: Encoding = Encoding::ALL
                .into_iter()
                .find(|own| own.to_string() == *encoding)
                .ok_or_else(|| format!("no encoding {encoding}"))?;
            if !encoding.divides(columns) {
                println!("{shape:>10} {encoding:5} rows are no whole blocks");
                continue;
            }
            let weights = weights(encoding, rows, columns)?;
            for threads in &threads {
                let threads: usize = threads.parse()?;
                let read = time(1, threads, &|thread| read(share(&weights, thread, threads)));
                let bytes = weights.len() as f64;
                print!(
                    "{shape:>10} {encoding:5} {threads} threads: read {:5.1} GB/s",
                    bytes / read / 1e9
                );
                for tokens in &tokens {
                    let tokens: usize = tokens.parse()?;
                    let seconds = measure(encoding, rows, columns, &weights, tokens, threads)?;
                    let elements = bytes / encoding.row_bytes(columns)? as f64 * columns as f64;
                    let flops = 2.0 * elements * tokens as f64;
                    print!(
                        " | {tokens}: {:.1} GB/s {:.0} GFLOP/s",
                        bytes / seconds / 1e9,
                        flops / seconds / 1e9
                    );
                }
                println!();
            }
        }
    }
    Ok(())
}

/// Copies of a weight, end to end.
fn weights(encoding: Encoding, rows: usize, columns: usize) -> Result<Vec<u8>, Failure> {
    let values: Vec<f32> =
        (0..rows * columns).map(|i| ((i * 7919 % 1013) as f32 - 506.0) * 1e-3).collect();
    let one = quantize(encoding, columns, &values)?;
    Ok(one.repeat(MEMORY.div_ceil(one.len())))
}

/// A thread's part of the memory.
fn share(bytes: &[u8], thread: usize, threads: usize) -> &[u8] {
    &bytes[bytes.len() * thread / threads..bytes.len() * (thread + 1) / threads]
}

/// Reads everything once.
fn read(bytes: &[u8]) {
    let mut sums = [0u64; 8];
    for line in bytes.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    black_box(sums);
}

/// The median time of `work` on all threads.
fn time(least: usize, threads: usize, work: &(dyn Fn(usize) + Sync)) -> f64 {
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < least + 2 || start.elapsed().as_secs_f64() < BUDGET {
        let barrier = Barrier::new(threads);
        let seconds = std::thread::scope(|scope| {
            for thread in 1..threads {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    work(thread);
                    barrier.wait();
                });
            }
            barrier.wait();
            let start = Instant::now();
            work(0);
            barrier.wait();
            start.elapsed().as_secs_f64()
        });
        times.push(seconds);
        if times.len() > least && start.elapsed().as_secs_f64() > 3.0 * BUDGET {
            break;
        }
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn measure(
    encoding: Encoding,
    rows: usize,
    columns: usize,
    weights: &[u8],
    tokens: usize,
    threads: usize,
) -> Result<f64, Failure> {
    let size = encoding.row_bytes(columns)? * rows;
    let x: Vec<f32> = (0..tokens * columns).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut storage = Storage::new(encoding, tokens, columns);
    let writer = storage.writer();
    // SAFETY: nobody else uses the storage, which is filled before it is read.
    let activations: Activations<'_> = unsafe {
        for token in 0..tokens {
            writer.write_row(token, tokens, &x[token * columns..]);
        }
        writer.activations(tokens, &x, columns)
    };
    let mut y = vec![0.0f32; tokens * rows];
    let out = Shared(Output { pointer: y.as_mut_ptr(), stride: rows });
    let parts = weights
        .chunks_exact(size)
        .map(|bytes| Weight::new(encoding, rows, columns, bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let groups = rows.div_ceil(8);
    let out = std::sync::Mutex::new(out);
    let seconds = time(1, threads, &|thread| {
        let Ok(Shared(out)) = out.lock().map(|out| *out) else { return };
        let (start, end) =
            (groups * thread / threads * 8, (groups * (thread + 1) / threads * 8).min(rows));
        for weight in &parts {
            // SAFETY: `y` has every row; threads write their own.
            unsafe {
                let pointer = out.pointer.add(start);
                product(weight, &activations, start..end, Output { pointer, ..out });
            }
        }
    });
    black_box(&y);
    Ok(seconds)
}
