use elapid_tensor::rng::Rng;
use half::f16;
use proptest::prelude::*;

use super::*;

const BLOCKS: [Encoding; 4] = [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_K, Encoding::Q6_K];

fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0xb10c);
    (0..count).map(|_| rng.normal() as f32).collect()
}

fn decoded(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / encoding.block_bytes() * encoding.block_len()];
    dequantize(encoding, bytes, &mut out).unwrap();
    out
}

/// Root of the mean squared error over that of the values.
fn relative_error(encoding: Encoding, x: &[f32]) -> f64 {
    let back = decoded(encoding, &quantize(encoding, x.len(), x).unwrap());
    let squared = |v: f64| v * v;
    let error: f64 = x.iter().zip(&back).map(|(x, y)| squared(f64::from(x - y))).sum();
    let size: f64 = x.iter().map(|&x| squared(f64::from(x))).sum();
    (error / size).sqrt()
}

#[test]
fn sizes_are_those_of_the_files() {
    let sizes = Encoding::ALL.map(|e| (e.name(), e.block_len(), e.block_bytes()));
    assert_eq!(
        sizes,
        [
            ("f32", 1, 4),
            ("f16", 1, 2),
            ("bf16", 1, 2),
            ("q8_0", 32, 34),
            ("q4_0", 32, 18),
            ("q4_k", 256, 144),
            ("q6_k", 256, 210)
        ]
    );
    assert_eq!(Encoding::Q4_K.row_bytes(768).unwrap(), 432);
    assert!(Encoding::Q4_K.row_bytes(100).unwrap_err().to_string().contains("multiple of 256"));
    assert!(Encoding::F32.row_bytes(usize::MAX / 2).is_err());
    for encoding in Encoding::ALL {
        assert_eq!(encoding.name().to_uppercase().parse::<Encoding>().unwrap(), encoding);
    }
    assert!("q5_1".parse::<Encoding>().unwrap_err().to_string().contains("q5_1"));
}

#[test]
fn blocks_of_q4_0_are_exact_in_q8_0() {
    for seed in 0..4 {
        let bytes = quantize(Encoding::Q4_0, 320, &normal(seed, 640)).unwrap();
        let wide = q8_0::exactly(Encoding::Q4_0, &bytes).unwrap();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(decoded(Encoding::Q4_0, &bytes)), bits(decoded(Encoding::Q8_0, &wide)));
        assert_eq!(q8_0::exactly(Encoding::Q8_0, &wide).unwrap(), wide);
        for other in [Encoding::F32, Encoding::BF16, Encoding::Q4_K, Encoding::Q6_K] {
            assert!(q8_0::exactly(other, &bytes).is_none());
        }
    }
}

#[test]
fn a_q8_0_block_by_hand() {
    let mut bytes = f16::from_f32(0.5).to_le_bytes().to_vec();
    bytes.extend((0..32).map(|i| (i * 8 - 128) as i8 as u8));
    let values = decoded(Encoding::Q8_0, &bytes);
    assert_eq!(values[..3], [-64.0, -60.0, -56.0]);
    assert_eq!(values[31], 60.0);

    let x: Vec<f32> = (0..32).map(|i| (i as f32 - 15.0) * 0.25).collect();
    let bytes = quantize(Encoding::Q8_0, 32, &x).unwrap();
    assert_eq!(bytes[..2], f16::from_f32(4.0 / 127.0).to_le_bytes());
    assert_eq!(bytes[2 + 31] as i8, 127);
    // -3.75 is 119.0625 steps, 0.25 is 7.9375.
    assert_eq!((bytes[2] as i8, bytes[2 + 15], bytes[2 + 16]), (-119, 0, 8));
}

#[test]
fn a_q4_0_block_by_hand() {
    let mut bytes = f16::from_f32(-2.0).to_le_bytes().to_vec();
    bytes.extend([0xf0; 16]);
    let values = decoded(Encoding::Q4_0, &bytes);
    assert_eq!(values[..16], [16.0; 16]);
    assert_eq!(values[16..], [-14.0; 16]);

    let mut x = [0f32; 32];
    (x[0], x[17], x[18]) = (8.0, -3.0, 4.4);
    let bytes = quantize(Encoding::Q4_0, 32, &x).unwrap();
    assert_eq!(bytes[..2], f16::from_f32(-1.0).to_le_bytes());
    // Levels are 8 - value, zero is 8.
    assert_eq!((bytes[2], bytes[3], bytes[4], bytes[5]), (0x80, 0xb8, 0x48, 0x88));
}

#[test]
fn a_q4_k_block_by_hand() {
    let s = [1, 2, 3, 63, 4, 17, 33, 63u8];
    let t = [0, 1, 62, 63, 5, 16, 47, 63u8];
    let mut bytes = [0u8; q4_k::BYTES];
    bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
    bytes[2..4].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
    for g in 0..4 {
        bytes[4 + g] = s[g] | (s[4 + g] >> 4) << 6;
        bytes[8 + g] = t[g] | (t[4 + g] >> 4) << 6;
        bytes[12 + g] = (s[4 + g] & 15) | (t[4 + g] & 15) << 4;
    }
    for (i, byte) in bytes[16..].iter_mut().enumerate() {
        *byte = (i % 16) as u8 | (15 - (i % 16) as u8) << 4;
    }
    let values = decoded(Encoding::Q4_K, &bytes);
    for (e, value) in values.iter().enumerate() {
        let g = e / 32;
        let q = if g % 2 == 0 { e % 16 } else { 15 - e % 16 };
        let expected = 0.5 * f32::from(s[g]) * q as f32 - 0.25 * f32::from(t[g]);
        assert_eq!(*value, expected, "element {e}");
    }
}

#[test]
fn a_q6_k_block_by_hand() {
    let levels: Vec<u8> = (0..256).map(|e| ((e * 37 + e / 16) % 64) as u8).collect();
    let scales: Vec<i8> = (0..16).map(|g| (g * 17 - 128) as i8).collect();
    let mut bytes = [0u8; q6_k::BYTES];
    for half in 0..2 {
        for i in 0..32 {
            let q = |r: usize| levels[half * 128 + r * 32 + i];
            bytes[half * 64 + i] = (q(0) & 15) | (q(2) & 15) << 4;
            bytes[half * 64 + 32 + i] = (q(1) & 15) | (q(3) & 15) << 4;
            bytes[128 + half * 32 + i] =
                q(0) >> 4 | q(1) >> 4 << 2 | q(2) >> 4 << 4 | q(3) >> 4 << 6;
        }
    }
    for (byte, s) in bytes[192..208].iter_mut().zip(&scales) {
        *byte = *s as u8;
    }
    bytes[208..].copy_from_slice(&f16::from_f32(0.125).to_le_bytes());
    let values = decoded(Encoding::Q6_K, &bytes);
    for (e, value) in values.iter().enumerate() {
        let expected = 0.125 * f32::from(scales[e / 16]) * (f32::from(levels[e]) - 32.0);
        assert_eq!(*value, expected, "element {e}");
    }
}

#[test]
fn errors_of_normal_values_are_those_of_good_quantisers() {
    let x = normal(1, 64 * 256);
    // Each bound is a few percent above what the best known searches for these layouts reach.
    for (encoding, bound) in [
        (Encoding::Q8_0, 0.0061),
        (Encoding::Q4_0, 0.097),
        (Encoding::Q4_K, 0.075),
        (Encoding::Q6_K, 0.0185),
    ] {
        let error = relative_error(encoding, &x);
        println!("{encoding}: {error:.5}");
        assert!(error < bound, "{encoding}: {error} of the values' size, expected below {bound}");
    }
}

#[test]
fn constants_zeros_and_extremes_are_kept() {
    for encoding in BLOCKS {
        for value in [0.0, 1.0, -1.0, 3e-5, -1e-30, 12345.0] {
            let x = [value; 256];
            let back = decoded(encoding, &quantize(encoding, 256, &x).unwrap());
            for y in back {
                // 2.4e-4 is what the smallest scale of half precision can hold in q6_k: 2^-24 x 128 x 32.
                assert!(
                    (y - value).abs() <= value.abs() * 0.07 + 2.5e-4,
                    "{encoding}: {value} came back as {y}"
                );
            }
        }
    }
}

#[test]
fn long_rows_have_the_bits_of_their_blocks() {
    let columns = 2 * TASK;
    let x = normal(2, 3 * columns);
    for encoding in Encoding::ALL {
        let bytes = quantize(encoding, columns, &x).unwrap();
        let single: Vec<u8> =
            x.chunks(256).flat_map(|x| quantize(encoding, 256, x).unwrap()).collect();
        assert_eq!(bytes, single, "{encoding}");
        let values: Vec<f32> = bytes
            .chunks(encoding.row_bytes(256).unwrap())
            .flat_map(|bytes| decoded(encoding, bytes))
            .collect();
        assert_eq!(decoded(encoding, &bytes), values, "{encoding}");
    }
}

#[test]
fn what_cannot_be_stored_is_named() {
    let message = |encoding, x: &[f32]| quantize(encoding, 256, x).unwrap_err().to_string();
    for encoding in BLOCKS {
        let mut x = vec![1.0; 512];
        x[300] = f32::NAN;
        assert!(message(encoding, &x).contains("element 300 is NaN"), "{}", message(encoding, &x));
        x[300] = -3e38;
        assert!(message(encoding, &x).contains("element 300 is -3"), "{}", message(encoding, &x));
        assert!(message(encoding, &x[..300]).contains("whole rows"));
        assert!(dequantize(encoding, &[0; 7], &mut [0.0; 256]).is_err());
    }
    let mut x = vec![0.0; 256];
    x[3] = 1e5;
    assert!(message(Encoding::F16, &x).contains("element 3 is 100000"));
    x[3] = f32::INFINITY;
    assert_eq!(
        decoded(Encoding::F16, &quantize(Encoding::F16, 256, &x).unwrap())[3],
        f32::INFINITY
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn simple_blocks_come_back_unchanged(seed in any::<u64>(), exponent in -8i32..8, shift in -2.0f32..2.0) {
        let x: Vec<f32> = normal(seed, 256).iter().map(|v| (v + shift) * 2f32.powi(exponent)).collect();
        for encoding in [Encoding::F32, Encoding::Q8_0, Encoding::Q4_0] {
            let once = quantize(encoding, 256, &x).unwrap();
            prop_assert_eq!(&quantize(encoding, 256, &decoded(encoding, &once)).unwrap(), &once);
        }
    }

    #[test]
    fn every_value_is_within_a_step(seed in any::<u64>(), exponent in -8i32..8, shift in -2.0f32..2.0) {
        let x: Vec<f32> = normal(seed, 256).iter().map(|v| (v + shift) * 2f32.powi(exponent)).collect();
        let group = |encoding: Encoding| if encoding == Encoding::Q6_K { 16 } else { 32 };
        for encoding in BLOCKS {
            let back = decoded(encoding, &quantize(encoding, 256, &x).unwrap());
            let all = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (x, y) in x.chunks(group(encoding)).zip(back.chunks(group(encoding))) {
                let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                // A step and its rounding to half precision; the K blocks round their scales to those of the block.
                let bound = match encoding {
                    Encoding::Q8_0 => 0.51 / 127.0 * largest + 127.0 / 2048.0 / 127.0 * largest,
                    Encoding::Q4_0 => 1.01 / 8.0 * largest,
                    Encoding::Q4_K => 2.0 * largest / 15.0 + 0.02 * all,
                    _ => 1.5 * largest / 32.0 + 0.01 * all,
                };
                for (x, y) in x.iter().zip(y) {
                    prop_assert!((x - y).abs() <= bound, "{}: {} came back as {}, bound {}", encoding, x, y, bound);
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found_without_its_values(bytes in proptest::collection::vec(any::<u8>(), 420), top in any::<bool>()) {
        for encoding in Encoding::ALL {
            let mut bytes = bytes[..2 * encoding.block_bytes()].to_vec();
            let at = bytes.len() - if encoding == Encoding::Q6_K { 1 } else { encoding.block_bytes() - 1 };
            if top && encoding != Encoding::F32 {
                // The high byte of the second block's scale, or value.
                bytes[at] = 0x7f;
                bytes[at - 1] |= 0x80;
            }
            let finite = decoded(encoding, &bytes).iter().all(|value| value.is_finite());
            prop_assert_eq!(are_finite(encoding, &bytes), finite, "{}", encoding);
        }
    }

    #[test]
    fn every_block_has_a_meaning(bytes in proptest::collection::vec(any::<u8>(), 34 * 18 * 8 * 35)) {
        for encoding in BLOCKS {
            let whole = bytes.len() / encoding.block_bytes() * encoding.block_bytes();
            let values = decoded(encoding, &bytes[..whole]);
            prop_assert_eq!(values.len(), whole / encoding.block_bytes() * encoding.block_len());
        }
    }
}
