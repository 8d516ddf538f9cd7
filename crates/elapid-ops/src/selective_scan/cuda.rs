//! The scan on a GPU: what `cuda.cu` and `cuda_backward.cuh` are given and in what order.
//!
//! A block works on one segment of a sequence and a tile of channels. A sequence is one segment, or several where
//! there would be too few blocks to fill the card: then one pass finds each segment's end from zero, a short serial
//! pass the state that enters each, and all segments run at the same time. Backward is the mirror image.

use std::ops::Range;
use std::sync::Arc;

use elapid_tensor::autograd::Place;
use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Module, Result, Source,
};
use elapid_tensor::{Device, Sequences};

use super::{MAX_STATES, OP};
use crate::gpu::{Extents, GpuElement, Rows, array, optional, target, wrong};

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

const THREADS: usize = 128;
/// Blocks a multiprocessor from which on a lane takes two channels instead of one: more work for each value of B and C
/// brought from shared memory, but half as many blocks. Fewer leave parts of the card with one block, others with two.
const WORTH_PAIRING: f64 = 1.9;
/// Tokens of a segment from which on lanes of cut sequences take two channels.
const WORTH_PAIRING_SEGMENTS: usize = 1024;
/// Most states of a channel with which lanes take two: with more, a block has few channels as it is.
const PAIRED_STATES: usize = 16;
/// Blocks that a multiprocessor holds at once: of one channel a lane (forward), of two.
const BLOCKS: [usize; 2] = [5, 3];
/// Sequences are cut to fill the card if it holds so many times the blocks that there are: the second pass over the
/// recurrence must be paid for.
const WORTH_CUTTING: usize = 4;

/// How sequences are cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// So that the whole batch fills the card.
    Fill,
    /// Into segments of so many tokens (rounded up to whole tiles): then the bits of a sequence's results do not
    /// depend on what else is in the batch, nor on the card.
    Every(usize),
    /// Not at all.
    Never,
}

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

/// The shape of a scan and the segments of its batch, prepared once for forward and backward.
#[derive(Debug)]
pub struct Plan {
    channels: usize,
    states: usize,
    groups: usize,
    shape: Shape,
    extents: Extents,
    /// The segments of each sequence.
    runs: Vec<Range<usize>>,
    segments: DeviceBuffer<[i64; 4]>,
    /// Where each sequence's segments begin, and their number at the end.
    run_starts: DeviceBuffer<i32>,
    chunks: usize,
    count: usize,
}

/// What backward needs of forward: the states before every so many steps.
#[derive(Debug)]
pub struct Chunks(DeviceBuffer<f32>);

/// Gradients by the inputs.
#[derive(Debug)]
pub struct Gradients<T> {
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
    /// `[slots, E, N]`
    pub state: DeviceBuffer<f32>,
}

/// The shape of a block, as the kernels derive it from the number of states and of a lane's channels.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Channels a lane: 1 or 2.
    pair: usize,
    channels: usize,
    steps: usize,
    forward_floats: usize,
    backward_floats: usize,
}

impl Shape {
    fn new(states: usize, pair: usize) -> Self {
        let lanes = match states {
            0..=16 => 4,
            17..=32 => 8,
            33..=64 => 16,
            _ => 32,
        };
        let own = states.div_ceil(lanes);
        let padded = lanes * own;
        let channels = THREADS / lanes * pair;
        let steps = if states <= 64 { 32 } else { 16 };
        let width = channels / if channels == 64 { 8 } else { 4 };
        let map = |copies: usize| copies * (steps * padded + if copies > 1 { 16 } else { 0 });
        let of_channels = 2 * channels;
        let pairs = steps * channels * 2;
        let copies = match (lanes, own, pair) {
            (4, 4, 1) => 4,
            (4, 4, _) => 2,
            _ => 1,
        };
        let saved = steps / 4 * (THREADS / 32) * (32 * pair * own).max(8 * padded);
        Self {
            pair,
            channels,
            steps,
            forward_floats: 2 * (pairs + 2 * map(1)) + of_channels,
            backward_floats: pairs
                + steps * (channels + 8)
                + 2 * map(copies)
                + saved
                + THREADS * 2 * width
                + of_channels,
        }
    }

    /// For `cut` and the sequences of a batch; only [`Cut::Fill`] lets the batch decide.
    fn of(
        gpu: &Gpu,
        (channels, groups, states): (usize, usize, usize),
        sequences: &Sequences,
        cut: Cut,
    ) -> Self {
        let narrow = Self::new(states, 1);
        if cut != Cut::Fill || states > PAIRED_STATES {
            return narrow;
        }
        let wide = Self::new(states, 2);
        let tiles = groups * (channels / groups).div_ceil(wide.channels);
        let blocks = tiles * sequences.len();
        let pieces = wide.pieces(gpu, blocks);
        let many = blocks as f64 >= WORTH_PAIRING * gpu.multiprocessors() as f64;
        let long = pieces >= WORTH_CUTTING && longest(sequences) / pieces >= WORTH_PAIRING_SEGMENTS;
        if many || long { wide } else { narrow }
    }

    /// Into how many pieces each of so many blocks' work must be cut to fill the card.
    fn pieces(&self, gpu: &Gpu, blocks: usize) -> usize {
        BLOCKS[self.pair - 1] * gpu.multiprocessors() / blocks.max(1)
    }
}

fn longest(sequences: &Sequences) -> usize {
    sequences.iter().map(|s| s.len).max().unwrap_or(0)
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

impl Plan {
    /// Cuts the sequences of a batch into segments and copies their table to the GPU, for E channels in G groups
    /// of N states.
    ///
    /// # Errors
    /// If G does not divide E, N is 0 or above [`MAX_STATES`], or there is no memory.
    pub fn new(
        gpu: &Gpu,
        sequences: &Sequences,
        (channels, groups, states): (usize, usize, usize),
        cut: Cut,
    ) -> Result<Self> {
        if channels == 0 || groups == 0 || !channels.is_multiple_of(groups) {
            let message = format!("{groups} groups do not divide {channels} channels");
            return Err(wrong(OP, message));
        }
        if !(1..=MAX_STATES).contains(&states) {
            return Err(wrong(
                OP,
                format!("{states} states a channel, expected 1 to {MAX_STATES}"),
            ));
        }
        let shape = Shape::of(gpu, (channels, groups, states), sequences, cut);
        let tiles = groups * (channels / groups).div_ceil(shape.channels);
        let size = match cut {
            Cut::Never => usize::MAX,
            Cut::Every(tokens) => tokens.max(1).next_multiple_of(shape.steps),
            Cut::Fill => {
                let pieces = shape.pieces(gpu, tiles * sequences.len());
                if pieces < WORTH_CUTTING {
                    usize::MAX
                } else {
                    longest(sequences)
                        .div_ceil(pieces)
                        .next_multiple_of(shape.steps)
                        .max(4 * shape.steps)
                }
            }
        };
        let (mut rows, mut starts, mut runs) = (Vec::new(), vec![0], Vec::new());
        let mut chunks = 0;
        for s in sequences {
            let first = rows.len();
            let pieces = s.len.div_ceil(size).max(1);
            for piece in 0..pieces {
                let begin = piece * size.min(s.len);
                let length = size.min(s.len - begin);
                let flags = i64::from(piece == 0)
                    | i64::from(piece + 1 == pieces) << 1
                    | i64::from(s.continued) << 2;
                rows.push([
                    (s.start + begin) as i64,
                    length as i64,
                    (chunks + begin / shape.steps) as i64,
                    s.slot as i64 | flags << 32,
                ]);
            }
            chunks += s.len.div_ceil(shape.steps);
            runs.push(first..rows.len());
            starts.push(rows.len() as i32);
        }
        Ok(Self {
            channels,
            states,
            groups,
            shape,
            extents: sequences.into(),
            runs,
            count: rows.len(),
            segments: gpu.upload(&rows)?,
            run_starts: gpu.upload(&starts)?,
            chunks,
        })
    }

    /// [`Plan::new`] on the first call, later what that call made.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn of(
        gpu: &Gpu,
        sequences: &Sequences,
        (channels, groups, states): (usize, usize, usize),
    ) -> elapid_tensor::Result<Arc<Self>> {
        let key = (Device::Cuda(gpu.id()), [channels, groups, states, 0]);
        let sizes = (channels, groups, states);
        sequences.kept(key, || Ok(Self::new(gpu, sequences, sizes, Cut::Fill)?))
    }

    fn matrix(&self) -> usize {
        self.channels * self.states
    }

    fn state_len(&self) -> usize {
        self.extents.slots * self.matrix()
    }

    /// Tiles of channels in a group.
    fn tiles(&self) -> usize {
        (self.channels / self.groups).div_ceil(self.shape.channels)
    }

    fn is_cut(&self) -> bool {
        self.runs.iter().any(|run| run.len() > 1)
    }

    /// One block a segment and tile.
    fn launch(&self, floats: usize) -> Launch {
        let blocks = self.count * self.groups * self.tiles();
        Launch { shared: (4 * floats) as u32, ..Launch::linear(blocks as u32, THREADS as u32) }
    }

    /// One thread for each of `count` results, in blocks of 256.
    fn threads(count: usize) -> Launch {
        Launch::linear(count.div_ceil(256) as u32, 256)
    }
}

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
        None => gpu.zeros(plan.state_len())?,
    };
    let chunks = save.then(|| gpu.scratch::<f32>(plan.chunks * plan.matrix())).transpose()?;
    let starts = inputs.entering(gpu, None, inputs.state)?;
    let arguments = ForwardArguments {
        inputs: inputs.arguments()?,
        h0: optional(OP, "state", inputs.state, plan.state_len())?,
        starts: starts.as_ref().map_or(0, DeviceBuffer::address),
        last: last.address(),
        chunks: chunks.as_ref().map_or(0, DeviceBuffer::address),
        y: y.address(),
        y_stride: plan.channels as i64,
    };
    let kernel = inputs.module(gpu)?.kernel("selective_scan_forward")?;
    // SAFETY: the extents of all arrays were checked by `arguments`; the others were made here.
    unsafe { gpu.launch(&kernel, plan.launch(plan.shape.forward_floats), &arguments)? };
    Ok((y, last, chunks.map(Chunks)))
}

/// Gradients by the inputs, given those of the output `[T, E]` and of the state after the batch; that of z is written to
/// `dz`, if there is such a place. Sums run in an order that the plan decides.
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
) -> elapid_tensor::Result<Gradients<T>> {
    let plan = inputs.plan;
    let (tokens, e) = (plan.extents.tokens, plan.channels);
    let width = plan.groups * plan.states;
    let (has_d, has_bias) = (inputs.d.is_some(), inputs.delta_bias.is_some());
    let found = Gradients {
        u: gpu.scratch(tokens * e)?,
        delta: gpu.scratch(tokens * e)?,
        a: gpu.scratch(plan.matrix())?,
        b: gpu.scratch(tokens * width)?,
        c: gpu.scratch(tokens * width)?,
        d: gpu.scratch(if has_d { e } else { 0 })?,
        z: gpu.scratch(if inputs.z.is_some() && dz.is_none() { tokens * e } else { 0 })?,
        delta_bias: gpu.scratch(if has_bias { e } else { 0 })?,
        state: match dlast {
            Some(dlast) => dlast.duplicate(gpu)?,
            None => gpu.zeros(plan.state_len())?,
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
        du_stride: e as i64,
        ddelta_stride: e as i64,
        dz_stride,
        dh0: found.state.address(),
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
