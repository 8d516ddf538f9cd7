//! The launches of a decode step: what `rows.cu`, `project.cu` and `scan.cu` are given.

use elapid_tensor::bf16;
use elapid_tensor::cuda::{
    DeviceBuffer, Gpu, Kernel, KernelArguments, Launch, Module, Result, Source,
};

use super::{Encoding, LayerState, LayerWeights, NormWeights, OP, Packed, Sizes, Weights};
use crate::gpu::wrong;

const LAYOUT: (&str, &str) = ("decode_layout.cuh", include_str!("layout.cuh"));
static PROJECT: Source =
    Source { name: "decode_project", text: include_str!("project.cu"), headers: &[LAYOUT] };
static SCAN: Source =
    Source { name: "decode_scan", text: include_str!("scan.cu"), headers: &[LAYOUT] };
static ROWS: Source =
    Source { name: "decode_rows", text: include_str!("rows.cu"), headers: &[LAYOUT] };

/// Warps that share the terms of a sum: SHARES and MANY_SHARES in project.cu.
const SHARES: usize = 8;
const MANY_SHARES: usize = 16;

/// The kernels around the projections and those that pack weights.
pub(super) fn rows_module(gpu: &Gpu, encoding: Encoding) -> Result<Module> {
    gpu.module(&ROWS, &[("QUANTISED", encoding.quantised())])
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    weights: u64,
    x: u64,
    row_tiles: i64,
    blocks: i64,
    columns: i64,
    squares: u64,
    square_count: i64,
    width: f32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct InputArguments {
    product: Product,
    bias: u64,
    taps: u64,
    tap_bias: u64,
    tail: u64,
    slots: u64,
    u: u64,
    gate: u64,
    channels: i64,
    channel_blocks: i64,
}
// SAFETY: the layout of `InputArguments` in project.cu.
unsafe impl KernelArguments for InputArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsArguments {
    product: Product,
    out: u64,
    rows: i64,
    stride: i64,
}
// SAFETY: the layout of `RowsArguments` in project.cu.
unsafe impl KernelArguments for RowsArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct OutputArguments {
    product: Product,
    bias: u64,
    residual: u64,
    norm: u64,
    x: u64,
    squares: u64,
    rows: i64,
    row_blocks: i64,
}
// SAFETY: the layout of `OutputArguments` in project.cu.
unsafe impl KernelArguments for OutputArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScanArguments {
    selection: u64,
    selection_stride: i64,
    delta: u64,
    delta_blocks: i64,
    rank: i64,
    delta_bias: u64,
    a: u64,
    d: u64,
    state: u64,
    slots: u64,
    u: u64,
    gate: u64,
    y: u64,
    channels: i64,
    channel_blocks: i64,
    columns: i64,
    eps: f32,
}
// SAFETY: the layout of `ScanArguments` in scan.cu.
unsafe impl KernelArguments for ScanArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Normed {
    norm: u64,
    norm_bias: u64,
    x: u64,
    squares: u64,
    width: i64,
    blocks: i64,
    eps: f32,
    centred: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedArguments {
    table: u64,
    ids: u64,
    residual: u64,
    to: Normed,
    columns: i64,
    classes: i64,
}
// SAFETY: the layout of `EmbedArguments` in rows.cu.
unsafe impl KernelArguments for EmbedArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArguments {
    residual: u64,
    to: Normed,
    columns: i64,
}
// SAFETY: the layout of `NormArguments` in rows.cu.
unsafe impl KernelArguments for NormArguments {}

/// How a product is cut: tiles of 16 rows and of 8 columns that a block owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    row_tiles: usize,
    column_tiles: usize,
}

impl Cut {
    /// Large blocks read activations seldom; small ones fill the card.
    fn of(row_tiles: usize, columns: usize, most_columns: usize, multiprocessors: usize) -> Self {
        let columns = columns.div_ceil(8);
        let column_tiles = columns.next_power_of_two().min(most_columns);
        let mut cut = Self { row_tiles: if column_tiles >= 4 { 2 } else { 1 }, column_tiles };
        while cut.blocks(row_tiles, columns) < multiprocessors {
            match cut {
                Self { row_tiles: 2, .. } => cut.row_tiles = 1,
                Self { column_tiles: 1, .. } => break,
                _ => cut.column_tiles /= 2,
            }
        }
        cut
    }

    fn blocks(self, row_tiles: usize, column_tiles: usize) -> usize {
        row_tiles.div_ceil(self.row_tiles) * column_tiles.div_ceil(self.column_tiles)
    }
}

fn address<T: bytemuck::Pod>(buffer: &Option<DeviceBuffer<T>>) -> u64 {
    buffer.as_ref().map_or(0, DeviceBuffer::address)
}

/// Decode steps of up to some sequences: their activations.
#[derive(Debug)]
pub struct Step {
    gpu: Gpu,
    sizes: Sizes,
    capacity: usize,
    residual: DeviceBuffer<f32>,
    x: DeviceBuffer<bf16>,
    squares: DeviceBuffer<f32>,
    u: DeviceBuffer<bf16>,
    gate: DeviceBuffer<bf16>,
    selection: DeviceBuffer<f32>,
    y: DeviceBuffer<bf16>,
    logits: DeviceBuffer<f32>,
}

impl Step {
    /// Memory for steps of up to `capacity` sequences.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(gpu: &Gpu, sizes: &Sizes, capacity: usize) -> Result<Self> {
        let Sizes { width, inner, states, rank, classes, .. } = *sizes;
        // Zeros: what fills up a block of terms is read.
        let activations = |terms: usize| {
            gpu.zeros::<bf16>(capacity.next_multiple_of(8) * terms.next_multiple_of(32))
        };
        Ok(Self {
            gpu: gpu.clone(),
            sizes: *sizes,
            capacity,
            residual: gpu.zeros(capacity * width)?,
            x: activations(width)?,
            squares: gpu.zeros(capacity * width.div_ceil(16))?,
            u: activations(inner)?,
            gate: gpu.zeros(capacity * inner)?,
            selection: gpu.zeros(capacity * (rank + 2 * states))?,
            y: activations(inner)?,
            logits: gpu.zeros(capacity * classes)?,
        })
    }

    /// Most sequences of a step.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Logits of the last step [columns, V].
    pub fn logits(&self) -> &DeviceBuffer<f32> {
        &self.logits
    }

    /// Launches a step of `columns` sequences: reads a token id each, moves the states of their slots on, and leaves
    /// logits. A column of slot -1 has no sequence: its logits mean nothing.
    ///
    /// # Errors
    /// If something has another size, or the driver refuses.
    ///
    /// # Safety
    /// Slots must be below the states' number of slots, and no two columns may have the same one. The states are changed
    /// where they are: nobody else may rely on their values.
    pub unsafe fn run(
        &self,
        weights: &Weights,
        states: &[LayerState],
        ids: &DeviceBuffer<u32>,
        slots: &DeviceBuffer<i32>,
        columns: usize,
    ) -> elapid_tensor::Result<()> {
        weights.check(&self.sizes)?;
        if columns > self.capacity || ids.len() < columns || slots.len() < columns {
            let (ids, slots, capacity) = (ids.len(), slots.len(), self.capacity);
            let message =
                format!("{columns} columns, room for {capacity}, {ids} ids, {slots} slots");
            return Err(wrong(OP, message).into());
        }
        if states.len() != weights.layers.len() {
            let message = format!("{} states for {} layers", states.len(), weights.layers.len());
            return Err(wrong(OP, message).into());
        }
        let first = weights.layers.first().map_or(&weights.norm, |layer| &layer.norm);
        self.embed(&weights.embedding, first, ids, columns)?;
        for (i, (layer, state)) in weights.layers.iter().zip(states).enumerate() {
            let next = weights.layers.get(i + 1).map_or(&weights.norm, |layer| &layer.norm);
            // SAFETY: the caller's promise.
            unsafe { self.layer(layer, next, state, slots, columns)? };
        }
        self.norm_apart(&weights.norm, columns)?;
        let head = weights.head();
        let arguments = RowsArguments {
            product: self.product(head, &self.x, columns, true),
            out: self.logits.address(),
            rows: head.rows() as i64,
            stride: head.rows() as i64,
        };
        // SAFETY: the logits have room for the columns; the kernel waits for the one before.
        unsafe { self.project("decode_rows", head, columns, SHARES, &arguments)? };
        Ok(())
    }

    /// # Safety
    /// As [`Step::run`].
    unsafe fn layer(
        &self,
        layer: &LayerWeights,
        next: &NormWeights,
        state: &LayerState,
        slots: &DeviceBuffer<i32>,
        columns: usize,
    ) -> elapid_tensor::Result<()> {
        let (tail, recurrent) = state.places(&self.sizes)?;
        let Sizes { inner, rank, states, .. } = self.sizes;
        let (channels, channel_blocks) = (inner as i64, inner.div_ceil(32) as i64);
        self.norm_apart(&layer.norm, columns)?;
        let input = InputArguments {
            product: self.product(&layer.input, &self.x, columns, true),
            bias: address(&layer.input_bias),
            taps: layer.taps.address(),
            tap_bias: address(&layer.tap_bias),
            tail,
            slots: slots.address(),
            u: self.u.address(),
            gate: self.gate.address(),
            channels,
            channel_blocks,
        };
        let selection = RowsArguments {
            product: self.product(&layer.selection, &self.u, columns, false),
            out: self.selection.address(),
            rows: layer.selection.rows() as i64,
            stride: (rank + 2 * states) as i64,
        };
        let scan = ScanArguments {
            selection: self.selection.address(),
            selection_stride: selection.stride,
            delta: layer.delta.address(),
            delta_blocks: layer.delta.blocks() as i64,
            rank: rank as i64,
            delta_bias: address(&layer.delta_bias),
            a: layer.a.address(),
            d: layer.d.address(),
            state: recurrent,
            slots: slots.address(),
            u: self.u.address(),
            gate: self.gate.address(),
            y: self.y.address(),
            channels,
            channel_blocks,
            columns: columns as i64,
            eps: self.sizes.selection_eps.unwrap_or_default(),
        };
        let output = OutputArguments {
            product: self.product(&layer.output, &self.y, columns, false),
            bias: address(&layer.output_bias),
            residual: self.residual.address(),
            norm: next.weight.address(),
            x: if self.sizes.centred { 0 } else { self.x.address() },
            squares: self.squares.address(),
            rows: self.sizes.width as i64,
            row_blocks: self.sizes.width.div_ceil(32) as i64,
        };
        // SAFETY: `check` compared the weights with the sizes that the buffers were made for; slots are the caller's
        // promise; all four kernels wait for the one before.
        unsafe {
            self.project("decode_input", &layer.input, columns, SHARES, &input)?;
            self.project("decode_selection", &layer.selection, columns, MANY_SHARES, &selection)?;
            self.gpu.launch_chained(&self.scan_kernel()?, self.scan_launch(columns), &scan)?;
            self.project("decode_output", &layer.output, columns, SHARES, &output)?;
        }
        Ok(())
    }

    fn scan_kernel(&self) -> Result<Kernel> {
        let states = self.sizes.states.to_string();
        let normed = if self.sizes.selection_eps.is_some() { "1" } else { "0" };
        self.gpu.module(&SCAN, &[("STATES", &states), ("NORMED", normed)])?.kernel("decode_scan")
    }

    fn scan_launch(&self, columns: usize) -> Launch {
        let width = self.sizes.rank + 2 * self.sizes.states;
        let stride = width + 4 - width % 4;
        Launch {
            grid: [self.sizes.inner.div_ceil(16) as u32, columns.div_ceil(8) as u32, 1],
            block: [128, 1, 1],
            shared: (4 * 8 * stride) as u32,
        }
    }

    /// The product of a matrix with columns of activations, of which the norm's sums are known if `normed`.
    fn product(
        &self,
        weights: &Packed,
        x: &DeviceBuffer<bf16>,
        columns: usize,
        normed: bool,
    ) -> Product {
        let factors = normed && !self.sizes.centred;
        Product {
            weights: weights.address(),
            x: x.address(),
            row_tiles: weights.tiles() as i64,
            blocks: weights.blocks() as i64,
            columns: columns as i64,
            squares: if factors { self.squares.address() } else { 0 },
            square_count: self.sizes.width.div_ceil(16) as i64,
            width: self.sizes.width as f32,
            eps: self.sizes.eps,
        }
    }

    /// # Safety
    /// As [`Gpu::launch_chained`], of a kernel of project.cu.
    unsafe fn project<A: KernelArguments>(
        &self,
        name: &str,
        weights: &Packed,
        columns: usize,
        shares: usize,
        arguments: &A,
    ) -> Result<()> {
        let most = if shares == SHARES { 8 } else { 2 };
        let cut = Cut::of(weights.tiles(), columns, most, self.gpu.multiprocessors());
        let macros = [
            ("QUANTISED", weights.encoding().quantised().to_owned()),
            ("ROW_TILES", cut.row_tiles.to_string()),
            ("COLUMN_TILES", cut.column_tiles.to_string()),
            ("TAPS", self.sizes.taps.to_string()),
        ];
        let macros = macros.each_ref().map(|(name, value)| (*name, value.as_str()));
        let kernel = self.gpu.module(&PROJECT, &macros)?.kernel(name)?;
        let (rows, width) = (16 * cut.row_tiles, 8 * cut.column_tiles);
        let launch = Launch {
            grid: [
                weights.tiles().div_ceil(cut.row_tiles) as u32,
                columns.div_ceil(width) as u32,
                1,
            ],
            block: [(32 * shares) as u32, 1, 1],
            shared: (4 * (shares * width * (rows + 4) + width)) as u32,
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch_chained(&kernel, launch, arguments) }
    }

    fn normed(&self, norm: &NormWeights) -> Normed {
        Normed {
            norm: norm.weight.address(),
            norm_bias: address(&norm.bias),
            x: self.x.address(),
            squares: if self.sizes.centred { 0 } else { self.squares.address() },
            width: self.sizes.width as i64,
            blocks: self.sizes.width.div_ceil(32) as i64,
            eps: self.sizes.eps,
            centred: i32::from(self.sizes.centred),
        }
    }

    /// The first kernel of a step: it starts when everything before has ended, and what later kernels read before they
    /// wait is there.
    fn embed(
        &self,
        table: &Packed,
        norm: &NormWeights,
        ids: &DeviceBuffer<u32>,
        columns: usize,
    ) -> Result<()> {
        let arguments = EmbedArguments {
            table: table.address(),
            ids: ids.address(),
            residual: self.residual.address(),
            to: self.normed(norm),
            columns: columns as i64,
            classes: table.rows() as i64,
        };
        let kernel = rows_module(&self.gpu, table.encoding())?.kernel("decode_embed")?;
        // SAFETY: a block a column, each with an id; the buffers have room for the columns.
        unsafe { self.gpu.launch(&kernel, Launch::linear(columns as u32, 256), &arguments) }
    }

    /// A norm in a kernel of its own, where it is not folded into products: LayerNorm.
    fn norm_apart(&self, norm: &NormWeights, columns: usize) -> Result<()> {
        if !self.sizes.centred {
            return Ok(());
        }
        let arguments = NormArguments {
            residual: self.residual.address(),
            to: self.normed(norm),
            columns: columns as i64,
        };
        let kernel = rows_module(&self.gpu, Encoding::Bf16)?.kernel("decode_norm")?;
        // SAFETY: a block a column; the buffers have room for the columns.
        unsafe { self.gpu.launch_chained(&kernel, Launch::linear(columns as u32, 256), &arguments) }
    }
}

#[cfg(test)]
mod cuts {
    use super::Cut;

    #[test]
    fn small_blocks_where_the_card_is_not_filled() {
        let cut = |row_tiles, columns| {
            let Cut { row_tiles, column_tiles } = Cut::of(row_tiles, columns, 8, 132);
            (row_tiles, column_tiles)
        };
        assert_eq!(cut(192, 1), (1, 1));
        assert_eq!(cut(48, 1), (1, 1));
        assert_eq!(cut(640, 32), (2, 4));
        assert_eq!(cut(640, 256), (2, 8));
        assert_eq!(cut(48, 128), (1, 4));
    }
}
