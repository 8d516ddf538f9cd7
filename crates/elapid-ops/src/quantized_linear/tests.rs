//! Every encoding and kernel against the reference on dequantised weights, and that bits depend on nothing else.

use proptest::prelude::*;

use super::*;
use crate::blocks::{Encoding, quantize};

/// Values like weights and activations: most are small, some are large.
pub(super) fn values(seed: u64, count: usize, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            let mut sum = 0.0f32;
            for _ in 0..4 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                sum += (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
            }
            sum * scale
        })
        .collect()
}

/// What rounding to eight bits may cost, relative to |x| · |w|: half a step of 127, for each block's largest; floats
/// only add up in another order.
fn tolerance(encoding: Encoding, x: &[f32], columns: usize, weight: &Weight<'_>) -> Vec<f64> {
    let block = activations::block(encoding);
    let mut row = vec![0.0f32; columns];
    let mut bounds = Vec::new();
    for x in x.chunks_exact(columns) {
        for r in 0..weight.rows() {
            crate::blocks::dequantize(encoding, weight.row(r), &mut row).unwrap();
            let products = x.iter().zip(&row).map(|(x, w)| f64::from(x.abs() * w.abs()));
            let mut bound = products.sum::<f64>() * 1e-6 * (columns as f64).sqrt() + 1e-9;
            if block > 0 {
                for (x, w) in x.chunks(block).zip(row.chunks(block)) {
                    let step = f64::from(x.iter().fold(0f32, |a, b| a.max(b.abs()))) / 127.0;
                    // Errors of half a step at most, each against its weight.
                    bound += 0.5 * step * w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
                    // The offsets of q4_k are not part of the values' magnitudes.
                    bound += 1e-5 * step * 127.0 * w.len() as f64;
                }
            }
            bounds.push(bound);
        }
    }
    bounds
}

fn check(encoding: Encoding, rows: usize, columns: usize, tokens: usize, seed: u64) {
    let w = values(seed, rows * columns, 0.1);
    let x = values(seed ^ 77, tokens * columns, 2.0);
    let bytes = quantize(encoding, columns, &w).unwrap();
    let weight = Weight::new(encoding, rows, columns, &bytes).unwrap();
    let y = quantized_linear(&x, &weight).unwrap();
    let goal = reference(&x, &weight).unwrap();
    let bounds = tolerance(encoding, &x, columns, &weight);
    for (i, ((y, goal), bound)) in y.iter().zip(&goal).zip(&bounds).enumerate() {
        let error = (f64::from(*y) - goal).abs();
        assert!(
            error <= *bound,
            "{encoding} {rows} x {columns}, {tokens} tokens, element {i}: {y} for {goal}, {error:e} > {bound:e}"
        );
    }
    // Each token alone, on one thread, has the same bits.
    for (t, x) in x.chunks_exact(columns).enumerate() {
        let mut storage = Storage::new(encoding, 1, columns);
        let activations = storage.fill(x);
        let mut alone = vec![f32::NAN; rows];
        let out = Output { pointer: alone.as_mut_ptr(), stride: rows };
        let half = rows / 2;
        // SAFETY: `alone` has every row.
        unsafe {
            let upper = Output { pointer: out.pointer.add(half), ..out };
            product(&weight, &activations, half..rows, upper);
            product(&weight, &activations, 0..half, out);
        }
        let together = &y[t * rows..][..rows];
        let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&alone), bits(together), "{encoding}, token {t} of {tokens}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn products_agree_with_the_reference_and_with_each_other(
        encoding in prop::sample::select(Encoding::ALL.to_vec()),
        rows in 1usize..40,
        blocks in 1usize..5,
        tail in 0usize..20,
        tokens in prop_oneof![1usize..8, 8usize..60],
        seed: u64,
    ) {
        let columns = match encoding.block_len() {
            1 => 24 * blocks + tail,
            len => len * blocks,
        };
        check(encoding, rows, columns, tokens, seed);
    }
}

#[test]
fn more_tokens_than_a_block_of_them() {
    for encoding in Encoding::ALL {
        check(encoding, 19, 256, 131, 5);
    }
    // Rows of several blocks, whose tokens' copies have room together or block by block.
    for encoding in [Encoding::F32, Encoding::BF16, Encoding::F16] {
        check(encoding, 19, 1221, 40, 6);
        check(encoding, 9, 1221, 131, 7);
    }
}

#[test]
fn every_instruction_set_gives_the_integers_of_the_definition() {
    let (rows, columns, tokens) = (21, 512, 17);
    for encoding in Encoding::ALL.into_iter().filter(|encoding| encoding.is_quantized()) {
        let bytes = quantize(encoding, columns, &values(3, rows * columns, 0.1)).unwrap();
        let weight = Weight::new(encoding, rows, columns, &bytes).unwrap();
        let x = values(4, tokens * columns, 2.0);
        let mut storage = Storage::new(encoding, tokens, columns);
        let activations = storage.fill(&x);
        match encoding {
            Encoding::Q8_0 => of::<unpack::Q8>(&weight, &activations),
            Encoding::Q4_0 => of::<unpack::Q4>(&weight, &activations),
            Encoding::Q4_K => of::<unpack::Q4K>(&weight, &activations),
            _ => of::<unpack::Q6K>(&weight, &activations),
        }
    }
}

/// Bytes of the largest magnitudes on both sides, in every mixture of signs: sums of pairs must not be cut off.
#[test]
fn the_largest_integers_fit() {
    let (rows, columns, tokens) = (16, 512, 9);
    for encoding in [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_K] {
        let mut bytes = vec![0u8; encoding.row_bytes(columns).unwrap() * rows];
        let block = encoding.block_bytes();
        for (i, byte) in bytes.iter_mut().enumerate() {
            let (row, at) = (i / (encoding.row_bytes(columns).unwrap()), i % block);
            let scale = if encoding == Encoding::Q4_K { at < 4 } else { at < 2 };
            *byte = match (scale, at % 2) {
                (true, 0) => 0,
                // 1.0
                (true, _) => 0x3C,
                (false, _) if row < 4 => [0x80, 0x7F, 0xFF, 0x00][row],
                (false, _) => [0x80, 0x7F][row >> (i % 4) & 1],
            };
        }
        let weight = Weight::new(encoding, rows, columns, &bytes).unwrap();
        let x: Vec<f32> = (0..tokens * columns)
            .map(|i| match (i / columns, i % 4) {
                (0, _) => 1.0,
                (1, _) => -1.0,
                (token, at) => [1.0, -1.0][token >> at & 1],
            })
            .collect();
        let mut storage = Storage::new(encoding, tokens, columns);
        let activations = storage.fill(&x);
        match encoding {
            Encoding::Q8_0 => of::<unpack::Q8>(&weight, &activations),
            Encoding::Q4_0 => of::<unpack::Q4>(&weight, &activations),
            _ => of::<unpack::Q4K>(&weight, &activations),
        }
    }
}

fn of<B: unpack::Blocks>(weight: &Weight<'_>, x: &Activations<'_>) {
    let (rows, tokens) = (weight.rows(), x.tokens());
    let mut goal = vec![0.0f32; rows * tokens];
    for (i, goal) in goal.iter_mut().enumerate() {
        let from = weight.row(i % rows).as_ptr();
        // SAFETY: a row of the weight and a token of the input.
        *goal = unsafe {
            direct::portable::<B>(from, weight.columns() / B::LEN, &x.integers(i / rows))
        };
    }
    type Kernel = unsafe fn(
        &mut panel::Panel,
        &Weight<'_>,
        &Activations<'_>,
        Range<usize>,
        Range<usize>,
        Output,
    );
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut kernels: Vec<(&str, Kernel)> = vec![("portable", panel::portable::<B>)];
    #[cfg(target_arch = "x86_64")]
    {
        if detected::has_avx2() {
            kernels.push(("avx2", panel_x86::avx2::<B>));
        } else {
            eprintln!("SKIPPED: no AVX2 on this machine");
        }
        if detected::has_vnni() {
            kernels.push(("avx512 with vnni", panel_x86::avx512::<B>));
        } else {
            eprintln!("SKIPPED: no AVX-512 with VNNI on this machine");
        }
    }
    let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
    for (name, kernel) in kernels {
        let mut y = vec![f32::NAN; rows * tokens];
        let out = Output { pointer: y.as_mut_ptr(), stride: rows };
        // SAFETY: `y` has every element; the instruction set was found.
        unsafe { kernel(&mut panel::Panel::default(), weight, x, 0..rows, 0..tokens, out) };
        assert_eq!(bits(&y), bits(&goal), "{name}, {}", B::ENCODING);
    }
    #[cfg(target_arch = "x86_64")]
    if quads_x86::has(B::ENCODING) {
        type Kernel = unsafe fn(&Weight<'_>, &Activations<'_>, Range<usize>, Output);
        let mut kernels: Vec<(&str, Kernel)> = Vec::new();
        if detected::has_avx2() {
            kernels.push(("quads on avx2", quads_x86::avx2));
        }
        if detected::has_vnni() {
            kernels.push(("quads on avx512 with vnni", quads_x86::vnni));
        }
        let (x, columns) = (x.floats().0, x.columns());
        for tokens in 1..=tokens {
            // SAFETY: the rows of the input.
            let x = unsafe { std::slice::from_raw_parts(x, tokens * columns) };
            let mut storage = Storage::new(B::ENCODING, tokens, columns);
            let activations = storage.fill(x);
            for (name, kernel) in &kernels {
                let mut y = vec![f32::NAN; rows * tokens];
                let out = Output { pointer: y.as_mut_ptr(), stride: rows };
                // SAFETY: `y` has every element; the instruction set was found.
                unsafe { kernel(weight, &activations, 0..rows, out) };
                assert_eq!(bits(&y), bits(&goal[..y.len()]), "{name}, {}, {tokens}", B::ENCODING);
            }
        }
    }
    let mut y = vec![f32::NAN; rows * tokens];
    // SAFETY: `y` has every element.
    unsafe {
        direct::rows::<B>(weight, x, 0..rows, Output { pointer: y.as_mut_ptr(), stride: rows });
    }
    assert_eq!(bits(&y), bits(&goal), "direct, {}", B::ENCODING);
}

#[test]
fn every_instruction_set_adds_floats_up() {
    let (rows, columns, tokens) = (13, 603, 7);
    let w = values(8, rows * columns, 1.0);
    let x = values(9, tokens * columns, 1.0);
    for encoding in [Encoding::F32, Encoding::BF16, Encoding::F16] {
        let bytes = quantize(encoding, columns, &w).unwrap();
        let weight = Weight::new(encoding, rows, columns, &bytes).unwrap();
        let goal = reference(&x, &weight).unwrap();
        type Kernel = unsafe fn(Encoding, dense::Call);
        let mut kernels: Vec<(&str, Kernel)> = Vec::new();
        #[cfg(not(target_arch = "aarch64"))]
        kernels.push(("portable", dense::portable::rows));
        #[cfg(target_arch = "aarch64")]
        kernels.push(("neon", dense::neon::rows));
        #[cfg(target_arch = "x86_64")]
        {
            if detected::has_avx2() {
                kernels.push(("avx2", dense::x86::avx2));
            } else {
                eprintln!("SKIPPED: no AVX2 on this machine");
            }
            if detected::has_avx512() {
                kernels.push(("avx512", dense::x86::avx512));
            } else {
                eprintln!("SKIPPED: no AVX-512 on this machine");
            }
        }
        for (name, kernel) in kernels {
            let run = |tokens: usize| {
                let mut y = vec![f32::NAN; rows * tokens];
                let call = dense::Call {
                    weight: bytes.as_ptr(),
                    row_bytes: weight.row_bytes,
                    rows,
                    columns,
                    x: x.as_ptr(),
                    x_stride: columns,
                    tokens,
                    out: y.as_mut_ptr(),
                    out_stride: rows,
                };
                // SAFETY: the call's sizes are those of its buffers; the instruction set was found.
                unsafe { kernel(encoding, call) };
                y
            };
            let y = run(tokens);
            for (y, goal) in y.iter().zip(&goal) {
                assert!((f64::from(*y) - goal).abs() < 2e-5, "{name}, {encoding}: {y} for {goal}");
            }
            for fewer in 1..tokens {
                assert_eq!(run(fewer), y[..fewer * rows], "{name}, {encoding}, {fewer} tokens");
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows() {
    for encoding in Encoding::ALL {
        let bytes = quantize(encoding, 256, &values(1, 2 * 256, 0.1)).unwrap();
        let weight = Weight::new(encoding, 2, 256, &bytes).unwrap();
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = values(2, 256, 1.0);
            x[70] = value;
            let y = quantized_linear(&x, &weight).unwrap();
            assert!(y.iter().all(|y| !y.is_finite()), "{encoding}, {value}: {y:?}");
        }
        assert_eq!(quantized_linear(&[0.0; 256], &weight).unwrap(), [0.0, 0.0]);
        let tiny = quantized_linear(&[1e-42; 256], &weight).unwrap();
        assert!(tiny.iter().all(|y| y.abs() < 1e-37), "{encoding}: {tiny:?}");
    }
}

#[test]
fn wrong_sizes_are_errors() {
    let error = Weight::new(Encoding::Q8_0, 2, 33, &[0; 68]).unwrap_err().to_string();
    assert!(error.contains("33"), "{error}");
    let error = Weight::new(Encoding::Q8_0, 2, 32, &[0; 67]).unwrap_err().to_string();
    assert!(error.contains("67 bytes"), "{error}");
    let weight = Weight::new(Encoding::Q8_0, 2, 32, &[0; 68]).unwrap();
    assert!(quantized_linear(&[0.0; 31], &weight).is_err());
}
