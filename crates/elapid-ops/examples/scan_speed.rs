//! Times the selective scan, forward, backward and one-token step, beside the machine's rate of vector FMA, which
//! bounds it: `cargo run --release -p elapid-ops --example scan_speed`.
//!
//! Arguments: sequences, length, channels, states (8 512 512 16). CPU time is the sum over threads, where the
//! system tells it; on a machine that others use too, it is the steadier figure.

use std::time::Instant;

use elapid_ops::selective_scan::{
    Arguments, Projection, backward_cpu, chunk_states_len, forward_cpu,
};
use elapid_ops::simd::dispatch;
use elapid_tensor::{RowView, Sequences};
use pulp::{Simd, WithSimd};

/// Multiplications, additions and fused pairs that only the two multiplying ports run, per state update:
/// counted in the inner loops (exp is a product, a polynomial of degree five and an addition of integers).
const FORWARD_OPS: f64 = 9.0;
const BACKWARD_OPS: f64 = 18.0;

/// Fused multiplications and additions of one vector a second.
struct Peak;

impl WithSimd for Peak {
    type Output = (f64, usize);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, usize) {
        const ROUNDS: usize = 2_000_000;
        let value = |v: f32| simd.splat_f32s(std::hint::black_box(v));
        let (mut sums, half) = ([value(1.0); 12], value(0.5));
        let now = Instant::now();
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, half, half);
            }
        }
        let seconds = now.elapsed().as_secs_f64();
        std::hint::black_box(sums);
        ((ROUNDS * sums.len()) as f64 / seconds, S::F32_LANES)
    }
}

/// CPU time of this thread and the pool's.
fn cpu_ms() -> f64 {
    let own = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    };
    let pool = rayon::broadcast(|_| own());
    pool.into_iter().chain([own()]).map(|ns| ns.unwrap_or(f64::NAN) / 1e6).sum()
}

/// Minimum and median of wall time and of CPU time, in ms.
fn time(name: &str, rounds: usize, limit_ms: f64, mut f: impl FnMut()) {
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (now, before) = (Instant::now(), cpu_ms());
        f();
        cpu.push(cpu_ms() - before);
        wall.push(now.elapsed().as_secs_f64() * 1e3);
    }
    for values in [&mut wall, &mut cpu] {
        values.sort_by(f64::total_cmp);
    }
    println!(
        "{name}: wall {:.3} (median {:.3}) ms, CPU {:.3} (median {:.3}) ms, limit {limit_ms:.3} ms of CPU",
        wall[0],
        wall[rounds / 2],
        cpu[0],
        cpu[rounds / 2],
    );
}

fn random(seed: u64, len: usize, low: f32, high: f32) -> Vec<f32> {
    let mut rng = elapid_tensor::rng::Rng::new(seed, 1);
    let unit = |bits: u64| (bits >> 40) as f32 / (1u64 << 24) as f32;
    (0..len).map(|_| low + (high - low) * unit(rng.next_u64())).collect()
}

fn main() {
    let given: Vec<usize> = std::env::args().skip(1).filter_map(|v| v.parse().ok()).collect();
    let [count, len, channels, states] = given.try_into().unwrap_or([8, 512, 512, 16]);
    let tokens = count * len;

    let (peak, lanes) = (0..5)
        .map(|_| dispatch(Peak))
        .fold((0.0, 1), |best, one| if one.0 > best.0 { one } else { best });
    println!(
        "{tokens} tokens ({count} x {len}), E {channels}, N {states}; {lanes} lanes, {} threads, {:.2}e9 vector FMA/s a thread",
        rayon::current_num_threads(),
        peak / 1e9
    );
    let updates = (tokens * channels * states) as f64 / lanes as f64;
    let limit = |ops: f64| updates * ops / peak * 1e3;

    let row = |seed, low, high| random(seed, tokens * channels, low, high);
    let (u, delta, z, dy) =
        (row(1, -1.0, 1.0), row(2, -1.0, 1.0), row(3, -2.0, 2.0), row(9, -1.0, 1.0));
    let a: Vec<f32> = (0..channels * states).map(|i| -((i % states) as f32 + 1.0)).collect();
    let bc = random(4, tokens * 2 * states, -1.0, 1.0);
    let (d, bias) = (random(5, channels, 0.0, 1.0), random(6, channels, -5.0, -3.0));
    let view = |data, width| RowView { data, rows: tokens, width, stride: width };
    let map = |data| RowView { data, rows: tokens, width: states, stride: 2 * states };
    let sequences = Sequences::uniform(count, len);
    let x = Arguments {
        channels,
        states,
        complex: false,
        u: view(&u, channels),
        delta: view(&delta, channels),
        a: &a,
        b: Projection::Token { rows: map(&bc), groups: 1 },
        c: Projection::Token { rows: map(&bc[states..]), groups: 1 },
        d: Some(&d),
        z: Some(view(&z, channels)),
        delta_bias: Some(&bias),
        delta_softplus: true,
        h0: None,
        sequences: &sequences,
    };
    let mut y = vec![0.0; tokens * channels];
    let mut last = vec![0.0; x.state_len()];
    time("forward", 40, limit(FORWARD_OPS), || forward_cpu(&x, &mut y, &mut last, None));
    let mut saved = vec![0.0; chunk_states_len(&x)];
    time("forward, saving", 20, limit(FORWARD_OPS), || {
        forward_cpu(&x, &mut y, &mut last, Some(&mut saved));
    });
    time("backward", 40, limit(BACKWARD_OPS), || {
        std::hint::black_box(backward_cpu(&x, &saved, view(&dy, channels), None));
    });

    let step = Sequences::continued(&[1], &[0]).expect("one sequence");
    let x = Arguments { h0: Some(&last[..channels * states]), sequences: &step, ..x };
    let mut next = vec![0.0; channels * states];
    time("100 steps of one token", 40, limit(FORWARD_OPS) / tokens as f64 * 100.0, || {
        for _ in 0..100 {
            forward_cpu(&x, &mut y[..channels], &mut next, None);
        }
    });
}
