//! Times the products of the benchmarks' training step: `cargo run --release -p elapid-ops --example
//! matmul_speed [REPEATS]`; `RAYON_NUM_THREADS` sets the threads. Operands stay in the caches as far as they fit.

use std::time::Instant;

use elapid_ops::matmul::{Matrix, gemm};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let repeats: usize = std::env::args().nth(1).map_or(Ok(20), |text| text.parse())?;
    let t = 4096;
    for (name, n, k) in
        [("in_proj", 1024, 256), ("x_proj", 48, 512), ("dt_proj", 512, 16), ("out_proj", 256, 512)]
    {
        let fill = |len: usize| (0..len).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
        let (x, w, dy) = (fill(t * k), fill(n * k), fill(t * n));
        let (x, w, dy) = (
            Matrix::row_major(&x, t, k),
            Matrix::row_major(&w, n, k),
            Matrix::row_major(&dy, t, n),
        );
        for (product, a, b) in
            [("x Wᵀ", x, w.transposed()), ("dY W", dy, w), ("dYᵀ x", dy.transposed(), x)]
        {
            let mut out = vec![0.0f32; a.rows * b.cols];
            let mut times = Vec::with_capacity(repeats);
            for _ in 0..repeats + 2 {
                let start = Instant::now();
                if !gemm(&mut out, a, b) {
                    return Err("the shapes do not fit".into());
                }
                times.push(start.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            let rate = 2.0 * (t * n * k) as f64 / median / 1e9;
            println!("{name:9} {product:6} {:7.3} ms  {rate:6.1} GFLOP/s", median * 1e3);
        }
    }
    Ok(())
}
