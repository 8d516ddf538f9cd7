//! The emulation and, where there is one, the card: memory, kernels, errors.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{DeviceBuffer, Gpu, GpuError, KernelArguments, Launch, Source, libraries};

static TESTS: Source = Source { name: "tests", text: include_str!("tests.cu"), headers: &[] };

#[repr(C)]
#[derive(Clone, Copy)]
struct SumArgs {
    x: u64,
    y: u64,
    rows: i64,
    width: i64,
}
// SAFETY: the layout of `SumArgs` in tests.cu.
unsafe impl KernelArguments for SumArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapArgs {
    x: u64,
    y: u64,
    len: i64,
}
// SAFETY: the layout of `MapArgs` in tests.cu.
unsafe impl KernelArguments for MapArgs {}

/// The emulation and the card, as far as they are there.
pub(super) fn gpus() -> Vec<Gpu> {
    emulation().into_iter().chain(found("card", Gpu::open(0))).collect()
}

pub(super) fn emulation() -> Option<Gpu> {
    found("emulation", Gpu::emulated())
}

fn found(what: &str, gpu: super::Result<Gpu>) -> Option<Gpu> {
    gpu.inspect_err(|error| eprintln!("SKIPPED: kernels on the {what}: {error}")).ok()
}

#[test]
fn rows_are_summed() {
    for gpu in gpus() {
        let (rows, width) = (5, 777);
        let x: Vec<f32> = (0..rows * width).map(|i| (i % 13) as f32 - 3.0).collect();
        let kernel = gpu.module(&TESTS, &[]).unwrap().kernel("row_sum").unwrap();
        let (from, to) = (gpu.upload(&x).unwrap(), gpu.scratch::<f32>(rows).unwrap());
        let args = SumArgs { x: from.address(), y: to.address(), rows: 5, width: 777 };
        for threads in [32, 96, 256] {
            // SAFETY: one block a row, within both buffers.
            unsafe { gpu.launch(&kernel, Launch::linear(rows as u32, threads), &args) }.unwrap();
            let expected: Vec<f32> = x.chunks(width).map(|row| row.iter().sum()).collect();
            assert_eq!(to.read().unwrap(), expected, "{gpu}, {threads} threads");
        }
    }
}

#[test]
fn functions_of_the_prelude_are_accurate() {
    for gpu in gpus() {
        let x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.0071).collect();
        let n = x.len();
        let kernel = gpu.module(&TESTS, &[]).unwrap().kernel("functions").unwrap();
        let (from, to) = (gpu.upload(&x).unwrap(), gpu.scratch::<f32>(4 * n).unwrap());
        let args = MapArgs { x: from.address(), y: to.address(), len: n as i64 };
        // SAFETY: the kernel's loop ends at `len`.
        unsafe { gpu.launch(&kernel, Launch::linear(3, 128), &args) }.unwrap();
        let y = to.read().unwrap();
        for (i, &x) in x.iter().enumerate() {
            let wide = f64::from(x);
            let close = |got: f32, expected: f64, limit: f64| {
                let error = (f64::from(got) - expected).abs();
                assert!(
                    error <= limit * expected.abs().max(1e-30),
                    "{gpu}: {got} for {expected} at {x}"
                );
            };
            close(y[i], wide.exp().ln_1p(), 5e-6);
            close(y[n + i], wide / (1.0 + (-wide).exp()), 4e-6);
            close(y[2 * n + i], wide.exp2(), 3e-6);
            assert_eq!(y[3 * n + i], half::bf16::from_f32(x).to_f32());
        }
    }
}

#[test]
fn shared_memory_is_shared() {
    for gpu in gpus() {
        let x: Vec<f32> = (0..128).map(|i| i as f32).collect();
        let kernel = gpu.module(&TESTS, &[]).unwrap().kernel("reverse").unwrap();
        let (from, to) = (gpu.upload(&x).unwrap(), gpu.zeros::<f32>(128).unwrap());
        let args = MapArgs { x: from.address(), y: to.address(), len: 128 };
        let launch = Launch { shared: 512, ..Launch::linear(1, 32) };
        // SAFETY: 32 threads of four numbers each.
        unsafe { gpu.launch(&kernel, launch, &args) }.unwrap();
        let expected: Vec<f32> = x.iter().rev().copied().collect();
        assert_eq!(to.read().unwrap(), expected);
    }
}

#[test]
fn a_missing_barrier_shows_in_some_order() {
    let Some(gpu) = emulation() else { return };
    let kernel = gpu.module(&TESTS, &[("MISSING_BARRIER", "1")]).unwrap().kernel("race").unwrap();
    let x = gpu.upload(&[1f32; 64]).unwrap();
    let wrong = (0..20).any(|_| {
        let y = gpu.zeros::<f32>(1).unwrap();
        let args = MapArgs { x: x.address(), y: y.address(), len: 64 };
        // SAFETY: 64 threads, one number each.
        unsafe { gpu.launch(&kernel, Launch::linear(1, 64), &args) }.unwrap();
        y.read().unwrap()[0] != 64.0
    });
    assert!(wrong, "twenty orders of threads hid a race");
}

#[test]
fn memory_is_used_again_and_counted() {
    for gpu in gpus() {
        // Other tests use the common one at the same time.
        let gpu = gpu.id().open().unwrap();
        let first = gpu.zeros::<f32>(1000).unwrap();
        assert!(first.read().unwrap().iter().all(|&value| value == 0.0));
        let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        assert_eq!(gpu.upload(&values).unwrap().duplicate().unwrap().read().unwrap(), values);
        let held = gpu.usage().in_use;
        assert!(held >= 4000);
        let address = first.address();
        drop(first);
        assert_eq!(gpu.usage().in_use, held - if gpu.is_emulated() { 4000 } else { 4096 });
        if !gpu.is_emulated() {
            assert_eq!(gpu.scratch::<f32>(1000).unwrap().address(), address);
        }
        gpu.trim().unwrap();
        assert_eq!(gpu.usage().cached, 0);
    }
}

#[test]
fn recorded_work_is_carried_out_on_launch() {
    for gpu in gpus() {
        let kernel = gpu.module(&TESTS, &[]).unwrap().kernel("row_sum").unwrap();
        let mut x = gpu.upload(&[1f32; 8]).unwrap();
        let sum = |x: &DeviceBuffer<f32>| -> super::Result<DeviceBuffer<f32>> {
            let to = gpu.scratch::<f32>(2)?;
            let args = SumArgs { x: x.address(), y: to.address(), rows: 2, width: 4 };
            // SAFETY: one block a row, within both buffers.
            unsafe { gpu.launch(&kernel, Launch::linear(2, 32), &args)? };
            Ok(to)
        };
        sum(&x).unwrap();
        // The memory of the first copy is used again for the second, within the graph.
        let (last, graph) = gpu
            .record(|| {
                drop(x.duplicate()?);
                sum(&x.duplicate()?)
            })
            .unwrap();
        for value in [2.0, 3.0] {
            x.write(&[value; 8]).unwrap();
            // What is taken now must not be what the graph writes to.
            let other = gpu.upload(&[7f32; 8]).unwrap();
            // SAFETY: `x` is where it was.
            unsafe { graph.launch().unwrap() };
            assert_eq!(last.read().unwrap(), [4.0 * value; 2], "{gpu}");
            assert_eq!(other.read().unwrap(), [7.0; 8]);
        }
        let refused = gpu.record(|| x.read()).err().unwrap().to_string();
        assert!(refused.contains("recorded graph"), "{refused}");
        assert_eq!(x.read().unwrap(), [3.0; 8]);
    }
}

#[test]
fn what_other_threads_do_meanwhile_does_not_spoil_a_recording() {
    for gpu in gpus() {
        let kernel = gpu.module(&TESTS, &[]).unwrap().kernel("row_sum").unwrap();
        let (x, to) = (gpu.upload(&[1f32; 8]).unwrap(), gpu.zeros::<f32>(2).unwrap());
        let args = SumArgs { x: x.address(), y: to.address(), rows: 2, width: 4 };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for other in 0..2 {
                let (gpu, over) = (&gpu, &over);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        drop(gpu.shared::<u32>(16).unwrap());
                        gpu.event().unwrap().wait().unwrap();
                        assert_eq!(gpu.upload(&[other; 64]).unwrap().read().unwrap(), [other; 64]);
                        gpu.trim().unwrap();
                    }
                });
            }
            let recordings = (0..50).map(|_| {
                gpu.record(|| {
                    for _ in 0..20 {
                        // SAFETY: one block a row, within both buffers.
                        unsafe { gpu.launch(&kernel, Launch::linear(2, 32), &args)? };
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    super::Result::Ok(())
                })
            });
            let outcome: super::Result<Vec<_>> = recordings.collect();
            over.store(true, Ordering::Relaxed);
            for ((), graph) in outcome.unwrap() {
                // SAFETY: both buffers are where they were.
                unsafe { graph.launch() }.unwrap();
            }
        });
        assert_eq!(to.read().unwrap(), [4.0; 2], "{gpu}");
    }
}

#[test]
fn a_recording_that_ends_leaves_those_of_other_threads_alone() {
    for gpu in gpus() {
        let x = gpu.upload(&[1f32; 8]).unwrap();
        let record = || {
            for _ in 0..200 {
                let outcome = gpu.record(|| {
                    std::thread::yield_now();
                    x.read()
                });
                assert!(outcome.is_err(), "{gpu}: read within a recording");
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(record)).collect();
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
}

#[test]
fn bad_kernels_and_arguments_are_refused() {
    static BROKEN: Source =
        Source { name: "broken", text: "#include \"prelude.cuh\"\nint f( {", headers: &[] };
    for gpu in gpus() {
        let error = gpu.module(&BROKEN, &[]).err().unwrap();
        assert!(
            matches!(&error, GpuError::Compile { log, .. } if log.contains("error")),
            "{error}"
        );
        let module = gpu.module(&TESTS, &[]).unwrap();
        assert!(module.kernel("no_such_kernel").is_err());
    }
    let Some(gpu) = emulation() else { return };
    let kernel = gpu.module(&TESTS, &[]).unwrap().kernel("row_sum").unwrap();
    let args = MapArgs { x: 0, y: 0, len: 0 };
    // SAFETY: refused before anything runs.
    let error = unsafe { gpu.launch(&kernel, Launch::linear(1, 32), &args) }.unwrap_err();
    assert!(error.to_string().contains("32 bytes of arguments, was given 24"), "{error}");
}

#[test]
fn a_damaged_cache_entry_is_made_anew() {
    let folder = std::env::temp_dir().join(format!("elapid-cache-test-{}", std::process::id()));
    let path = folder.join("entry.cubin");
    super::cache::write(&path, b"payload").unwrap();
    assert_eq!(super::cache::read(&path).unwrap(), b"payload");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(super::cache::read(&path).is_none());
    std::fs::write(&path, &bytes[..7]).unwrap();
    assert!(super::cache::read(&path).is_none());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn missing_libraries_say_how_to_get_them() {
    for found in [&libraries::libraries().driver, &libraries::libraries().nvrtc] {
        match found.check() {
            Ok(()) => assert!(found.usable()),
            Err(error) => assert!(error.to_string().contains("install"), "{error}"),
        }
    }
    if !libraries::libraries().driver.usable() {
        assert!(Gpu::open(0).is_err());
    }
}
