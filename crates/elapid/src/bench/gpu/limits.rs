//! What a card can do at most: measured in the same run as what is compared with it, as clocks and neighbours change;
//! the limits of the scan's arithmetic are constants of one card.

use anyhow::Result;
use elapid_tensor::cuda::{Gpu, KernelArguments, Launch, Matrix, Product, Source};
use elapid_tensor::{DType, Element};
use serde::Serialize;

use super::sampling::{self, Times};
use super::values;
use crate::bench::sampling::median;

static SOURCE: Source =
    Source { name: "bench_limits", text: include_str!("limits.cu"), headers: &[] };

/// Threads of a block and chains of a thread, as in `limits.cu`.
const THREADS: usize = 256;
const CHAINS: usize = 8;

/// State updates a second of an H200's arithmetic: an update of forward needs one exp2 (16 a clock and multiprocessor)
/// beside some fused multiply-adds.
const FORWARD_UPDATES: f64 = 3.9e12;
/// Of backward, which computes the state once more and sums gradients over channels and states.
const BACKWARD_UPDATES: f64 = 2.2e12;

/// A resource that bounds an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Bytes read and written a second.
    Copy,
    /// Floating-point operations a second of a bf16 matrix product.
    MatrixBf16,
    /// The same in f32, without TF32.
    MatrixF32,
    /// exp2 a second in registers.
    Exp2,
    /// State updates a second of a forward scan.
    ForwardUpdates,
    /// State updates a second of a backward scan.
    BackwardUpdates,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Copy,
        Self::MatrixBf16,
        Self::MatrixF32,
        Self::Exp2,
        Self::ForwardUpdates,
        Self::BackwardUpdates,
    ];

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::MatrixBf16 => "matrix bf16",
            Self::MatrixF32 => "matrix f32",
            Self::Exp2 => "exp2",
            Self::ForwardUpdates => "scan forward",
            Self::BackwardUpdates => "scan backward",
        }
    }

    /// What is counted, for people, after a factor of 10^12.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Copy => "TB/s",
            Self::MatrixBf16 | Self::MatrixF32 => "TFLOP/s",
            Self::Exp2 => "Texp2/s",
            Self::ForwardUpdates | Self::BackwardUpdates => "Tupdate/s",
        }
    }

    fn means(self) -> &'static str {
        match self {
            Self::Copy => {
                "bytes read plus bytes written of a copy within the card's memory, a second"
            }
            Self::MatrixBf16 => {
                "FLOP a second of one square product through cuBLASLt, bf16 in and out"
            }
            Self::MatrixF32 => {
                "FLOP a second of one square product through cuBLASLt, f32 without TF32"
            }
            Self::Exp2 => "exp2 a second in independent chains in registers",
            Self::ForwardUpdates => {
                "state updates a second of a forward scan: a constant of the H200"
            }
            Self::BackwardUpdates => {
                "state updates a second of a backward scan: a constant of the H200"
            }
        }
    }
}

/// One limit of the card.
#[derive(Debug, Serialize)]
pub struct Rate {
    /// Which.
    pub limit: Limit,
    means: &'static str,
    /// Whether it was measured now or is a constant.
    pub measured: bool,
    /// Median, a second.
    pub rate: f64,
    /// Seconds of the runs that were measured.
    samples: Vec<f64>,
}

/// All limits.
#[derive(Debug)]
pub struct Limits(Vec<Rate>);

#[repr(C)]
#[derive(Clone, Copy)]
struct ChainsArguments {
    out: u64,
    rounds: i64,
}
// SAFETY: the layout of `ChainsArguments` in limits.cu.
unsafe impl KernelArguments for ChainsArguments {}

impl Limits {
    /// Takes `repeats` samples of what can be measured; tiny ones if `quick`.
    pub fn measure(gpu: &Gpu, repeats: usize, quick: bool) -> Result<Self> {
        let time =
            |run: &mut dyn FnMut() -> Result<()>| sampling::time(gpu, repeats, quick, |_| run());
        let bytes = if quick { 1 << 20 } else { 1 << 30 };
        let from = gpu.zeros::<u8>(bytes)?;
        let copy = time(&mut || Ok(from.duplicate().map(drop)?))?;
        drop(from);

        let size = if quick { 64 } else { 8192 };
        let flops = 2.0 * (size as f64).powi(3);
        let narrow = product(gpu, size, &values::narrow(1, size * size, -1.0, 1.0), &time)?;
        let wide = product(gpu, size, &values::wide(1, size * size, -1.0, 1.0), &time)?;

        let (blocks, rounds) = if quick { (2, 2) } else { (8 * gpu.multiprocessors(), 4096) };
        let out = gpu.scratch::<f32>(blocks * THREADS)?;
        let kernel = gpu.module(&SOURCE, &[])?.kernel("exp2_chains")?;
        let arguments = ChainsArguments { out: out.address(), rounds: rounds as i64 };
        let launch = Launch::linear(blocks as u32, THREADS as u32);
        let exp2 = time(&mut || {
            // SAFETY: every thread writes one number of its own.
            unsafe { gpu.launch(&kernel, launch, &arguments)? };
            Ok(())
        })?;
        gpu.trim()?;

        let measured = |limit: Limit, amount: f64, times: Times| Rate {
            limit,
            means: limit.means(),
            measured: true,
            rate: amount / median(&times.samples),
            samples: times.samples,
        };
        let constant = |limit: Limit, rate: f64| Rate {
            limit,
            means: limit.means(),
            measured: false,
            rate,
            samples: Vec::new(),
        };
        let limits = Self(vec![
            measured(Limit::Copy, 2.0 * bytes as f64, copy),
            measured(Limit::MatrixBf16, flops, narrow),
            measured(Limit::MatrixF32, flops, wide),
            measured(Limit::Exp2, (blocks * THREADS * CHAINS * rounds) as f64, exp2),
            constant(Limit::ForwardUpdates, FORWARD_UPDATES),
            constant(Limit::BackwardUpdates, BACKWARD_UPDATES),
        ]);
        for rate in &limits.0 {
            eprintln!("  {}: {:.3} {}", rate.limit.name(), rate.rate / 1e12, rate.limit.unit());
        }
        Ok(limits)
    }

    /// A limit's rate, a second.
    pub fn rate(&self, limit: Limit) -> f64 {
        self.0.iter().find(|rate| rate.limit == limit).map_or(f64::NAN, |rate| rate.rate)
    }

    /// The limit of products in a type.
    pub fn of_products(dtype: DType) -> Limit {
        if dtype == DType::BF16 { Limit::MatrixBf16 } else { Limit::MatrixF32 }
    }

    /// In the order of [`Limit::ALL`].
    pub fn into_rates(self) -> Vec<Rate> {
        self.0
    }
}

type Timer<'a> = &'a dyn Fn(&mut dyn FnMut() -> Result<()>) -> Result<Times>;

/// Times a product of square matrices of these values, the second read transposed as weights are.
fn product<T: Element>(gpu: &Gpu, size: usize, values: &[T], time: Timer<'_>) -> Result<Times> {
    let (a, b) = (gpu.upload(values)?, gpu.upload(values)?);
    let c = gpu.scratch::<T>(size * size)?;
    let matrix = |address| Matrix::contiguous(address, T::DTYPE, size, size);
    let weights = matrix(b.address()).transpose();
    let product = Product::new(matrix(a.address()), weights, matrix(c.address()));
    time(&mut || {
        // SAFETY: three matrices of that size, the result's memory nobody else's.
        unsafe { gpu.multiply(&product)? };
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use elapid_tensor::bf16;

    use super::*;

    #[test]
    fn products_have_the_limit_of_their_type() {
        assert_eq!(Limits::of_products(bf16::DTYPE), Limit::MatrixBf16);
        assert_eq!(Limits::of_products(f32::DTYPE), Limit::MatrixF32);
    }
}
