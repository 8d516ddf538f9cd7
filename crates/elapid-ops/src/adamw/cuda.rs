//! AdamW on a GPU: one launch for all parameters, what changes from step to step in device memory.

use elapid_tensor::cuda::{DeviceBuffer, Gpu, KernelArguments, Launch, Source};
use elapid_tensor::{Error, Result, Tensor};

use super::AdamW;

const OP: &str = "adamw";

static SOURCE: Source = Source { name: OP, text: include_str!("cuda.cu"), headers: &[] };

/// Elements of a block, as in `cuda.cu`: part of the order in which the norm is summed.
const CHUNK: usize = 8192;

/// One parameter, its gradient and its moments: f32, of one shape, on one GPU.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// The parameter.
    pub p: &'a mut Tensor,
    /// Its gradient.
    pub g: &'a Tensor,
    /// First moment.
    pub m: &'a mut Tensor,
    /// Second moment.
    pub v: &'a mut Tensor,
    /// Its own weight decay.
    pub weight_decay: f64,
    /// Factor of the learning rate.
    pub rate: f64,
}

/// The numbers of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Numbers {
    /// Constants of the update; its weight decay is not looked at, as each parameter has its own.
    pub update: AdamW,
    /// Counted from 1.
    pub step: u64,
    /// Gradients are scaled down to this global norm; 0 for any.
    pub clip_norm: f64,
    /// A step whose norm is above this is not taken; 0 for any.
    pub limit: f64,
}

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// The global norm of the gradients before clipping.
    pub norm: f64,
    /// False if the norm was not finite or above the limit: then nothing has changed.
    pub taken: bool,
}

/// A step over a list of parameters, prepared in the memory of a GPU.
#[derive(Debug)]
pub struct Step {
    gpu: Gpu,
    table: DeviceBuffer<[u64; 8]>,
    factors: DeviceBuffer<[f32; 12]>,
    norm: DeviceBuffer<[u64; 2]>,
    partial: DeviceBuffer<f64>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StepArguments {
    tensors: u64,
    tensor_count: i64,
    factors: u64,
    norm: u64,
}
// SAFETY: the layout of `StepArguments` in cuda.cu.
unsafe impl KernelArguments for StepArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct SquaresArguments {
    tensors: u64,
    tensor_count: i64,
    partial: u64,
}
// SAFETY: the layout of `SquaresArguments` in cuda.cu.
unsafe impl KernelArguments for SquaresArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArguments {
    partial: u64,
    chunks: i64,
    factors: u64,
    norm: u64,
}
// SAFETY: the layout of `NormArguments` in cuda.cu.
unsafe impl KernelArguments for NormArguments {}

impl Step {
    /// Room for parameters of these lengths.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(gpu: &Gpu, lengths: &[usize]) -> Result<Self> {
        let chunks = lengths.iter().map(|len| len.div_ceil(CHUNK)).sum();
        Ok(Self {
            gpu: gpu.clone(),
            table: gpu.zeros(lengths.len())?,
            factors: gpu.zeros(1)?,
            norm: gpu.zeros(1)?,
            partial: gpu.scratch(chunks)?,
        })
    }

    /// Writes down where the parameters are.
    ///
    /// # Errors
    /// If there are more or fewer than was made room for, a shape, type or device is another, or the GPU fails.
    pub fn bind(&mut self, parameters: &mut [Parameter<'_>]) -> Result<()> {
        let (mut rows, mut chunks) = (Vec::with_capacity(parameters.len()), 0);
        for parameter in parameters {
            let (len, shape) = (parameter.p.elements(), parameter.p.shape());
            for (name, tensor) in
                [("p", &*parameter.p), ("g", parameter.g), ("m", parameter.m), ("v", parameter.v)]
            {
                tensor.expect_shape(OP, name, &shape)?;
            }
            rows.push([
                parameter.p.device_address_mut()?,
                parameter.g.device_slice::<f32>()?.address(),
                parameter.m.device_address_mut()?,
                parameter.v.device_address_mut()?,
                len as u64,
                chunks as u64,
                parameter.weight_decay.to_bits(),
                parameter.rate.to_bits(),
            ]);
            for (name, tensor) in [("p", &*parameter.p), ("m", parameter.m), ("v", parameter.v)] {
                tensor.expect_dtype(OP, name, elapid_tensor::DType::F32)?;
                tensor.expect_device(OP, name, elapid_tensor::Device::Cuda(self.gpu.id()))?;
            }
            chunks += len.div_ceil(CHUNK);
        }
        if rows.len() != self.table.len() || chunks != self.partial.len() {
            let message = format!(
                "{} parameters of {chunks} chunks, expected {} of {}",
                rows.len(),
                self.table.len(),
                self.partial.len()
            );
            return Err(Error::argument(OP, message));
        }
        Ok(self.table.write(&rows)?)
    }

    /// Writes down the numbers of the next step.
    ///
    /// # Errors
    /// If `step` is 0, or the GPU fails.
    pub fn configure(&mut self, numbers: &Numbers) -> Result<()> {
        let Numbers { update, step, clip_norm, limit } = *numbers;
        if step == 0 {
            return Err(Error::argument(OP, "step is 0, expected 1 or more"));
        }
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Ok(self.factors.write(&[[
            update.learning_rate as f32,
            update.beta1 as f32,
            (1.0 - update.beta1) as f32,
            update.beta2 as f32,
            (1.0 - update.beta2) as f32,
            (update.learning_rate / correction(update.beta1)) as f32,
            (1.0 / correction(update.beta2).sqrt()) as f32,
            update.epsilon as f32,
            clip_norm as f32,
            1.0,
            limit as f32,
            0.0,
        ]])?)
    }

    /// Updates the bound parameters by the numbers that were written down last, after all earlier work.
    ///
    /// # Errors
    /// If the GPU fails.
    ///
    /// # Safety
    /// The tensors that were bound last must still be where they were, and nobody else may have them.
    pub unsafe fn launch(&self) -> Result<()> {
        let chunks = self.partial.len();
        if chunks == 0 {
            return Ok(());
        }
        let gpu = &self.gpu;
        let module = gpu.module(&SOURCE, &[])?;
        let (tensors, tensor_count) = (self.table.address(), self.table.len() as i64);
        let (factors, norm) = (self.factors.address(), self.norm.address());
        let partial = self.partial.address();
        let squares = SquaresArguments { tensors, tensor_count, partial };
        let sum = NormArguments { partial, chunks: chunks as i64, factors, norm };
        let step = StepArguments { tensors, tensor_count, factors, norm };
        let blocks = chunks as u32;
        // SAFETY: the table's arrays are there (the caller's promise), and their lengths were checked.
        unsafe {
            gpu.launch(&module.kernel("adamw_squares")?, Launch::linear(blocks, 256), &squares)?;
            gpu.launch(&module.kernel("adamw_norm")?, Launch::linear(1, 1024), &sum)?;
            Ok(gpu.launch(&module.kernel("adamw_step")?, Launch::linear(blocks, 256), &step)?)
        }
    }

    /// What the last step found; waits for it.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn outcome(&self) -> Result<Outcome> {
        let [norm, rest] = self.norm.read()?.first().copied().unwrap_or_default();
        let taken = self.partial.is_empty() || rest >> 32 != 0;
        Ok(Outcome { norm: f64::from_bits(norm), taken })
    }
}

/// One step over all parameters.
///
/// # Errors
/// As [`Step::bind`] and [`Step::configure`].
pub fn step(gpu: &Gpu, parameters: &mut [Parameter<'_>], numbers: &Numbers) -> Result<Outcome> {
    let lengths: Vec<usize> = parameters.iter().map(|parameter| parameter.p.elements()).collect();
    let mut step = Step::new(gpu, &lengths)?;
    step.bind(parameters)?;
    step.configure(numbers)?;
    // SAFETY: the tensors are borrowed until this function returns, and launches keep their order.
    unsafe { step.launch()? };
    step.outcome()
}
