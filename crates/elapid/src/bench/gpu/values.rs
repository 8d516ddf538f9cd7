//! Values for what is measured, made quickly: random ones in a short run that is repeated. They do not change the time
//! as long as nothing overflows.

use anyhow::Result;
use elapid_models::{Kind, LanguageModel, MambaConfig};
use elapid_tensor::cuda::{DeviceBuffer, Gpu};
use elapid_tensor::rng::Rng;
use elapid_tensor::{Buffer, DType, Device, Shape, Tensor, bf16};

/// Length of the random run: a prime, so that rows do not repeat.
const RUN: usize = 65_521;

/// Writes the run over and over.
fn fill<T: Copy>(values: &mut [T], seed: u64, value: impl Fn(f64) -> T) {
    let mut rng = Rng::new(seed, 0xBE7C);
    let run: Vec<T> = (0..RUN.min(values.len())).map(|_| value(rng.uniform())).collect();
    for part in values.chunks_mut(RUN) {
        part.copy_from_slice(&run[..part.len()]);
    }
}

fn between(low: f64, high: f64) -> impl Fn(f64) -> f32 {
    move |uniform| (low + (high - low) * uniform) as f32
}

/// f32 between two bounds.
pub fn wide(seed: u64, len: usize, low: f64, high: f64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill(&mut values, seed, between(low, high));
    values
}

/// bf16 between two bounds.
pub fn narrow(seed: u64, len: usize, low: f64, high: f64) -> Vec<bf16> {
    let mut values = vec![bf16::ZERO; len];
    let value = between(low, high);
    fill(&mut values, seed, |uniform| bf16::from_f32(value(uniform)));
    values
}

/// bf16 between -1 and 1 in the memory of a GPU.
pub fn typed(gpu: &Gpu, seed: u64, len: usize) -> Result<DeviceBuffer<bf16>> {
    Ok(gpu.upload(&narrow(seed, len, -1.0, 1.0))?)
}

/// A tensor of a type, f32 or bf16, between two bounds, on a GPU.
pub fn tensor(
    gpu: &Gpu,
    dtype: DType,
    shape: impl Into<Shape>,
    low: f64,
    high: f64,
) -> Result<Tensor> {
    let shape = shape.into();
    let len = shape.elements();
    Ok(match dtype {
        DType::BF16 => Tensor::from_device(gpu.upload(&narrow(3, len, low, high))?, shape)?,
        _ => Tensor::from_device(gpu.upload(&wide(3, len, low, high))?, shape)?,
    })
}

/// Decay rates -1, .., -N of E channels.
pub fn decay_rates(channels: usize, states: usize) -> Vec<f32> {
    (0..channels * states).map(|i| -((i % states) as f32 + 1.0)).collect()
}

/// Token ids below `vocabulary`.
pub fn tokens(count: usize, vocabulary: usize) -> Vec<u32> {
    let mut rng = Rng::new(4, 0xBE7C);
    (0..count).map(|_| rng.below(vocabulary as u64) as u32).collect()
}

/// A model on a device, its values of the size of initial ones.
pub fn model(config: &MambaConfig, device: Device, dtype: DType) -> Result<LanguageModel> {
    let mut model = LanguageModel::empty(config)?;
    let mut seed = 0;
    model.visit(&mut |parameter| {
        seed += 1;
        let shape = parameter.tensor.shape();
        let mut values = Buffer::<f32>::scratch(shape.elements());
        let size = 1.0 / (shape.last().copied().unwrap_or(1) as f64).sqrt();
        match parameter.kind {
            Kind::Scale => values.fill(1.0),
            Kind::Recurrence => {
                let states = shape.last().copied().unwrap_or(1).max(1);
                for (i, value) in values.iter_mut().enumerate() {
                    *value = ((i % states + 1) as f32).ln();
                }
            }
            Kind::Skip => values.fill(1.0),
            // The bias: softplus of it is a usual first step size.
            Kind::DeltaProjection if shape.len() == 1 => values.fill(-4.6),
            Kind::Bias => values.fill(0.0),
            Kind::Embedding => fill(&mut values, seed, between(-0.035, 0.035)),
            Kind::Projection | Kind::Convolution | Kind::DeltaProjection => {
                fill(&mut values, seed, between(-size, size));
            }
        }
        *parameter.tensor = Tensor::from_buffer(values, shape)?.to(device)?.requires_grad();
        Ok(())
    })?;
    model.place(device, dtype)?;
    Ok(model)
}
