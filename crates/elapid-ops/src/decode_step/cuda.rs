//! The launches of a decode step: what `rows.cu`, `project.cu` and `scan.cu` are given.

use elapid_tensor::cuda::{DeviceBuffer, Gpu, KernelArguments, Launch, Module, Result, Source};
use elapid_tensor::{DType, bf16};

use super::arguments::{
    EmbedArguments, InputArguments, JoinArguments, NormArguments, Normed, OutputArguments,
    PartArguments, Product, RowsArguments, ScanArguments,
};
use super::cut::{Cut, SHARES, Target};
use super::{Encoding, LayerState, LayerWeights, NormWeights, OP, Packed, Sizes, Weights};
use crate::gpu::wrong;

const LAYOUT: (&str, &str) = ("decode_layout.cuh", include_str!("layout.cuh"));
const GROUPS: (&str, &str) = ("decode_groups.cuh", include_str!("groups.cuh"));
const INPUT: (&str, &str) = ("decode_input.cuh", include_str!("input.cuh"));
const RECURRENCE: (&str, &str) = ("decode_scan.cuh", include_str!("scan.cuh"));
const PRODUCT: (&str, &str) = ("decode_product.cuh", include_str!("product.cuh"));
pub(super) const RANKING: (&str, &str) = ("decode_ranking.cuh", include_str!("ranking.cuh"));
static PROJECT: Source = Source {
    name: "decode_project",
    text: include_str!("project.cu"),
    headers: &[LAYOUT, GROUPS, PRODUCT, RANKING, INPUT],
};
static SCAN: Source = Source {
    name: "decode_scan",
    text: include_str!("scan.cu"),
    headers: &[LAYOUT, GROUPS, RECURRENCE],
};
static MANY_SCAN: Source = Source {
    name: "decode_scan_many",
    text: include_str!("scan_many.cu"),
    headers: &[LAYOUT, GROUPS, RECURRENCE],
};
static ROWS: Source =
    Source { name: "decode_rows", text: include_str!("rows.cu"), headers: &[LAYOUT, GROUPS] };

/// Fewest sequences whose recurrence is carried out by blocks of many.
const SCAN_MANY: usize = 33;
/// Of such a block: tiles of 16 channels, groups of 8 sequences, blocks on a multiprocessor, and bytes of states that a
/// thread has under way.
const SCAN_TILES: usize = 2;
const SCAN_GROUPS: usize = 2;
const SCAN_RESIDENT: usize = 5;
const SCAN_UNDER_WAY: usize = 128;

/// The kernels around the projections and those that pack weights.
pub(super) fn rows_module(gpu: &Gpu, encoding: Encoding) -> Result<Module> {
    gpu.module(&ROWS, &[("QUANTISED", encoding.quantised())])
}

fn address<T: bytemuck::Pod>(buffer: &Option<DeviceBuffer<T>>) -> u64 {
    buffer.as_ref().map_or(0, DeviceBuffer::address)
}

/// Decode steps of up to some sequences: their activations.
#[derive(Debug)]
pub struct Step {
    gpu: Gpu,
    target: Target,
    sizes: Sizes,
    capacity: usize,
    residual: DeviceBuffer<f32>,
    x: DeviceBuffer<bf16>,
    squares: DeviceBuffer<f32>,
    factors: DeviceBuffer<f32>,
    parts: DeviceBuffer<f32>,
    u: DeviceBuffer<bf16>,
    gate: DeviceBuffer<bf16>,
    selection: DeviceBuffer<f32>,
    y: DeviceBuffer<bf16>,
    logits: DeviceBuffer<f32>,
    best: DeviceBuffer<u64>,
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
            target: Target::of(gpu),
            sizes: *sizes,
            capacity,
            residual: gpu.zeros(capacity * width)?,
            x: activations(width)?,
            squares: gpu.zeros(capacity * width.div_ceil(16))?,
            factors: gpu.zeros(capacity)?,
            parts: match Cut::has_many(capacity) {
                true => gpu.zeros(SHARES / 2 * capacity * width.next_multiple_of(16))?,
                false => gpu.zeros(1)?,
            },
            u: activations(inner)?,
            gate: gpu.zeros(capacity * inner)?,
            selection: gpu.zeros(capacity * (rank + 2 * states))?,
            y: activations(inner)?,
            logits: gpu.zeros(capacity * classes)?,
            best: gpu.zeros(capacity * classes.div_ceil(16))?,
        })
    }

    /// Multiplies as on a card whose tensor cores do not read shared memory.
    #[cfg(test)]
    pub(super) fn without_groups(mut self) -> Self {
        self.target.grouped = false;
        self
    }

    /// Multiplies in blocks as large as they can be.
    #[cfg(test)]
    pub(super) fn on_one_multiprocessor(mut self) -> Self {
        self.target.multiprocessors = 1;
        self
    }

    /// Most sequences of a step.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Logits of the last step [columns, V].
    pub fn logits(&self) -> &DeviceBuffer<f32> {
        &self.logits
    }

    /// Logits of a column, V.
    pub(super) fn classes(&self) -> usize {
        self.sizes.classes
    }

    /// The highest rank of every 16 logits (`ranking.cuh`) [columns, V / 16].
    pub(super) fn best(&self) -> &DeviceBuffer<u64> {
        &self.best
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
            best: self.best.address(),
        };
        let cut = Cut::of(self.target, head, columns);
        // SAFETY: the logits have room for the columns; the kernel waits for the one before.
        unsafe { self.project("decode_rows", head, columns, cut, &arguments)? };
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
            best: 0,
        };
        let scan = ScanArguments {
            selection: self.selection.address(),
            delta: layer.delta.address(),
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
            groups: self.scan_groups(columns) as i64,
            eps: self.sizes.selection_eps.unwrap_or_default(),
        };
        let input_cut = Cut::of(self.target, &layer.input, columns);
        let selection_cut = Cut::of_many_terms(self.target, &layer.selection, columns);
        // SAFETY: `check` compared the weights with the sizes that the buffers were made for; slots are the caller's
        // promise; all kernels wait for the one before.
        unsafe {
            self.project("decode_input", &layer.input, columns, input_cut, &input)?;
            self.project("decode_selection", &layer.selection, columns, selection_cut, &selection)?;
            self.scan(columns, &scan)?;
            self.output(layer, next, columns)?;
        }
        Ok(())
    }

    /// residual ← residual + W_out y, and what the next norm needs.
    ///
    /// # Safety
    /// As [`Step::run`].
    unsafe fn output(
        &self,
        layer: &LayerWeights,
        next: &NormWeights,
        columns: usize,
    ) -> Result<()> {
        let product = self.product(&layer.output, &self.y, columns, false);
        let bias = address(&layer.output_bias);
        let cut = Cut::of_parts(self.target, &layer.output, columns);
        if !cut.is_many() {
            let output = OutputArguments {
                product,
                bias,
                residual: self.residual.address(),
                norm: next.weight.address(),
                x: if self.sizes.centred { 0 } else { self.x.address() },
                squares: self.squares.address(),
                rows: self.sizes.width as i64,
                row_blocks: self.sizes.width.div_ceil(32) as i64,
            };
            // SAFETY: the caller's promise.
            return unsafe { self.project("decode_output", &layer.output, columns, cut, &output) };
        }
        let part = PartArguments { product, parts: self.parts.address() };
        let blocks = layer.output.blocks();
        let join = JoinArguments {
            parts: self.parts.address(),
            pairs: blocks.div_ceil(blocks.div_ceil(SHARES)).div_ceil(2) as i64,
            row_tiles: layer.output.tiles() as i64,
            bias,
            residual: self.residual.address(),
            to: self.normed(next),
            columns: columns as i64,
        };
        let kernel = rows_module(&self.gpu, Encoding::Bf16)?.kernel("decode_join")?;
        // SAFETY: as above; a block a column.
        unsafe {
            self.project("decode_part", &layer.output, columns, cut, &part)?;
            self.gpu.launch_chained(
                &kernel,
                Launch::linear(columns as u32, self.column_threads()),
                &join,
            )
        }
    }

    /// # Safety
    /// As [`Step::run`].
    unsafe fn scan(&self, columns: usize, arguments: &ScanArguments) -> Result<()> {
        let (states, rank) = (self.sizes.states.to_string(), self.sizes.rank.to_string());
        let normed = if self.sizes.selection_eps.is_some() { "1" } else { "0" };
        let narrow = if self.sizes.state == DType::BF16 { "1" } else { "0" };
        let macros =
            [("STATES", &*states), ("RANK", &*rank), ("NORMED", normed), ("NARROW_STATE", narrow)];
        if columns >= SCAN_MANY && [4, 8, 16, 32].contains(&self.sizes.states) {
            let own = [
                ("CHANNEL_TILES", SCAN_TILES),
                ("COLUMN_GROUPS", SCAN_GROUPS),
                ("RESIDENT", SCAN_RESIDENT),
                ("UNDER_WAY", SCAN_UNDER_WAY),
                ("DELTA_WARPS", 4),
            ]
            .map(|(name, value)| (name, value.to_string()));
            let own = own.iter().map(|(name, value)| (*name, value.as_str()));
            let macros: Vec<(&str, &str)> = macros.into_iter().chain(own).collect();
            let kernel = self.gpu.module(&MANY_SCAN, &macros)?.kernel("decode_scan_many")?;
            let launch = Launch {
                grid: [
                    self.sizes.inner.div_ceil(16 * SCAN_TILES) as u32,
                    columns.div_ceil(8 * SCAN_GROUPS) as u32,
                    1,
                ],
                block: [(32 * SCAN_TILES * SCAN_GROUPS) as u32, 1, 1],
                shared: 0,
            };
            // SAFETY: the caller's promise.
            return unsafe { self.gpu.launch_chained(&kernel, launch, arguments) };
        }
        let kernel = self.gpu.module(&SCAN, &macros)?.kernel("decode_scan")?;
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch_chained(&kernel, self.scan_launch(columns), arguments) }
    }

    /// Groups of 8 sequences that a block of the scan goes through: as many as leave blocks for the whole card.
    fn scan_groups(&self, columns: usize) -> usize {
        let blocks = self.sizes.inner.div_ceil(16) * columns.div_ceil(8);
        blocks.div_ceil(4 * self.gpu.multiprocessors()).min(4)
    }

    fn scan_launch(&self, columns: usize) -> Launch {
        Launch {
            grid: [
                self.sizes.inner.div_ceil(16) as u32,
                columns.div_ceil(8 * self.scan_groups(columns)) as u32,
                1,
            ],
            block: [128, 1, 1],
            shared: 0,
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
            first_tiles: match weights.first_rows() == weights.rows() {
                true => 0,
                false => weights.first_rows().div_ceil(16) as i64,
            },
            blocks: weights.blocks() as i64,
            columns: columns as i64,
            squares: if factors { self.squares.address() } else { 0 },
            factors: match factors && Cut::has_many(columns) {
                true => self.factors.address(),
                false => 0,
            },
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
        cut: Cut,
        arguments: &A,
    ) -> Result<()> {
        let taps = self.sizes.taps.to_string();
        let mut macros =
            vec![("QUANTISED", weights.encoding().quantised().to_owned()), ("TAPS", taps)];
        macros.extend(cut.macros(weights));
        let macros: Vec<(&str, &str)> =
            macros.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let kernel = self.gpu.module(&PROJECT, &macros)?.kernel(name)?;
        let launch = cut.launch(weights, columns, self.sizes.taps + 2);
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch_chained(&kernel, launch, arguments) }
    }

    /// Threads of a kernel whose blocks own a column: one a term, where they can.
    fn column_threads(&self) -> u32 {
        self.sizes.width.next_multiple_of(32).min(1024) as u32
    }

    fn normed(&self, norm: &NormWeights) -> Normed {
        Normed {
            norm: norm.weight.address(),
            norm_bias: address(&norm.bias),
            x: self.x.address(),
            squares: if self.sizes.centred { 0 } else { self.squares.address() },
            factors: self.factors.address(),
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
        let launch = Launch::linear(columns as u32, self.column_threads());
        // SAFETY: a block a column, each with an id; the buffers have room for the columns.
        unsafe { self.gpu.launch(&kernel, launch, &arguments) }
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
