//! The scan on a GPU: what `cuda.cu` and `cuda_backward.cuh` are given and in what order.
//!
//! A block works on one segment of a sequence and a tile of channels. A sequence is one segment, or several where
//! there would be too few blocks to fill the card: then one pass finds each segment's end from zero, a short serial
//! pass the state that enters each, and all segments run at the same time. Backward is the mirror image. Sequences that are
//! cut only to be in a batch what they are alone, and are enough to fill the card whole, are walked from end to end, with the
//! bits of cut ones.

use elapid_tensor::autograd::Place;
use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Module, Result, Source,
};

use super::OP;
use super::cuda_plan::THREADS;
pub use super::cuda_plan::{Cut, Plan};
use crate::gpu::{GpuElement, Rows, array, optional, target, wrong};

static SOURCE: Source = Source {
    name: OP,
    text: include_str!("cuda.cu"),
    headers: &[
        ("cuda_common.cuh", include_str!("cuda_common.cuh")),
        ("cuda_stage.cuh", include_str!("cuda_stage.cuh")),
        ("cuda_segments.cuh", include_str!("cuda_segments.cuh")),
        ("cuda_sums.cuh", include_str!("cuda_sums.cuh")),
        ("cuda_backward.cuh", include_str!("cuda_backward.cuh")),
        ("cuda_reduce.cuh", include_str!("cuda_reduce.cuh")),
    ],
};

/// Arguments of a scan in device memory: T is the type of `u`, `delta`, `z`, B and C; all else is f32.
#[derive(Debug)]
pub struct Inputs<'a, T> {
    /// `[T, E]`
    pub u: Rows<'a, T>,
    /// δ before bias and softplus, `[T, E]`.
    pub delta: Rows<'a, T>,
    /// Decay rates `[E, N]`.
    pub a: DeviceSlice<'a, f32>,
    /// Input map `[T, G, N]`.
    pub b: Rows<'a, T>,
    /// Output map `[T, G, N]`.
    pub c: Rows<'a, T>,
    /// Skip `[E]`.
    pub d: Option<DeviceSlice<'a, f32>>,
    /// Gate `[T, E]`.
    pub z: Option<Rows<'a, T>>,
    /// Added to δ, `[E]`.
    pub delta_bias: Option<DeviceSlice<'a, f32>>,
    /// Whether Δ is the softplus of δ + bias.
    pub delta_softplus: bool,
    /// State `[slots, E, N]` that continued sequences start from.
    pub state: Option<DeviceSlice<'a, f32>>,
    /// The division of the batch.
    pub plan: &'a Plan,
}

/// What backward needs of forward: the states before every so many steps.
#[derive(Debug)]
pub struct Chunks(DeviceBuffer<f32>);

/// Gradients by the inputs.
#[derive(Debug)]
pub struct Gradients<T> {
    /// The output once more, `[T, E]`, if it was asked for.
    pub y: Option<DeviceBuffer<T>>,
    /// `[T, E]`
    pub u: DeviceBuffer<T>,
    /// `[T, E]`
    pub delta: DeviceBuffer<T>,
    /// `[E, N]`
    pub a: DeviceBuffer<f32>,
    /// `[T, G, N]`
    pub b: DeviceBuffer<T>,
    /// `[T, G, N]`
    pub c: DeviceBuffer<T>,
    /// `[E]`; empty without D.
    pub d: DeviceBuffer<f32>,
    /// `[T, E]`; empty without a gate, or if a place was given for it.
    pub z: DeviceBuffer<T>,
    /// `[E]`; empty without a bias.
    pub delta_bias: DeviceBuffer<f32>,
    /// `[slots, E, N]`; empty if no state came in
    pub state: DeviceBuffer<f32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct InputArguments {
    u: u64,
    delta: u64,
    z: u64,
    b: u64,
    c: u64,
    u_stride: i64,
    delta_stride: i64,
    z_stride: i64,
    b_stride: i64,
    c_stride: i64,
    a: u64,
    d: u64,
    delta_bias: u64,
    segments: u64,
    channels: i64,
    groups: i32,
    softplus: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArguments {
    inputs: InputArguments,
    h0: u64,
    starts: u64,
    last: u64,
    chunks: u64,
    y: u64,
    y_stride: i64,
}
// SAFETY: the layout of `ForwardArguments` in cuda.cu.
unsafe impl KernelArguments for ForwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct JoinedArguments {
    scan: ForwardArguments,
    pieces: u64,
}
// SAFETY: the layout of `JoinedArguments` in cuda.cu.
unsafe impl KernelArguments for JoinedArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct EndsArguments {
    inputs: InputArguments,
    dy: u64,
    dy_stride: i64,
    ends: u64,
    sizes: u64,
}
// SAFETY: the layout of `EndsArguments` in cuda.cu.
unsafe impl KernelArguments for EndsArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct CombineArguments {
    segments: u64,
    runs: u64,
    a: u64,
    edge: u64,
    sizes: u64,
    states: u64,
    channels: i64,
    backward: i32,
}
// SAFETY: the layout of `CombineArguments` in cuda.cu.
unsafe impl KernelArguments for CombineArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArguments {
    inputs: InputArguments,
    dy: u64,
    dy_stride: i64,
    chunks: u64,
    dlast: u64,
    carries: u64,
    du: u64,
    ddelta: u64,
    dz: u64,
    y: u64,
    du_stride: i64,
    ddelta_stride: i64,
    dz_stride: i64,
    dh0: u64,
    da: u64,
    dd: u64,
    dbias: u64,
    dmaps: u64,
    tokens: i64,
}
// SAFETY: the layout of `BackwardArguments` in cuda_backward.cuh.
unsafe impl KernelArguments for BackwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceMapsArguments {
    dmaps: u64,
    db: u64,
    dc: u64,
    db_stride: i64,
    dc_stride: i64,
    tokens: i64,
    groups: i32,
    tiles: i32,
}
// SAFETY: the layout of `ReduceMapsArguments` in cuda_backward.cuh.
unsafe impl KernelArguments for ReduceMapsArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceSegmentsArguments {
    parts: u64,
    sum: u64,
    length: i64,
    segments: i64,
}
// SAFETY: the layout of `ReduceSegmentsArguments` in cuda_backward.cuh.
unsafe impl KernelArguments for ReduceSegmentsArguments {}

impl<T: GpuElement> Inputs<'_, T> {
    fn module(&self, gpu: &Gpu) -> Result<Module> {
        let (states, pair) = (self.plan.states.to_string(), self.plan.shape.pair.to_string());
        gpu.module(&SOURCE, &[("ELEMENT", T::CUDA), ("STATES", &states), ("PAIR", &pair)])
    }

    fn arguments(&self) -> Result<InputArguments> {
        let plan = self.plan;
        let (tokens, e) = (plan.extents.tokens, plan.channels);
        let width = plan.groups * plan.states;
        if self.state.is_none() && plan.extents.any_continued {
            return Err(wrong(OP, "a sequence continues, expected a state, got none".into()));
        }
        Ok(InputArguments {
            u: self.u.address(OP, tokens, e)?,
            delta: self.delta.address(OP, tokens, e)?,
            z: self.z.map_or(Ok(0), |z| z.address(OP, tokens, e))?,
            b: self.b.address(OP, tokens, width)?,
            c: self.c.address(OP, tokens, width)?,
            u_stride: self.u.stride(),
            delta_stride: self.delta.stride(),
            z_stride: self.z.map_or(0, |z| z.stride()),
            b_stride: self.b.stride(),
            c_stride: self.c.stride(),
            a: array(OP, "a", self.a, plan.matrix())?,
            d: optional(OP, "d", self.d, e)?,
            delta_bias: optional(OP, "delta_bias", self.delta_bias, e)?,
            segments: plan.segments.address(),
            channels: e as i64,
            groups: plan.groups as i32,
            softplus: i32::from(self.delta_softplus),
        })
    }

    /// What enters every segment of cut sequences: states, or in backward gradients. `edge` is what enters
    /// sequences from outside.
    fn entering(
        &self,
        gpu: &Gpu,
        dy: Option<Rows<'_, T>>,
        edge: Option<DeviceSlice<'_, f32>>,
    ) -> Result<Option<DeviceBuffer<f32>>> {
        let plan = self.plan;
        if !plan.is_cut() {
            return Ok(None);
        }
        let tokens = plan.extents.tokens;
        let module = self.module(gpu)?;
        let states = gpu.scratch::<f32>(plan.count * plan.matrix())?;
        let sizes = gpu.scratch::<f32>(plan.count * plan.channels)?;
        let ends = EndsArguments {
            inputs: self.arguments()?,
            dy: dy.map_or(Ok(0), |dy| dy.address(OP, tokens, plan.channels))?,
            dy_stride: dy.map_or(0, |dy| dy.stride()),
            ends: states.address(),
            sizes: sizes.address(),
        };
        let combine = CombineArguments {
            segments: plan.segments.address(),
            runs: plan.run_starts.address(),
            a: self.a.address(),
            edge: optional(OP, "state", edge, plan.state_len())?,
            sizes: sizes.address(),
            states: states.address(),
            channels: plan.channels as i64,
            backward: i32::from(dy.is_some()),
        };
        let name =
            if dy.is_some() { "selective_scan_backward_ends" } else { "selective_scan_ends" };
        let blocks = plan.runs.len() * plan.matrix().div_ceil(THREADS);
        // SAFETY: the extents of all arrays were checked by `arguments`, the tables are the plan's own.
        unsafe {
            gpu.launch(&module.kernel(name)?, plan.launch(plan.shape.forward_floats), &ends)?;
            let launch = Launch::linear(blocks as u32, THREADS as u32);
            gpu.launch(&module.kernel("selective_scan_combine")?, launch, &combine)?;
        }
        Ok(Some(states))
    }
}

/// Output `[T, E]`, the state after the batch `[slots, E, N]`, and, if `save`, what backward needs.
///
/// # Errors
/// If a buffer does not fit, or the GPU fails.
pub fn forward<T: GpuElement>(
    gpu: &Gpu,
    inputs: &Inputs<'_, T>,
    save: bool,
) -> Result<(DeviceBuffer<T>, DeviceBuffer<f32>, Option<Chunks>)> {
    let plan = inputs.plan;
    let tokens = plan.extents.tokens;
    let y = gpu.scratch::<T>(tokens * plan.channels)?;
    // Slots that no sequence changes hand their state through.
    let last = match inputs.state {
        Some(state) => state.duplicate(gpu)?,
        // Every slot has a sequence, which writes it.
        None if plan.extents.sequences == plan.extents.slots => gpu.scratch(plan.state_len())?,
        None => gpu.zeros(plan.state_len())?,
    };
    let chunks = save.then(|| gpu.scratch::<f32>(plan.chunks * plan.matrix())).transpose()?;
    let starts = match plan.joined {
        Some(_) => None,
        None => inputs.entering(gpu, None, inputs.state)?,
    };
    let mut arguments = ForwardArguments {
        inputs: inputs.arguments()?,
        h0: optional(OP, "state", inputs.state, plan.state_len())?,
        starts: starts.as_ref().map_or(0, DeviceBuffer::address),
        last: last.address(),
        chunks: chunks.as_ref().map_or(0, DeviceBuffer::address),
        y: y.address(),
        y_stride: plan.channels as i64,
    };
    let (module, floats) = (inputs.module(gpu)?, plan.shape.forward_floats);
    // SAFETY: the extents of all arrays were checked by `arguments`; the others were made here.
    unsafe {
        if let Some(joined) = &plan.joined {
            arguments.inputs.segments = joined.sequences.address();
            let arguments = JoinedArguments { scan: arguments, pieces: joined.pieces.address() };
            let kernel = module.kernel("selective_scan_joined")?;
            gpu.launch(&kernel, plan.launch_joined(floats), &arguments)?;
        } else {
            let kernel = module.kernel("selective_scan_forward")?;
            gpu.launch(&kernel, plan.launch(floats), &arguments)?;
        }
    }
    Ok((y, last, chunks.map(Chunks)))
}

/// Gradients by the inputs, given those of the output `[T, E]` and of the state after the batch; that of z is written to
/// `dz`, if there is such a place. Sums run in an order that the plan decides. `with_output` asks for the output as
/// well, which only a scan with a gate makes on its way.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: GpuElement>(
    gpu: &Gpu,
    inputs: &Inputs<'_, T>,
    chunks: &Chunks,
    dy: Rows<'_, T>,
    dlast: Option<DeviceSlice<'_, f32>>,
    dz: Option<&Place>,
    with_output: bool,
) -> elapid_tensor::Result<Gradients<T>> {
    let plan = inputs.plan;
    if with_output && inputs.z.is_none() {
        return Err(wrong(OP, "the output in backward: expected a gate".into()).into());
    }
    let (tokens, e) = (plan.extents.tokens, plan.channels);
    let width = plan.groups * plan.states;
    let (has_d, has_bias) = (inputs.d.is_some(), inputs.delta_bias.is_some());
    let found = Gradients {
        y: with_output.then(|| gpu.scratch(tokens * e)).transpose()?,
        u: gpu.scratch(tokens * e)?,
        delta: gpu.scratch(tokens * e)?,
        a: gpu.scratch(plan.matrix())?,
        b: gpu.scratch(tokens * width)?,
        c: gpu.scratch(tokens * width)?,
        d: gpu.scratch(if has_d { e } else { 0 })?,
        z: gpu.scratch(if inputs.z.is_some() && dz.is_none() { tokens * e } else { 0 })?,
        delta_bias: gpu.scratch(if has_bias { e } else { 0 })?,
        state: match (inputs.state, dlast) {
            (None, _) => gpu.scratch(0)?,
            (_, Some(dlast)) => dlast.duplicate(gpu)?,
            _ => gpu.zeros(plan.state_len())?,
        },
    };
    let (dz, dz_stride) = target(OP, dz, &found.z, (tokens, e))?;
    let carries = inputs.entering(gpu, Some(dy), dlast)?;
    let da = gpu.scratch::<f32>(plan.count * plan.matrix())?;
    let dd = gpu.scratch::<f32>(if has_d { plan.count * e } else { 0 })?;
    let dbias = gpu.scratch::<f32>(if has_bias { plan.count * e } else { 0 })?;
    let dmaps = gpu.scratch::<f32>(plan.groups * plan.tiles() * tokens * 2 * plan.states)?;
    let arguments = BackwardArguments {
        inputs: inputs.arguments()?,
        dy: dy.address(OP, tokens, e)?,
        dy_stride: dy.stride(),
        chunks: array(OP, "chunks", &chunks.0, plan.chunks * plan.matrix())?,
        dlast: optional(OP, "dlast", dlast, plan.state_len())?,
        carries: carries.as_ref().map_or(0, DeviceBuffer::address),
        du: found.u.address(),
        ddelta: found.delta.address(),
        dz: if inputs.z.is_some() { dz } else { 0 },
        y: found.y.as_ref().map_or(0, DeviceBuffer::address),
        du_stride: e as i64,
        ddelta_stride: e as i64,
        dz_stride,
        dh0: if inputs.state.is_some() { found.state.address() } else { 0 },
        da: da.address(),
        dd: if has_d { dd.address() } else { 0 },
        dbias: if has_bias { dbias.address() } else { 0 },
        dmaps: dmaps.address(),
        tokens: tokens as i64,
    };
    let reduce_maps = ReduceMapsArguments {
        dmaps: dmaps.address(),
        db: found.b.address(),
        dc: found.c.address(),
        db_stride: width as i64,
        dc_stride: width as i64,
        tokens: tokens as i64,
        groups: plan.groups as i32,
        tiles: plan.tiles() as i32,
    };
    let module = inputs.module(gpu)?;
    let sum_segments = module.kernel("selective_scan_reduce_segments")?;
    // SAFETY: the extents of all arrays were checked by `arguments` and above; the others were made here.
    unsafe {
        let kernel = module.kernel("selective_scan_backward")?;
        gpu.launch(&kernel, plan.launch(plan.shape.backward_floats), &arguments)?;
        let launch = Plan::threads(tokens * 2 * width);
        gpu.launch(&module.kernel("selective_scan_reduce_maps")?, launch, &reduce_maps)?;
        for (parts, sum) in [(&da, &found.a), (&dd, &found.d), (&dbias, &found.delta_bias)] {
            let arguments = ReduceSegmentsArguments {
                parts: parts.address(),
                sum: sum.address(),
                length: sum.len() as i64,
                segments: plan.count as i64,
            };
            gpu.launch(&sum_segments, Plan::threads(sum.len()), &arguments)?;
        }
    }
    Ok(found)
}
