//! One call of the engine: up to a chunk of tokens through every layer, all threads in step.
//!
//! Between the projections a thread keeps to its own channels, so a layer needs four meetings (and two more where
//! inputs are rounded to integers or taken apart): before the convolution nothing is exchanged but the normed rows.

use std::ops::Range;

use elapid_ops::blocks::{Encoding, dequantize};
use elapid_ops::mamba_step::{Rows, Stretch, TILE, padded, rms};
use elapid_ops::quantized_linear::{Output, Storage, Writer, product};

use super::pool::Member;
use super::weights::{Layer, Matrix, Weights};

/// Rows of a projection are shared out in multiples of this.
const GROUP: usize = 8;

/// What flows through the layers, for up to a number of tokens.
pub(super) struct Scratch {
    tokens: usize,
    /// [T, D]
    pub residual: Vec<f32>,
    /// [T, D]
    pub normed: Vec<f32>,
    /// [T, D]
    pub out: Vec<f32>,
    /// [T, E padded]: x, then u, then y.
    pub x: Vec<f32>,
    /// [T, E padded]
    pub z: Vec<f32>,
    /// [T, R + 2N]
    pub projected: Vec<f32>,
    /// [tokens of a piece, V]
    pub logits: Vec<f32>,
    inputs: Vec<((Encoding, usize), Storage)>,
}

/// The sizes of a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub d: usize,
    pub e: usize,
    pub projected: usize,
    pub rank: usize,
    pub states: usize,
    pub vocabulary: usize,
}

impl Scratch {
    pub(super) fn new(tokens: usize, pieces: usize, sizes: Sizes, weights: &Weights) -> Self {
        let width = padded(sizes.e);
        let mut inputs: Vec<((Encoding, usize), Storage)> = Vec::new();
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        let projections = weights.layers.iter().flat_map(|l| [&l.in_proj, &l.x_proj, &l.out_proj]);
        for matrix in projections.chain([head]) {
            let key = (matrix.encoding, matrix.columns);
            if inputs.iter().all(|(own, _)| *own != key) {
                inputs.push((key, Storage::new(matrix.encoding, tokens, matrix.columns)));
            }
        }
        Self {
            tokens,
            residual: vec![0.0; tokens * sizes.d],
            normed: vec![0.0; tokens * sizes.d],
            out: vec![0.0; tokens * sizes.d],
            x: vec![0.0; tokens * width],
            z: vec![0.0; tokens * width],
            projected: vec![0.0; tokens * sizes.projected],
            logits: vec![0.0; pieces * sizes.vocabulary],
            inputs,
        }
    }

    /// Tokens that there is room for.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// What threads share.
    pub(super) fn frame<'a>(&mut self, weights: &'a Weights, sizes: Sizes) -> Frame<'a> {
        let rows = |x: &mut Vec<f32>, stride| Rows { pointer: x.as_mut_ptr(), stride };
        Frame {
            weights,
            sizes,
            residual: rows(&mut self.residual, sizes.d),
            normed: rows(&mut self.normed, sizes.d),
            out: rows(&mut self.out, sizes.d),
            x: rows(&mut self.x, padded(sizes.e)),
            z: rows(&mut self.z, padded(sizes.e)),
            projected: rows(&mut self.projected, sizes.projected),
            logits: rows(&mut self.logits, sizes.vocabulary),
            inputs: self.inputs.iter_mut().map(|(key, own)| (*key, own.writer())).collect(),
        }
    }
}

/// The memory of a call, as every thread sees it.
pub(super) struct Frame<'a> {
    weights: &'a Weights,
    sizes: Sizes,
    residual: Rows,
    normed: Rows,
    out: Rows,
    x: Rows,
    z: Rows,
    projected: Rows,
    logits: Rows,
    inputs: Vec<((Encoding, usize), Writer)>,
}

// SAFETY: threads write disjoint parts between two meetings, as each use below says.
unsafe impl Sync for Frame<'_> {}

/// The parts of a layer, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Residual stream, norm and, in the first layer, the embedding.
    Norm,
    InProj,
    Convolution,
    XProj,
    /// The norms of Δ's inputs, B and C, where there are such.
    PartNorms,
    Scan,
    OutProj,
}

impl Stage {
    pub(super) const ALL: [Self; 7] = [
        Self::Norm,
        Self::InProj,
        Self::Convolution,
        Self::XProj,
        Self::PartNorms,
        Self::Scan,
        Self::OutProj,
    ];
}

/// The tokens of a call, as a layer takes them.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a> {
    /// For the first layer.
    pub ids: Option<&'a [u32]>,
    pub count: usize,
    pub stretches: &'a [Stretch],
}

/// Where a layer's state is.
#[derive(Clone, Copy)]
pub(super) struct LayerPlace {
    /// [slots, E, W - 1]
    pub conv: *mut f32,
    /// [slots, E, N]
    pub ssm: *mut f32,
}

// SAFETY: threads use their own channels.
unsafe impl Sync for LayerPlace {}

impl Frame<'_> {
    /// The tokens `ids` of `stretches` through every layer: `residual` and `out` hold the result.
    ///
    /// # Safety
    /// All threads of one pool must call it with the same arguments; there must be room for the tokens; ids must be
    /// rows of the embedding; states must have every slot, and nobody else may use them or the scratch meanwhile.
    pub(super) unsafe fn layers(
        &self,
        member: &Member<'_>,
        ids: &[u32],
        stretches: &[Stretch],
        states: &[LayerPlace],
    ) {
        for (index, (layer, state)) in self.weights.layers.iter().zip(states).enumerate() {
            let tokens = Tokens { ids: (index == 0).then_some(ids), count: ids.len(), stretches };
            // SAFETY: the caller's.
            unsafe { self.layer(member, layer, tokens, *state) };
        }
    }

    /// # Safety
    /// As [`Frame::layers`].
    unsafe fn layer(
        &self,
        member: &Member<'_>,
        layer: &Layer,
        tokens: Tokens<'_>,
        state: LayerPlace,
    ) {
        for stage in Stage::ALL {
            if stage == Stage::PartNorms && self.weights.rms_eps.is_none() {
                continue;
            }
            // SAFETY: the caller's; the stages follow each other, with meetings where threads need what others wrote.
            unsafe { self.stage(stage, member, layer, tokens, state) };
            if stage != Stage::InProj {
                member.wait();
            }
        }
    }

    /// One stage of a layer. Between two of them all threads must meet, but for the convolution, whose channels are
    /// those that the thread has just projected.
    ///
    /// # Safety
    /// As [`Frame::layers`], and the stages before must have been carried out.
    pub(super) unsafe fn stage(
        &self,
        stage: Stage,
        member: &Member<'_>,
        layer: &Layer,
        tokens: Tokens<'_>,
        state: LayerPlace,
    ) {
        let Sizes { d, e, .. } = self.sizes;
        let Tokens { ids, count, .. } = tokens;
        match stage {
            Stage::Norm => {
                for token in member.share(count) {
                    // SAFETY: these rows are this thread's until the meeting; `out` was written before the last one.
                    unsafe {
                        let residual = slice(self.residual, token, d);
                        let out = match ids {
                            Some(ids) => {
                                self.embed(ids[token], residual);
                                None
                            }
                            None => Some(&*slice(self.out, token, d)),
                        };
                        layer.norm.run(out, residual, slice(self.normed, token, d));
                        self.round_row(&layer.in_proj, self.normed, token, count);
                    }
                }
            }
            Stage::InProj => {
                let own = channels(member, e);
                let gates = e + own.start..e + own.end;
                // SAFETY: the normed rows are only read now; channels of x and z are this thread's.
                unsafe {
                    self.part(stage, layer, tokens, own, state);
                    self.part(stage, layer, tokens, gates, state);
                }
            }
            // SAFETY: channels of x and the state are this thread's.
            Stage::Convolution => unsafe {
                self.part(stage, layer, tokens, channels(member, e), state);
            },
            // SAFETY: u is only read now; rows of the projection are this thread's.
            Stage::XProj => unsafe {
                self.round(member, &layer.x_proj, count);
                self.part(stage, layer, tokens, share_rows(member, layer.x_proj.rows), state);
            },
            Stage::PartNorms => {
                let Sizes { projected, rank, states, .. } = self.sizes;
                let Some(eps) = self.weights.rms_eps else { return };
                for token in member.share(count) {
                    // SAFETY: these rows are this thread's until the next meeting.
                    let row = unsafe { slice(self.projected, token, projected) };
                    let (dt, bc) = row.split_at_mut(rank);
                    let (b, c) = bc.split_at_mut(states);
                    for part in [dt, b, c] {
                        rms(part, eps);
                    }
                }
            }
            // SAFETY: the projection is only read now; channels of u, z and the state are this thread's.
            Stage::Scan => unsafe {
                self.part(stage, layer, tokens, channels(member, e), state);
            },
            // SAFETY: y was written before the meeting and is only read now; rows of the output are this thread's.
            Stage::OutProj => unsafe {
                self.round(member, &layer.out_proj, count);
                self.part(stage, layer, tokens, share_rows(member, d), state);
            },
        }
    }

    /// Some rows of a stage's projection, which are not of x and z both, or some channels in whole tiles; nothing of norms.
    ///
    /// # Safety
    /// As [`Frame::stage`]; inputs must be rounded, and no other thread may have these rows or channels.
    pub(super) unsafe fn part(
        &self,
        stage: Stage,
        layer: &Layer,
        tokens: Tokens<'_>,
        rows: Range<usize>,
        state: LayerPlace,
    ) {
        let Tokens { count, stretches, .. } = tokens;
        // SAFETY: the caller's.
        unsafe {
            let from = |to: Rows, start: usize| Rows { pointer: to.pointer.add(start), ..to };
            match stage {
                Stage::Norm | Stage::PartNorms => {}
                Stage::InProj => {
                    let to = match rows.start.checked_sub(self.sizes.e) {
                        None => from(self.x, rows.start),
                        Some(start) => from(self.z, start),
                    };
                    self.project(&layer.in_proj, self.normed, count, rows, to);
                }
                Stage::Convolution => layer.convolution.run(rows, stretches, self.x, state.conv),
                Stage::XProj => {
                    let to = from(self.projected, rows.start);
                    self.project(&layer.x_proj, self.x, count, rows, to);
                }
                Stage::Scan => {
                    let (u, z, state) = (self.x, self.z, state.ssm);
                    layer.scan.run(rows, stretches, u, z, self.projected, state);
                }
                Stage::OutProj => {
                    let to = from(self.out, rows.start);
                    self.project(&layer.out_proj, self.x, count, rows, to);
                }
            }
        }
    }

    /// Logits of the tokens `wanted`, after [`Frame::layers`].
    ///
    /// # Safety
    /// As [`Frame::layers`]; there must be room for these logits.
    pub(super) unsafe fn logits(&self, member: &Member<'_>, wanted: &[usize]) {
        // SAFETY: the caller's; threads have classes of their own.
        unsafe {
            self.last_norm(member, wanted);
            self.classes(wanted.len(), share_rows(member, self.sizes.vocabulary));
        }
        member.wait();
    }

    /// The last norm of the tokens `wanted`, as the head takes them; all threads meet behind it.
    ///
    /// # Safety
    /// As [`Frame::logits`].
    pub(super) unsafe fn last_norm(&self, member: &Member<'_>, wanted: &[usize]) {
        let (d, head) = (self.sizes.d, self.head());
        let mut sum = vec![0.0; d];
        for row in member.share(wanted.len()) {
            // SAFETY: residual and output are only read now; the normed row is this thread's.
            unsafe {
                // The residual stream stays as it is: other pieces may need it.
                sum.copy_from_slice(slice(self.residual, wanted[row], d));
                let out = &*slice(self.out, wanted[row], d);
                self.weights.norm.run(Some(out), &mut sum, slice(self.normed, row, d));
                self.round_row(head, self.normed, row, wanted.len());
            }
        }
        member.wait();
    }

    /// Logits of some classes for so many tokens, after [`Frame::last_norm`].
    ///
    /// # Safety
    /// As [`Frame::logits`]; no other thread may have these classes.
    pub(super) unsafe fn classes(&self, tokens: usize, rows: Range<usize>) {
        // SAFETY: the normed rows are only read now; these rows of the logits are this thread's.
        unsafe {
            let to = Rows { pointer: self.logits.pointer.add(rows.start), ..self.logits };
            self.project(self.head(), self.normed, tokens, rows, to);
        }
    }

    fn head(&self) -> &Matrix {
        self.weights.head.as_ref().unwrap_or(&self.weights.embedding)
    }

    /// The embedding of a token.
    fn embed(&self, id: u32, to: &mut [f32]) {
        let weight = self.weights.embedding.weight();
        // A row of whole blocks into as many values, so this cannot fail.
        let _ = dequantize(weight.encoding(), weight.row(id as usize), to);
    }

    fn writer(&self, matrix: &Matrix) -> &Writer {
        let key = (matrix.encoding, matrix.columns);
        let found = self.inputs.iter().find(|(own, _)| *own == key);
        &found.unwrap_or_else(|| unreachable!("every matrix has its room")).1
    }

    /// Rounds the input of `matrix` for one of `tokens`.
    unsafe fn round_row(&self, matrix: &Matrix, x: Rows, token: usize, tokens: usize) {
        // SAFETY: the caller's: the row is this thread's.
        unsafe { self.writer(matrix).write_row(token, tokens, slice(x, token, matrix.columns)) };
    }

    /// Rounds the inputs of `matrix`, rows of u or y, each thread its share, and meets; nothing for floats.
    ///
    /// # Safety
    /// As [`Frame::stage`].
    pub(super) unsafe fn round(&self, member: &Member<'_>, matrix: &Matrix, tokens: usize) {
        let writer = self.writer(matrix);
        if !writer.rounds() {
            return;
        }
        // SAFETY: the rows were written before the last meeting; the units are this thread's.
        unsafe {
            let rows = std::slice::from_raw_parts(self.x.pointer, tokens * self.x.stride);
            for unit in member.share(writer.units(tokens)) {
                writer.write(unit, tokens, rows, self.x.stride);
            }
        }
        member.wait();
    }

    /// Rows of `matrix` times the inputs, and the bias.
    unsafe fn project(
        &self,
        matrix: &Matrix,
        x: Rows,
        tokens: usize,
        rows: Range<usize>,
        to: Rows,
    ) {
        // SAFETY: inputs were written before the last meeting; these rows of the result are this thread's.
        unsafe {
            let floats = std::slice::from_raw_parts(x.pointer, tokens * x.stride);
            let inputs = self.writer(matrix).activations(tokens, floats, x.stride);
            let out = Output { pointer: to.pointer, stride: to.stride };
            product(&matrix.weight(), &inputs, rows.clone(), out);
            if let Some(bias) = &matrix.bias {
                for token in 0..tokens {
                    for (y, b) in slice(to, token, rows.len()).iter_mut().zip(&bias[rows.clone()]) {
                        *y += b;
                    }
                }
            }
        }
    }
}

/// The first `len` elements of a row.
///
/// # Safety
/// They must be there, and this thread's until the next meeting.
unsafe fn slice<'a>(rows: Rows, row: usize, len: usize) -> &'a mut [f32] {
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts_mut(rows.pointer.add(row * rows.stride), len) }
}

/// This thread's channels: whole tiles.
fn channels(member: &Member<'_>, e: usize) -> Range<usize> {
    let tiles = member.share(e.div_ceil(TILE));
    (tiles.start * TILE).min(e)..(tiles.end * TILE).min(e)
}

/// This thread's rows.
fn share_rows(member: &Member<'_>, rows: usize) -> Range<usize> {
    let groups = member.share(rows.div_ceil(GROUP));
    (groups.start * GROUP).min(rows)..(groups.end * GROUP).min(rows)
}
