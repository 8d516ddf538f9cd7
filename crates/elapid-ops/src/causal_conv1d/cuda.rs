//! The convolution on a GPU: what `cuda.cu` is given and in what order.

use elapid_tensor::autograd::Place;
use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Module, Result, Source,
};

use crate::gpu::{DeviceSequences, GpuElement, Rows, array, optional, target, wrong};

const OP: &str = "causal_conv1d";

static SOURCE: Source = Source { name: OP, text: include_str!("cuda.cu"), headers: &[] };

/// Warps of a block.
const WARPS: usize = 8;
/// Blocks at work at once: two on each of 132 multiprocessors. Never the card's own number, as the division decides the
/// order of the parameters' sums.
const ROOM: usize = 264;
/// Fewest tokens that a warp walks.
const SHORTEST_RUN: usize = 16;
/// What a run costs besides its tokens, in tokens: its taps, the inputs before it, in backward also those behind.
const RUN_OVERHEAD: usize = 6;

/// Arguments of the convolution in device memory; arrays are f32, `x` and `y` of type T.
#[derive(Debug)]
pub struct Inputs<'a, T> {
    /// Input `[T, E]`.
    pub x: Rows<'a, T>,
    /// Taps `[E, W]`, the newest last.
    pub weight: DeviceSlice<'a, f32>,
    /// Bias `[E]`.
    pub bias: Option<DeviceSlice<'a, f32>>,
    /// Inputs before the first token `[slots, E, W - 1]`, oldest first.
    pub state: Option<DeviceSlice<'a, f32>>,
    /// The sequences of the batch.
    pub sequences: &'a DeviceSequences,
    /// E.
    pub channels: usize,
    /// W.
    pub width: usize,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// Gradients by the inputs.
#[derive(Debug)]
pub struct Gradients<T> {
    /// `[T, E]`; empty if a place was given for it.
    pub x: DeviceBuffer<T>,
    /// `[E, W]`
    pub weight: DeviceBuffer<f32>,
    /// `[E]`
    pub bias: DeviceBuffer<f32>,
    /// `[slots, E, W - 1]`; empty if no state came in
    pub state: DeviceBuffer<f32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArguments {
    x: u64,
    x_stride: i64,
    weight: u64,
    bias: u64,
    state: u64,
    y: u64,
    y_stride: i64,
    state_out: u64,
    sequences: u64,
    sequence_count: i64,
    tokens: i64,
    channels: i64,
    run: i64,
}
// SAFETY: the layout of `ForwardArguments` in cuda.cu.
unsafe impl KernelArguments for ForwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArguments {
    x: u64,
    x_stride: i64,
    weight: u64,
    bias: u64,
    state: u64,
    dy: u64,
    dy_stride: i64,
    dstate: u64,
    dx: u64,
    dx_stride: i64,
    dstate_in: u64,
    partial: u64,
    sequences: u64,
    sequence_count: i64,
    tokens: i64,
    channels: i64,
    run: i64,
}
// SAFETY: the layout of `BackwardArguments` in cuda.cu.
unsafe impl KernelArguments for BackwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceArguments {
    partial: u64,
    parts: i64,
    channels: i64,
    dweight: u64,
    dbias: u64,
}
// SAFETY: the layout of `ReduceArguments` in cuda.cu.
unsafe impl KernelArguments for ReduceArguments {}

impl<T: GpuElement> Inputs<'_, T> {
    fn tokens(&self) -> usize {
        self.sequences.extents().tokens
    }

    fn state_len(&self) -> usize {
        self.sequences.extents().slots * self.channels * (self.width - 1)
    }

    fn check(&self) -> Result<()> {
        if self.channels == 0 || self.width == 0 {
            return Err(wrong(OP, "there are no channels or no taps".into()));
        }
        if self.state.is_none() && self.sequences.extents().any_continued {
            return Err(wrong(OP, "a sequence continues, expected a state, got none".into()));
        }
        Ok(())
    }

    fn module(&self, gpu: &Gpu) -> Result<Module> {
        let width = self.width.to_string();
        let silu = if self.silu { "1" } else { "0" };
        gpu.module(&SOURCE, &[("ELEMENT", T::CUDA), ("WIDTH", &width), ("SILU", silu)])
    }

    /// The division for threads of `pack` channels.
    fn division(&self, pack: usize) -> Division {
        Division::new(self.tokens(), self.channels.div_ceil(32 * pack))
    }
}

/// How the tokens and channels are divided among blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Division {
    /// Blocks along the channels.
    columns: usize,
    /// Blocks along the tokens.
    rows: usize,
    /// Tokens of a warp.
    run: usize,
}

impl Division {
    /// Runs of the length with which the blocks need the least time, in whole turns of [`ROOM`] blocks: a last turn that is
    /// partly filled leaves multiprocessors idle.
    fn new(tokens: usize, columns: usize) -> Self {
        let of_turns = |turns: usize| {
            let rows = (turns * ROOM / columns).max(1);
            let run = tokens.div_ceil(rows * WARPS).max(SHORTEST_RUN);
            Self { columns, rows: tokens.div_ceil(run * WARPS).max(1), run }
        };
        let cost = |division: &Self| {
            (columns * division.rows).div_ceil(ROOM) * (division.run + RUN_OVERHEAD)
        };
        let mut best = of_turns(1);
        for turns in 2..=4 {
            let other = of_turns(turns);
            if cost(&other) < cost(&best) {
                best = other;
            }
        }
        best
    }

    fn launch(&self, shared_floats: usize) -> Launch {
        Launch {
            grid: [self.columns as u32, self.rows as u32, 1],
            block: [(32 * WARPS) as u32, 1, 1],
            shared: (shared_floats * 4) as u32,
        }
    }
}

/// Channels of a thread, as `cuda.cu` chooses them.
fn forward_pack<T>(width: usize) -> usize {
    match width {
        0..=4 => 16 / size_of::<T>(),
        5..=8 => 4,
        _ => 1,
    }
}

fn backward_pack(width: usize) -> usize {
    match width {
        0..=4 => 4,
        5..=8 => 2,
        _ => 1,
    }
}

/// Output `[T, E]` and the state after the batch `[slots, E, W - 1]`.
///
/// # Errors
/// If a buffer does not fit, or the GPU fails.
pub fn forward<T: GpuElement>(
    gpu: &Gpu,
    inputs: &Inputs<'_, T>,
) -> Result<(DeviceBuffer<T>, DeviceBuffer<f32>)> {
    inputs.check()?;
    let (tokens, channels, width) = (inputs.tokens(), inputs.channels, inputs.width);
    let y = gpu.scratch::<T>(tokens * channels)?;
    let extents = inputs.sequences.extents();
    let state_out = match inputs.state {
        Some(state) => state.duplicate(gpu)?,
        // Every slot is written: each has a sequence, and none goes on from what its slot holds.
        None if extents.sequences == extents.slots => gpu.scratch(inputs.state_len())?,
        None => gpu.zeros(inputs.state_len())?,
    };
    let pack = forward_pack::<T>(width);
    let division = inputs.division(pack);
    let arguments = ForwardArguments {
        x: inputs.x.address(OP, tokens, channels)?,
        x_stride: inputs.x.stride(),
        weight: array(OP, "weight", inputs.weight, channels * width)?,
        bias: optional(OP, "bias", inputs.bias, channels)?,
        state: optional(OP, "state", inputs.state, inputs.state_len())?,
        y: y.address(),
        y_stride: channels as i64,
        state_out: state_out.address(),
        sequences: inputs.sequences.address(),
        sequence_count: extents.sequences as i64,
        tokens: tokens as i64,
        channels: channels as i64,
        run: division.run as i64,
    };
    let kernel = inputs.module(gpu)?.kernel("causal_conv1d_forward")?;
    let launch = division.launch(33 * pack * width);
    // SAFETY: the extents of all arrays were checked above and the sequences lie within the tokens.
    unsafe { gpu.launch(&kernel, launch, &arguments)? };
    Ok((y, state_out))
}

/// Gradients by the inputs, given those of the output `[T, E]` and of the state after the batch; that of x is written to
/// `dx`, if there is such a place. The sums of the
/// parameters' gradients have an order that only T and E decide.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: GpuElement>(
    gpu: &Gpu,
    inputs: &Inputs<'_, T>,
    dy: Rows<'_, T>,
    dstate: Option<DeviceSlice<'_, f32>>,
    dx: Option<&Place>,
) -> elapid_tensor::Result<Gradients<T>> {
    inputs.check()?;
    let (tokens, channels, width) = (inputs.tokens(), inputs.channels, inputs.width);
    let pack = backward_pack(width);
    let division = inputs.division(pack);
    let parts = division.rows;
    let found = Gradients {
        x: gpu.scratch(if dx.is_some() { 0 } else { tokens * channels })?,
        weight: gpu.scratch(channels * width)?,
        bias: gpu.scratch(channels)?,
        state: match (inputs.state, dstate) {
            (None, _) => gpu.scratch(0)?,
            (_, Some(dstate)) => dstate.duplicate(gpu)?,
            _ => gpu.zeros(inputs.state_len())?,
        },
    };
    let (dx, dx_stride) = target(OP, dx, &found.x, (tokens, channels))?;
    let partial = gpu.scratch::<f32>(parts * (width + 1) * channels)?;
    let arguments = BackwardArguments {
        x: inputs.x.address(OP, tokens, channels)?,
        x_stride: inputs.x.stride(),
        weight: array(OP, "weight", inputs.weight, channels * width)?,
        bias: optional(OP, "bias", inputs.bias, channels)?,
        state: optional(OP, "state", inputs.state, inputs.state_len())?,
        dy: dy.address(OP, tokens, channels)?,
        dy_stride: dy.stride(),
        dstate: optional(OP, "dstate", dstate, inputs.state_len())?,
        dx,
        dx_stride,
        dstate_in: if inputs.state.is_some() { found.state.address() } else { 0 },
        partial: partial.address(),
        sequences: inputs.sequences.address(),
        sequence_count: inputs.sequences.extents().sequences as i64,
        tokens: tokens as i64,
        channels: channels as i64,
        run: division.run as i64,
    };
    let module = inputs.module(gpu)?;
    let floats = (33 * pack * width).max(32 * WARPS * pack * (width + 1));
    // SAFETY: the extents of all arrays were checked above and the sequences lie within the tokens.
    unsafe {
        let launch = division.launch(floats);
        gpu.launch(&module.kernel("causal_conv1d_backward")?, launch, &arguments)?;
        let reduce = ReduceArguments {
            partial: partial.address(),
            parts: parts as i64,
            channels: channels as i64,
            dweight: found.weight.address(),
            dbias: found.bias.address(),
        };
        let blocks = ((width + 1) * channels).div_ceil(256);
        let launch = Launch::linear(blocks as u32, 256);
        gpu.launch(&module.kernel("causal_conv1d_parameters")?, launch, &reduce)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_in_whole_turns() {
        // Columns of 1,536 and 5,120 channels, eight and four a thread.
        for columns in [6, 20, 12, 40] {
            for tokens in [2048, 16_384, 65_536] {
                let division = Division::new(tokens, columns);
                assert!(division.rows * division.run * WARPS >= tokens);
                let blocks = columns * division.rows;
                let busy = blocks as f64 / (blocks.next_multiple_of(ROOM)) as f64;
                if tokens > 2048 {
                    assert!(busy > 0.9, "{division:?}");
                }
            }
        }
        assert_eq!(Division::new(0, 6), Division { columns: 6, rows: 1, run: SHORTEST_RUN });
        assert_eq!(Division::new(1, 1000).rows, 1);
    }
}
