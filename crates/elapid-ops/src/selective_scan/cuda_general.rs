//! The scan in its general form on a GPU, complex or with B or C constant: what `cuda_general.cu` and
//! `cuda_general_backward.cuh` are given and in what order.
//!
//! A block works on one whole sequence and a tile of channels of one group, so that nothing depends on what else is
//! in the batch. Gradients that are sums over channels are first summed in the tile, those that are sums over tokens
//! in the sequence; then one launch each adds the tiles or sequences in order.

use std::sync::Arc;

use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Module, Result, Source,
};
use elapid_tensor::{Device, Sequences};

use super::{MAX_STATES, OP, cuda};
use crate::gpu::{Extents, GpuElement, Rows, array, optional, wrong};

static SOURCE: Source = Source {
    name: "selective_scan_general",
    text: include_str!("cuda_general.cu"),
    headers: &[
        ("cuda_general_channel.cuh", include_str!("cuda_general_channel.cuh")),
        ("cuda_general_backward.cuh", include_str!("cuda_general_backward.cuh")),
    ],
};

const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Steps from one saved state to the next.
const CHUNK: usize = 64;
/// Most floats of scratch a token and channel for the gradients of B and C (as far as all channels of a group can make
/// one tile).
const SCRATCH: usize = 8;
/// Floats of shared memory a warp for the same gradients.
const ROOM: usize = 1024;

/// An input or output map, or the gradient by it: of every token `[T, G, N]`, or constant `[E, N]` and f32.
#[derive(Debug)]
pub(super) enum Map<K, C> {
    Token(K),
    Constant(C),
}

/// B or C in device memory.
pub(super) type MapArgument<'a, T> = Map<Rows<'a, T>, DeviceSlice<'a, f32>>;

/// Arguments of a scan in device memory: T is the type of `u`, `delta`, `z` and of B and C of the token; all else is
/// f32. Where `complex`, numbers of A, B, C and the state are pairs (re, im).
#[derive(Debug)]
pub(super) struct Inputs<'a, T> {
    /// E
    pub(super) channels: usize,
    /// N
    pub(super) states: usize,
    pub(super) complex: bool,
    /// G, of B and C of the token; 1 if both are constant.
    pub(super) groups: usize,
    /// `[T, E]`
    pub(super) u: Rows<'a, T>,
    /// δ before bias and softplus, `[T, E]`.
    pub(super) delta: Rows<'a, T>,
    /// Decay rates `[E, N]`.
    pub(super) a: DeviceSlice<'a, f32>,
    pub(super) b: MapArgument<'a, T>,
    pub(super) c: MapArgument<'a, T>,
    /// Skip `[E]`.
    pub(super) d: Option<DeviceSlice<'a, f32>>,
    /// Gate `[T, E]`.
    pub(super) z: Option<Rows<'a, T>>,
    /// Added to δ, `[E]`.
    pub(super) delta_bias: Option<DeviceSlice<'a, f32>>,
    /// Whether Δ is the softplus of δ + bias.
    pub(super) delta_softplus: bool,
    /// State `[slots, E, N]` that continued sequences start from.
    pub(super) state: Option<DeviceSlice<'a, f32>>,
    pub(super) plan: &'a Plan,
}

/// The sequences of a batch and where their saved states lie, in device memory.
#[derive(Debug)]
pub(super) struct Plan {
    /// First token, length, first saved state, and slot and continued as two 32-bit numbers.
    table: DeviceBuffer<[i64; 4]>,
    extents: Extents,
    chunks: usize,
}

/// What backward needs of forward: the states before every 64th step.
#[derive(Debug)]
pub(super) struct Chunks(DeviceBuffer<f32>);

/// Gradients by the inputs; those by D, z and the bias are empty without them.
#[derive(Debug)]
pub(super) struct Gradients<T> {
    /// `[T, E]`
    pub(super) u: DeviceBuffer<T>,
    /// `[T, E]`
    pub(super) delta: DeviceBuffer<T>,
    /// `[E, N]`
    pub(super) a: DeviceBuffer<f32>,
    pub(super) b: Map<DeviceBuffer<T>, DeviceBuffer<f32>>,
    pub(super) c: Map<DeviceBuffer<T>, DeviceBuffer<f32>>,
    /// `[E]`
    pub(super) d: DeviceBuffer<f32>,
    /// `[T, E]`
    pub(super) z: DeviceBuffer<T>,
    /// `[E]`
    pub(super) delta_bias: DeviceBuffer<f32>,
    /// `[slots, E, N]`
    pub(super) state: DeviceBuffer<f32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct InputArguments {
    u: u64,
    delta: u64,
    z: u64,
    b: u64,
    c: u64,
    constant_b: u64,
    constant_c: u64,
    u_stride: i64,
    delta_stride: i64,
    z_stride: i64,
    b_stride: i64,
    c_stride: i64,
    a: u64,
    d: u64,
    delta_bias: u64,
    sequences: u64,
    channels: i64,
    groups: i32,
    softplus: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArguments {
    inputs: InputArguments,
    h0: u64,
    last: u64,
    chunks: u64,
    y: u64,
}
// SAFETY: the layout of `ForwardArguments` in cuda_general.cu.
unsafe impl KernelArguments for ForwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArguments {
    inputs: InputArguments,
    dy: u64,
    dy_stride: i64,
    chunks: u64,
    dlast: u64,
    du: u64,
    ddelta: u64,
    dz: u64,
    dh0: u64,
    da: u64,
    db: u64,
    dc: u64,
    dd: u64,
    dbias: u64,
    dmaps: u64,
    tokens: i64,
}
// SAFETY: the layout of `BackwardArguments` in cuda_general_backward.cuh.
unsafe impl KernelArguments for BackwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumMapsArguments {
    dmaps: u64,
    db: u64,
    dc: u64,
    tokens: i64,
    groups: i32,
    tiles: i32,
}
// SAFETY: the layout of `SumMapsArguments` in cuda_general.cu.
unsafe impl KernelArguments for SumMapsArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumSequencesArguments {
    parts: u64,
    sum: u64,
    length: i64,
    sequences: i64,
}
// SAFETY: the layout of `SumSequencesArguments` in cuda_general.cu.
unsafe impl KernelArguments for SumSequencesArguments {}

impl<T> From<cuda::Gradients<T>> for Gradients<T> {
    fn from(grad: cuda::Gradients<T>) -> Self {
        Self {
            u: grad.u,
            delta: grad.delta,
            a: grad.a,
            b: Map::Token(grad.b),
            c: Map::Token(grad.c),
            d: grad.d,
            z: grad.z,
            delta_bias: grad.delta_bias,
            state: grad.state,
        }
    }
}

impl<K, C> Map<K, C> {
    fn is_token(&self) -> bool {
        matches!(self, Self::Token(_))
    }
}

impl Plan {
    /// Copies the table of the batch's sequences to the GPU on the first call; later what that call made.
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn of(gpu: &Gpu, sequences: &Sequences) -> elapid_tensor::Result<Arc<Self>> {
        let make = || {
            let mut chunks = 0;
            let rows = sequences.iter().map(|s| {
                let first_chunk = chunks;
                chunks += s.len.div_ceil(CHUNK);
                let slot = s.slot as i64 | i64::from(s.continued) << 32;
                [s.start as i64, s.len as i64, first_chunk as i64, slot]
            });
            let rows: Vec<[i64; 4]> = rows.collect();
            Ok(Self { table: gpu.upload(&rows)?, extents: sequences.into(), chunks })
        };
        sequences.kept((Device::Cuda(gpu.id()), [0; 4]), make)
    }
}

/// One thread for each of `count` results, in blocks of 256.
fn threads(count: usize) -> Launch {
    Launch::linear(count.div_ceil(256) as u32, 256)
}

impl<T: GpuElement> Inputs<'_, T> {
    /// Floats of a channel's states.
    fn numbers(&self) -> usize {
        self.states * if self.complex { 2 } else { 1 }
    }

    fn matrix(&self) -> usize {
        self.channels * self.numbers()
    }

    fn state_len(&self) -> usize {
        self.plan.extents.slots * self.matrix()
    }

    /// Floats of a token's B and C of a group, as far as they are not constant.
    fn row(&self) -> usize {
        (usize::from(self.b.is_token()) + usize::from(self.c.is_token())) * self.numbers()
    }

    /// Channels that a block has at a time.
    fn block_channels(&self) -> usize {
        THREADS
            / match self.states {
                0..=8 => 8,
                9..=16 => 16,
                _ => 32,
            }
    }

    /// Channels that a thread of backward has, one after another.
    fn passes(&self) -> usize {
        self.row().div_ceil(SCRATCH * self.block_channels()).max(1)
    }

    /// Steps whose gradients by B and C are summed over a block's warps at a time.
    fn together(&self) -> usize {
        [8, 4, 2].into_iter().find(|steps| steps * self.row() <= ROOM).unwrap_or(1)
    }

    /// Tiles of a group, of so many channels.
    fn tiles(&self, channels: usize) -> usize {
        (self.channels / self.groups).div_ceil(channels)
    }

    /// One block a sequence and tile of so many channels.
    fn launch(&self, channels: usize) -> Launch {
        let blocks = self.plan.extents.sequences * self.groups * self.tiles(channels);
        Launch::linear(blocks as u32, THREADS as u32)
    }

    fn module(&self, gpu: &Gpu) -> Result<Module> {
        let flag = |on: bool| if on { "1" } else { "0" };
        let [states, channels, passes, together, chunk] =
            [self.states, self.block_channels(), self.passes(), self.together(), CHUNK]
                .map(|number| number.to_string());
        let macros = [
            ("ELEMENT", T::CUDA),
            ("STATES", &states),
            ("COMPLEX", flag(self.complex)),
            ("TOKEN_B", flag(self.b.is_token())),
            ("TOKEN_C", flag(self.c.is_token())),
            ("CHANNELS", &channels),
            ("CHUNK", &chunk),
            ("PASSES", &passes),
            ("TOGETHER", &together),
        ];
        gpu.module(&SOURCE, &macros)
    }

    fn arguments(&self) -> Result<InputArguments> {
        let (tokens, e) = (self.plan.extents.tokens, self.channels);
        if self.groups == 0 || e == 0 || !e.is_multiple_of(self.groups) {
            let message = format!("{} groups do not divide {e} channels", self.groups);
            return Err(wrong(OP, message));
        }
        if !(1..=MAX_STATES).contains(&self.states) {
            let message = format!("{} states a channel, expected 1 to {MAX_STATES}", self.states);
            return Err(wrong(OP, message));
        }
        if self.state.is_none() && self.plan.extents.any_continued {
            return Err(wrong(OP, "a sequence continues, expected a state, got none".into()));
        }
        // Address of the rows and stride, or address of what is constant.
        let map = |name, map: &MapArgument<'_, T>| match map {
            Map::Token(rows) => {
                let width = self.groups * self.numbers();
                Ok((rows.address(OP, tokens, width)?, rows.stride(), 0))
            }
            Map::Constant(matrix) => Ok((0, 0, array(OP, name, *matrix, self.matrix())?)),
        };
        let (b, b_stride, constant_b) = map("b", &self.b)?;
        let (c, c_stride, constant_c) = map("c", &self.c)?;
        Ok(InputArguments {
            u: self.u.address(OP, tokens, e)?,
            delta: self.delta.address(OP, tokens, e)?,
            z: self.z.map_or(Ok(0), |z| z.address(OP, tokens, e))?,
            b,
            c,
            constant_b,
            constant_c,
            u_stride: self.u.stride(),
            delta_stride: self.delta.stride(),
            z_stride: self.z.map_or(0, |z| z.stride()),
            b_stride,
            c_stride,
            a: array(OP, "a", self.a, self.matrix())?,
            d: optional(OP, "d", self.d, e)?,
            delta_bias: optional(OP, "delta_bias", self.delta_bias, e)?,
            sequences: self.plan.table.address(),
            channels: e as i64,
            groups: self.groups as i32,
            softplus: i32::from(self.delta_softplus),
        })
    }
}

/// Output `[T, E]`, the state after the batch `[slots, E, N]`, and, if `save`, what backward needs.
///
/// # Errors
/// If a buffer does not fit, or the GPU fails.
pub(super) fn forward<T: GpuElement>(
    gpu: &Gpu,
    inputs: &Inputs<'_, T>,
    save: bool,
) -> Result<(DeviceBuffer<T>, DeviceBuffer<f32>, Option<Chunks>)> {
    let plan = inputs.plan;
    let of_inputs = inputs.arguments()?;
    let y = gpu.scratch::<T>(plan.extents.tokens * inputs.channels)?;
    // Slots that no sequence changes hand their state through.
    let last = match inputs.state {
        Some(state) => state.duplicate(gpu)?,
        None => gpu.zeros(inputs.state_len())?,
    };
    let chunks = save.then(|| gpu.scratch::<f32>(plan.chunks * inputs.matrix())).transpose()?;
    let arguments = ForwardArguments {
        inputs: of_inputs,
        h0: optional(OP, "state", inputs.state, inputs.state_len())?,
        last: last.address(),
        chunks: chunks.as_ref().map_or(0, DeviceBuffer::address),
        y: y.address(),
    };
    let kernel = inputs.module(gpu)?.kernel("selective_scan_general_forward")?;
    // SAFETY: the extents of all arrays were checked by `arguments`; the others were made here.
    unsafe { gpu.launch(&kernel, inputs.launch(inputs.block_channels()), &arguments)? };
    Ok((y, last, chunks.map(Chunks)))
}

/// Gradients by the inputs, given those of the output `[T, E]` and of the state after the batch, and what forward
/// saved.
///
/// # Errors
/// As [`forward`].
pub(super) fn backward<T: GpuElement>(
    gpu: &Gpu,
    inputs: &Inputs<'_, T>,
    chunks: &Chunks,
    dy: Rows<'_, T>,
    dlast: Option<DeviceSlice<'_, f32>>,
) -> Result<Gradients<T>> {
    let plan = inputs.plan;
    let (tokens, e, matrix) = (plan.extents.tokens, inputs.channels, inputs.matrix());
    let of_inputs = inputs.arguments()?;
    let if_there = |there: bool, len: usize| if there { len } else { 0 };
    let (has_d, has_bias) = (inputs.d.is_some(), inputs.delta_bias.is_some());
    let map = |map: &Map<_, _>| -> Result<_> {
        Ok(match map {
            Map::Token(_) => Map::Token(gpu.scratch(tokens * inputs.groups * inputs.numbers())?),
            Map::Constant(_) => Map::Constant(gpu.scratch(matrix)?),
        })
    };
    let found = Gradients {
        u: gpu.scratch(tokens * e)?,
        delta: gpu.scratch(tokens * e)?,
        a: gpu.scratch(matrix)?,
        b: map(&inputs.b)?,
        c: map(&inputs.c)?,
        d: gpu.scratch(if_there(has_d, e))?,
        z: gpu.scratch(if_there(inputs.z.is_some(), tokens * e))?,
        delta_bias: gpu.scratch(if_there(has_bias, e))?,
        state: match dlast {
            Some(dlast) => dlast.duplicate(gpu)?,
            None => gpu.zeros(inputs.state_len())?,
        },
    };
    let tile = inputs.block_channels() * inputs.passes();
    let tiles = inputs.tiles(tile);
    // Sums of each sequence.
    let of_sequences = |len: usize| gpu.scratch::<f32>(plan.extents.sequences * len);
    let da = of_sequences(matrix)?;
    let db = of_sequences(if_there(!inputs.b.is_token(), matrix))?;
    let dc = of_sequences(if_there(!inputs.c.is_token(), matrix))?;
    let dd = of_sequences(if_there(has_d, e))?;
    let dbias = of_sequences(if_there(has_bias, e))?;
    let dmaps = gpu.scratch::<f32>(inputs.groups * tiles * tokens * inputs.row())?;
    let arguments = BackwardArguments {
        inputs: of_inputs,
        dy: dy.address(OP, tokens, e)?,
        dy_stride: dy.stride(),
        chunks: array(OP, "chunks", &chunks.0, plan.chunks * matrix)?,
        dlast: optional(OP, "dlast", dlast, inputs.state_len())?,
        du: found.u.address(),
        ddelta: found.delta.address(),
        dz: if inputs.z.is_some() { found.z.address() } else { 0 },
        dh0: found.state.address(),
        da: da.address(),
        db: db.address(),
        dc: dc.address(),
        dd: if has_d { dd.address() } else { 0 },
        dbias: if has_bias { dbias.address() } else { 0 },
        dmaps: dmaps.address(),
        tokens: tokens as i64,
    };
    let token_map = |map: &Map<DeviceBuffer<T>, _>| match map {
        Map::Token(map) => map.address(),
        Map::Constant(_) => 0,
    };
    let sum_maps = SumMapsArguments {
        dmaps: dmaps.address(),
        db: token_map(&found.b),
        dc: token_map(&found.c),
        tokens: tokens as i64,
        groups: inputs.groups as i32,
        tiles: tiles as i32,
    };
    let mut sums = vec![(&da, &found.a), (&dd, &found.d), (&dbias, &found.delta_bias)];
    for (parts, map) in [(&db, &found.b), (&dc, &found.c)] {
        if let Map::Constant(sum) = map {
            sums.push((parts, sum));
        }
    }
    let module = inputs.module(gpu)?;
    let sum_sequences = module.kernel("selective_scan_general_sum_sequences")?;
    // SAFETY: the extents of all arrays were checked by `arguments` and above; the others were made here.
    unsafe {
        let room = 4 * WARPS * inputs.together() * inputs.row();
        let launch = Launch { shared: room as u32, ..inputs.launch(tile) };
        gpu.launch(&module.kernel("selective_scan_general_backward")?, launch, &arguments)?;
        let launch = threads(tokens * inputs.groups * inputs.row());
        gpu.launch(&module.kernel("selective_scan_general_sum_maps")?, launch, &sum_maps)?;
        for (parts, sum) in sums {
            let arguments = SumSequencesArguments {
                parts: parts.address(),
                sum: sum.address(),
                length: sum.len() as i64,
                sequences: plan.extents.sequences as i64,
            };
            gpu.launch(&sum_sequences, threads(sum.len()), &arguments)?;
        }
    }
    Ok(found)
}
