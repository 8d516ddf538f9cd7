//! AdamW on a GPU: one launch for all parameters, what changes from step to step in device memory.

use std::marker::PhantomData;

use elapid_tensor::bf16;
use elapid_tensor::cuda::{DeviceBuffer, Gpu, KernelArguments, Launch, Module, Result, Source};

use super::AdamW;
use crate::gpu::{GpuElement, array, optional, wrong};

const OP: &str = "adamw";

static SOURCE: Source = Source { name: OP, text: include_str!("cuda.cu"), headers: &[] };

/// Elements of a block, as in `cuda.cu`: part of the order in which the norm is summed.
const CHUNK: usize = 8192;

/// One parameter, its gradient of type G and its moments; all of one length.
#[derive(Debug)]
pub struct Parameter<'a, G> {
    /// The parameter.
    pub p: &'a mut DeviceBuffer<f32>,
    /// Its gradient.
    pub g: &'a DeviceBuffer<G>,
    /// First moment.
    pub m: &'a mut DeviceBuffer<f32>,
    /// Second moment.
    pub v: &'a mut DeviceBuffer<f32>,
    /// A rounded copy of the parameter that the step renews.
    pub rounded: Option<&'a mut DeviceBuffer<bf16>>,
    /// Its own weight decay.
    pub weight_decay: f64,
}

/// Parameters whose table lies on the GPU, ready to be stepped together.
#[derive(Debug)]
pub struct Parameters<'a, G> {
    table: DeviceBuffer<[u64; 8]>,
    factors: DeviceBuffer<[f32; 10]>,
    norm: DeviceBuffer<[u64; 2]>,
    partial: DeviceBuffer<f64>,
    chunks: usize,
    /// The table holds addresses of what is borrowed.
    borrowed: PhantomData<&'a mut G>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StepArguments {
    tensors: u64,
    tensor_count: i64,
    factors: u64,
    norm: u64,
    skip_if_not_finite: i64,
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

impl<'a, G: GpuElement> Parameters<'a, G> {
    /// Makes the table.
    ///
    /// # Errors
    /// If a parameter's arrays differ in length, or there is no memory.
    pub fn new(gpu: &Gpu, parameters: &'a mut [Parameter<'_, G>]) -> Result<Self> {
        let (mut rows, mut chunks) = (Vec::new(), 0);
        for parameter in parameters {
            let len = parameter.p.len();
            rows.push([
                parameter.p.address(),
                array(OP, "g", parameter.g, len)?,
                array(OP, "m", parameter.m, len)?,
                array(OP, "v", parameter.v, len)?,
                optional(OP, "rounded", parameter.rounded.as_deref(), len)?,
                len as u64,
                chunks as u64,
                parameter.weight_decay.to_bits(),
            ]);
            chunks += len.div_ceil(CHUNK);
        }
        Ok(Self {
            table: gpu.upload(&rows)?,
            factors: gpu.scratch(1)?,
            norm: gpu.zeros(1)?,
            partial: gpu.scratch(chunks)?,
            chunks,
            borrowed: PhantomData,
        })
    }

    fn module(&self) -> Result<Module> {
        self.table.gpu().module(&SOURCE, &[("GRADIENT", G::CUDA)])
    }

    /// One step of `options` (whose weight decay is not looked at: each parameter has its own), with gradients times
    /// `grad_factor`, scaled down to the global norm `clip_norm` if that is not 0. `step` counts from 1. If a
    /// gradient is not finite nothing changes; [`Parameters::norm`] tells.
    ///
    /// # Errors
    /// If `step` is 0, or the GPU fails.
    pub fn step(
        &mut self,
        options: &AdamW,
        step: u64,
        clip_norm: f32,
        grad_factor: f32,
    ) -> Result<()> {
        if step == 0 {
            return Err(wrong(OP, "step is 0, expected 1 or more".into()));
        }
        if self.chunks == 0 {
            return Ok(());
        }
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        self.factors.write(&[[
            options.learning_rate as f32,
            options.beta1 as f32,
            (1.0 - options.beta1) as f32,
            options.beta2 as f32,
            (1.0 - options.beta2) as f32,
            (options.learning_rate / correction(options.beta1)) as f32,
            (1.0 / correction(options.beta2).sqrt()) as f32,
            options.epsilon as f32,
            clip_norm,
            grad_factor,
        ]])?;
        let (gpu, module) = (self.table.gpu(), self.module()?);
        let (tensors, tensor_count) = (self.table.address(), self.table.len() as i64);
        let blocks = self.chunks as u32;
        let squares = SquaresArguments { tensors, tensor_count, partial: self.partial.address() };
        let norm = NormArguments {
            partial: self.partial.address(),
            chunks: self.chunks as i64,
            factors: self.factors.address(),
            norm: self.norm.address(),
        };
        let arguments = StepArguments {
            tensors,
            tensor_count,
            factors: self.factors.address(),
            norm: self.norm.address(),
            skip_if_not_finite: 1,
        };
        // SAFETY: the table's arrays are borrowed for as long as it lives, and their lengths were checked.
        unsafe {
            gpu.launch(&module.kernel("adamw_squares")?, Launch::linear(blocks, 256), &squares)?;
            gpu.launch(&module.kernel("adamw_norm")?, Launch::linear(1, 1024), &norm)?;
            gpu.launch(&module.kernel("adamw_step")?, Launch::linear(blocks, 256), &arguments)
        }
    }

    /// The global norm of the last step's gradients before clipping; waits for it.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn norm(&self) -> Result<f64> {
        Ok(self.norm.read()?.first().map_or(0.0, |norm| f64::from_bits(norm[0])))
    }
}
