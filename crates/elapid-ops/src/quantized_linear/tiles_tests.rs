//! Products of tiles: bit by bit against their definition, on the emulated unit and on the processor's own.

use proptest::prelude::*;

use super::activations::{FEW, PAIRED, PARTS, Parts};
use super::tests::values;
use super::tiles::RUN;
use super::tiles_emulated::{Emulated, block};
use super::*;
use crate::blocks::quantize;

type Kernel = unsafe fn(&Weight<'_>, &Activations<'_>, Range<usize>, Output);

fn kernels() -> Vec<(&'static str, Kernel)> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut kernels: Vec<(&str, Kernel)> = vec![("emulated", tiles::rows::<Emulated>)];
    #[cfg(target_arch = "x86_64")]
    if detected::has_tiles() {
        kernels.push(("amx", tiles_x86::rows));
    }
    if !has_tiles() {
        eprintln!("SKIPPED: no AMX with bf16 on this machine");
    }
    kernels
}

/// The parts of an input, by their definition.
fn parts(x: f32) -> [u16; PARTS] {
    let mut rest = x;
    std::array::from_fn(|_| {
        let bits = (rest.to_bits() >> 16) as u16;
        let part = if rest.is_nan() { bits | 0x40 } else { bits };
        let value = f32::from_bits(u32::from(part) << 16);
        rest = if value.is_finite() { rest - value } else { 0.0 };
        part
    })
}

/// One element of a product.
fn definition(x: &[f32], w: &[u8]) -> f32 {
    let w: Vec<u16> = w.as_chunks::<2>().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect();
    let mut y = None;
    for (x, w) in x.chunks(RUN).zip(w.chunks(RUN)) {
        let mut sums = [0.0f32; PARTS];
        for (x, w) in x.chunks(32).zip(w.chunks(32)) {
            let mut own = [[0u16; 32]; PARTS];
            let mut other = [0u16; 32];
            other[..w.len()].copy_from_slice(w);
            for (i, &x) in x.iter().enumerate() {
                for (own, part) in own.iter_mut().zip(parts(x)) {
                    own[i] = part;
                }
            }
            for (sum, own) in sums.iter_mut().zip(&own) {
                *sum = block(*sum, own, &other);
            }
        }
        let sum = (sums[2] + sums[1]) + sums[0];
        y = Some(y.map_or(sum, |y: f32| y + sum));
    }
    y.unwrap_or(0.0)
}

/// NaN have the same bits here.
fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| if y.is_nan() { f32::NAN } else { *y }.to_bits()).collect()
}

/// Rows of a product, in the midst of others that must stay as they are.
fn run(kernel: Kernel, weight: &Weight<'_>, x: &[f32], range: Range<usize>) -> Vec<f32> {
    let (columns, stride) = (weight.columns(), range.len() + 3);
    let tokens = x.len() / columns;
    let mut storage = Storage::of(Kind::Parts, tokens, columns);
    let activations = storage.fill(x);
    let mut y = vec![-7.0f32; tokens * stride + 2];
    let out = Output { pointer: y[2..].as_mut_ptr(), stride };
    // SAFETY: `y` has these rows of every token; the unit was found.
    unsafe { kernel(weight, &activations, range.clone(), out) };
    assert_eq!(y[..2], [-7.0; 2]);
    let rows = y[2..].chunks_exact(stride);
    rows.flat_map(|row| {
        assert_eq!(row[range.len()..], [-7.0; 3]);
        row[..range.len()].to_vec()
    })
    .collect()
}

/// All of a product and the rows of `range` alone.
fn check(rows: usize, columns: usize, tokens: usize, range: Range<usize>, seed: u64) {
    let x = values(seed, tokens * columns, 2.0);
    let bytes = quantize(Encoding::BF16, columns, &values(seed ^ 77, rows * columns, 0.1)).unwrap();
    let weight = Weight::new(Encoding::BF16, rows, columns, &bytes).unwrap();
    let goal: Vec<f32> = x
        .chunks_exact(columns)
        .flat_map(|x| (0..rows).map(|row| definition(x, weight.row(row))).collect::<Vec<_>>())
        .collect();
    for (y, exact) in goal.iter().zip(reference(&x, &weight).unwrap()) {
        let error = (f64::from(*y) - exact).abs();
        assert!(error < 1e-6 * (columns as f64).sqrt(), "{columns} columns: {y} for {exact}");
    }
    for (name, kernel) in kernels() {
        let what = format!("{name}: {rows} x {columns}, {tokens} tokens, rows {range:?}");
        assert_eq!(bits(&run(kernel, &weight, &x, 0..rows)), bits(&goal), "{what}");
        let part: Vec<f32> =
            goal.chunks_exact(rows).flat_map(|row| row[range.clone()].to_vec()).collect();
        assert_eq!(bits(&run(kernel, &weight, &x, range.clone())), bits(&part), "{what}");
    }
}

/// The parts of an input as they were written.
fn written(found: &Parts, tokens: usize, token: usize, column: usize) -> [u16; PARTS] {
    std::array::from_fn(|part| {
        let (tile, row, at) = if tokens > FEW {
            let row = token * PARTS + part;
            (found.rows(row / 16, column / 32), row % 16, column % 32)
        } else {
            let tiles = found.pairs(token / (2 * PAIRED), column / 32);
            let tile = tiles.wrapping_add(token / PAIRED % 2 * 1024);
            (tile, column % 32 / 2, (part * PAIRED + token % PAIRED) * 2 + column % 2)
        };
        // SAFETY: a tile of the storage.
        unsafe { *tile.cast::<u16>().add(row * 32 + at) }
    })
}

#[test]
fn inputs_are_the_sums_of_their_parts() {
    let mut x = values(1, 96, 3.0);
    x.extend(values(2, 32, 1e-30));
    x.extend([f32::MAX, f32::MIN, f32::MIN_POSITIVE, 0.0, -0.0, 1e-42, 1.0, 1.0 + f32::EPSILON]);
    let mut storage = Storage::of(Kind::Parts, 1, x.len());
    let found = storage.fill(&x).parts();
    for (i, &x) in x.iter().enumerate() {
        let own = written(&found, 1, 0, i);
        assert_eq!(own, parts(x), "{x:e}");
        let sum: f64 = own.iter().map(|&p| f64::from(f32::from_bits(u32::from(p) << 16))).sum();
        let lost = (sum - f64::from(x)).abs();
        assert!(lost == 0.0 || x.abs() < 1e-33 && lost < 2f64.powi(-133), "{x:e}: {lost:e}");
    }
    // A NaN that has only low bits is one still.
    let odd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(0x7F80_0001)];
    assert_eq!(odd.map(parts), [[0x7F80, 0, 0], [0xFF80, 0, 0], [0x7FC0, 0, 0], [0x7FC0, 0, 0]]);
    let mut storage = Storage::of(Kind::Parts, 1, 4);
    let found = storage.fill(&odd).parts();
    for (i, odd) in odd.into_iter().enumerate() {
        assert_eq!(written(&found, 1, 0, i), parts(odd));
    }
    // Both ways in which tokens lie.
    for tokens in [1, 4, 11, FEW, FEW + 1, 33] {
        let columns = 70;
        let x = values(tokens as u64, tokens * columns, 1.0);
        let mut storage = Storage::of(Kind::Parts, tokens, columns);
        let found = storage.fill(&x).parts();
        for (i, &x) in x.iter().enumerate() {
            assert_eq!(written(&found, tokens, i / columns, i % columns), parts(x));
        }
    }
}

#[test]
fn every_number_of_tokens_has_the_bits_of_the_definition() {
    for tokens in 1..=40 {
        check(40, 96, tokens, 7..40, tokens as u64);
    }
    check(33, 64, 300, 5..9, 50);
}

#[test]
fn every_shape_has_the_bits_of_the_definition() {
    for (i, columns) in [1, 2, 30, 32, 48, 160, 512, 544, 768, 1056, 1567].into_iter().enumerate() {
        for tokens in [1, 7, 17, 23] {
            check(35, columns, tokens, 16..34, i as u64);
        }
    }
    for rows in 1..=40 {
        for tokens in [1, 6, 13, 24] {
            check(rows, 64, tokens, rows / 3..rows, 99 + rows as u64);
        }
    }
    check(70, 1088, 5, 1..70, 3);
    check(70, 1088, 35, 1..70, 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_product_has_the_bits_of_the_definition(
        rows in 1usize..70,
        columns in prop_oneof![1usize..200, 500usize..600],
        tokens in prop_oneof![1usize..21, 21usize..70],
        from in 0.0f64..1.0,
        seed: u64,
    ) {
        check(rows, columns, tokens, (from * rows as f64) as usize..rows, seed);
    }
}

#[test]
fn what_is_not_finite_stays_with_its_row_and_token() {
    for (columns, tokens) in [(64, 1), (64, 9), (64, 30), (47, 3), (47, 30), (518, 22)] {
        let (rows, bad_row, bad_token) = (37, 17, tokens / 2);
        let mut w = values(3, rows * columns, 0.1);
        let mut x = values(4, tokens * columns, 1.0);
        for value in [f32::NAN, f32::INFINITY] {
            w[bad_row * columns + columns - 1] = value;
            x[bad_token * columns] = value;
            let bytes: Vec<u8> =
                w.iter().flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes()).collect();
            let weight = Weight::new(Encoding::BF16, rows, columns, &bytes).unwrap();
            for (name, kernel) in kernels() {
                let y = run(kernel, &weight, &x, 0..rows);
                for (i, y) in y.iter().enumerate() {
                    let odd = i % rows == bad_row || i / rows == bad_token;
                    assert_eq!(!y.is_finite(), odd, "{name}, {columns} columns, {i}: {y}");
                }
                // Where neither NaN nor zero meets it, infinity stays.
                if value == f32::INFINITY {
                    let own = y[bad_token * rows];
                    assert_eq!(own.abs(), value, "{name}, {columns} columns");
                }
            }
        }
    }
}

/// Products of this processor, whichever they are, with nothing but zeros and with numbers that lose their last parts.
#[test]
fn smallest_inputs() {
    let (rows, columns) = (33, 70);
    let bytes = quantize(Encoding::BF16, columns, &values(1, rows * columns, 0.1)).unwrap();
    let weight = Weight::new(Encoding::BF16, rows, columns, &bytes).unwrap();
    for (name, kernel) in kernels() {
        for tokens in [1, 30] {
            let y = run(kernel, &weight, &vec![0.0; tokens * columns], 0..rows);
            assert!(y.iter().all(|&y| y == 0.0), "{name}: {y:?}");
            let y = run(kernel, &weight, &vec![1e-38; tokens * columns], 0..rows);
            assert!(y.iter().all(|y| y.abs() < 1e-37), "{name}: {y:?}");
        }
    }
}
