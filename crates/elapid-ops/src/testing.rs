//! What the operations' tests share: seeded values, finite differences in f64, comparison against a reference.

use elapid_tensor::rng::Rng;
use elapid_tensor::{Shape, Tensor};

/// `count` values, uniform in -1..1, the same for the same seed.
pub(crate) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0x7e57);
    (0..count).map(|_| (rng.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// [`random`] as a tensor.
pub(crate) fn random_tensor(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    Tensor::from_slice(&random(seed, shape.elements()), shape).unwrap()
}

/// The values as f64.
pub(crate) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Gradient of `f` at `x` by central differences, with steps of `1e-5`.
pub(crate) fn finite_differences(x: &[f64], mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + STEP;
            let above = f(&x);
            x[i] = at - STEP;
            let below = f(&x);
            x[i] = at;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

/// Checks a gradient against [`finite_differences`] of `f`: `max|diff| <= 1e-6 max(1, max|gradient|)`.
pub(crate) fn check_gradient(
    name: &str,
    gradient: &[f64],
    x: &[f64],
    f: impl FnMut(&[f64]) -> f64,
) {
    close(name, gradient, &finite_differences(x, f), 1e-6);
}

/// `Σ a b`: the loss that makes `b` the gradient of `a`.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Checks `max|got - want| <= tolerance * max(1, max|want|)`; NaN and infinities must agree in place.
pub(crate) fn close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: number of values");
    let largest = want.iter().filter(|w| w.is_finite()).fold(1.0f64, |m, w| m.max(w.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        assert!(
            same || (got - want).abs() <= tolerance * largest,
            "{name}[{i}]: {got} instead of {want} (largest {largest}, tolerance {tolerance})"
        );
    }
}

/// [`close`] for a tensor.
pub(crate) fn close_tensor(name: &str, got: &Tensor, want: &[f64], tolerance: f64) {
    close(name, &got.to_f64_vec().unwrap(), want, tolerance);
}

/// Checks that two tensors have the same f32 bits.
pub(crate) fn same_bits(name: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.shape(), want.shape(), "{name}: shape");
    let (got, want) = (got.to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{name}[{i}]: {got} instead of {want}");
    }
}

/// Runs `f` on a pool of its own with so many threads.
pub(crate) fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

/// The emulated GPU and the card, as far as they are there.
pub(crate) fn gpus() -> Vec<elapid_tensor::cuda::Gpu> {
    use elapid_tensor::cuda::Gpu;
    [("emulation", Gpu::emulated()), ("card", Gpu::open(0))]
        .into_iter()
        .filter_map(|(what, gpu)| {
            gpu.inspect_err(|error| eprintln!("SKIPPED: kernels on the {what}: {error}")).ok()
        })
        .collect()
}

/// The host and the GPUs of [`gpus`], for tests that are the same everywhere.
pub(crate) fn devices() -> Vec<elapid_tensor::Device> {
    use elapid_tensor::Device;
    static FOUND: std::sync::OnceLock<Vec<Device>> = std::sync::OnceLock::new();
    let found = || {
        let gpus = gpus().into_iter().map(|gpu| Device::Cuda(gpu.id()));
        std::iter::once(Device::Cpu).chain(gpus).collect()
    };
    FOUND.get_or_init(found).clone()
}

/// [`random_tensor`] rounded to a type, on a device.
pub(crate) fn random_on(
    device: elapid_tensor::Device,
    dtype: elapid_tensor::DType,
    seed: u64,
    shape: impl Into<Shape>,
) -> Tensor {
    random_tensor(seed, shape).cast(dtype).unwrap().to(device).unwrap()
}

/// Values of an element type as f64, and back from f64.
pub(crate) fn to_element<T: elapid_tensor::Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f64(f64::from(value))).collect()
}

/// [`to_element`], the other way.
pub(crate) fn from_element<T: elapid_tensor::Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.to_f64()).collect()
}

/// Random sequences over random slots: some empty, some continued, with some slots of nobody.
pub(crate) fn random_sequences(seed: u64, lengths: &[usize]) -> elapid_tensor::Sequences {
    use elapid_tensor::{Sequence, Sequences};
    let mut rng = elapid_tensor::rng::Rng::new(seed, 0x5e9);
    let slots = lengths.len() + 1;
    let shift = (rng.next_u64() % slots as u64) as usize;
    let mut start = 0;
    let sequences = lengths.iter().enumerate().map(|(s, &len)| {
        let sequence = Sequence {
            start,
            len,
            slot: (s + shift) % slots,
            continued: rng.next_u64() & 1 == 1,
            position: 0,
            id: s as u64,
        };
        start += len;
        sequence
    });
    Sequences::new(sequences.collect(), slots).unwrap()
}
