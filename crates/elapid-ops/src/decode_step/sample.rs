//! The launch of the sampler: what `sample.cu` is given.

use bytemuck::{Pod, Zeroable};
use elapid_tensor::cuda::{
    DeviceBuffer, Gpu, KernelArguments, Launch, Result, SharedBuffer, Source,
};

use super::cuda::RANKING;
use super::{OP, Step};
use crate::gpu::wrong;

static SAMPLE: Source =
    Source { name: "decode_sample", text: include_str!("sample.cu"), headers: &[RANKING] };

/// How tokens are chosen: as the sampler on the host means it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Tokens that take part, from 0 on.
    pub classes: usize,
    /// 0: the most probable.
    pub temperature: f32,
    /// 0: all.
    pub top_k: usize,
    /// 1: all.
    pub top_p: f32,
    /// 0: all.
    pub min_p: f32,
    /// 1: none.
    pub penalty: f32,
    /// How many of the last tokens the penalty is for; none if 0.
    pub window: usize,
    /// Of the draws: what the seed and the stream make.
    pub key: u64,
}

/// A sequence of a column: what the kernels keep of it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable, Default, PartialEq, Eq)]
pub struct Column {
    /// Keys its draws.
    pub id: u64,
    /// Tokens that its state has read.
    pub position: u64,
    /// Tokens sampled so far.
    pub produced: u64,
    /// Tokens still wanted, at least 1.
    pub left: u64,
    /// Tokens in its history, prompt included.
    pub seen: u64,
}

/// A token that was sampled.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Sampled {
    /// The token; or, if `broken`, the first whose logit cannot be sampled from.
    pub token: u32,
    /// 1 if a logit is NaN or plus infinity, or none is above minus infinity.
    pub broken: u32,
    /// The token's logit.
    pub value: f32,
    /// 1 if the sequence has ended with it.
    pub ended: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleArguments {
    logits: u64,
    best: u64,
    best_stride: i64,
    stride: i64,
    classes: i64,
    slots: u64,
    columns: u64,
    ids: u64,
    history: u64,
    window: i64,
    out: u64,
    ring: i64,
    capacity: i64,
    ends: u64,
    end_count: i64,
    key: u64,
    temperature: f64,
    top_k: i64,
    top_p: f64,
    min_p: f64,
    penalty: f32,
}
// SAFETY: the layout of `SampleArguments` in sample.cu.
unsafe impl KernelArguments for SampleArguments {}

/// What sampling keeps in memory: the sequences of all columns, and where their tokens go.
#[derive(Debug)]
pub struct Sampling {
    gpu: Gpu,
    choice: Choice,
    capacity: usize,
    ring: usize,
    columns: DeviceBuffer<Column>,
    history: DeviceBuffer<u32>,
    ends: DeviceBuffer<u32>,
    out: SharedBuffer<Sampled>,
}

impl Sampling {
    /// For up to `capacity` columns, tokens of which are read at most `ring` steps late; a token of `ends` ends a sequence.
    ///
    /// # Errors
    /// If there is no memory, or a choice makes no sense.
    pub fn new(
        gpu: &Gpu,
        choice: &Choice,
        capacity: usize,
        ring: usize,
        ends: &[u32],
    ) -> Result<Self> {
        if choice.classes == 0 || choice.classes > 1 << 18 || ring == 0 {
            return Err(wrong(OP, format!("sampling from {} classes", choice.classes)));
        }
        Ok(Self {
            gpu: gpu.clone(),
            choice: *choice,
            capacity,
            ring,
            columns: gpu.zeros(capacity)?,
            history: gpu.zeros(capacity * choice.window)?,
            ends: gpu.upload(ends)?,
            out: gpu.shared(ring * capacity)?,
        })
    }

    /// Sets all columns, and the last tokens of each one's history.
    ///
    /// # Errors
    /// If there are more columns than room for them, or the driver refuses.
    pub fn write(&mut self, columns: &[Column], histories: &[&[u32]]) -> Result<()> {
        if columns.len() != self.capacity || histories.len() != self.capacity {
            let (found, room) = (columns.len(), self.capacity);
            return Err(wrong(OP, format!("{found} columns, expected {room}")));
        }
        self.columns.write(columns)?;
        let window = self.choice.window;
        let mut rows = vec![0; self.capacity * window];
        if window > 0 {
            for (row, history) in rows.chunks_mut(window).zip(histories) {
                let first = history.len().saturating_sub(window);
                for (i, &token) in history.iter().enumerate().skip(first) {
                    row[i % window] = token;
                }
            }
        }
        self.history.write(&rows)
    }

    /// The columns as they are after all work before this call.
    ///
    /// # Errors
    /// If the driver refuses, or earlier work failed.
    pub fn read(&self) -> Result<Vec<Column>> {
        self.columns.read()
    }

    /// What a column's sequence got as its token number `index` of those sampled here; its step must have ended, and be
    /// less than `ring` steps ago.
    pub fn token(&self, column: usize, index: u64) -> Sampled {
        self.out.get((index % self.ring as u64) as usize * self.capacity + column)
    }

    /// Launches the choice of a token for each column with a slot, from its logits of the last step. The token becomes the
    /// column's id; a sequence that ends loses its slot.
    ///
    /// # Errors
    /// If something has another size, or the driver refuses.
    pub fn run(
        &self,
        step: &Step,
        ids: &DeviceBuffer<u32>,
        slots: &DeviceBuffer<i32>,
        columns: usize,
    ) -> Result<()> {
        let Choice { classes, window, .. } = self.choice;
        let stride = step.classes();
        let room = [self.capacity, ids.len(), slots.len(), step.capacity()];
        if room.iter().any(|&room| room < columns) || stride < classes {
            let message =
                format!("{columns} columns of {stride} logits for {classes}: room {room:?}");
            return Err(wrong(OP, message));
        }
        let arguments = SampleArguments {
            logits: step.logits().address(),
            best: step.best().address(),
            best_stride: stride.div_ceil(16) as i64,
            stride: stride as i64,
            classes: classes as i64,
            slots: slots.address(),
            columns: self.columns.address(),
            ids: ids.address(),
            history: self.history.address(),
            window: window as i64,
            out: self.out.address(),
            ring: self.ring as i64,
            capacity: self.capacity as i64,
            ends: self.ends.address(),
            end_count: self.ends.len() as i64,
            key: self.choice.key,
            temperature: f64::from(self.choice.temperature),
            top_k: self.choice.top_k as i64,
            top_p: f64::from(self.choice.top_p),
            min_p: f64::from(self.choice.min_p),
            penalty: self.choice.penalty,
        };
        let threads = classes.div_ceil(32).next_multiple_of(32).clamp(64, 1024);
        let mask = if self.choice.penalty == 1.0 { 0 } else { 4 * classes.div_ceil(32) };
        let kernel = self.gpu.module(&SAMPLE, &[])?.kernel("decode_sample")?;
        let launch = Launch {
            grid: [columns as u32, 1, 1],
            block: [threads as u32, 1, 1],
            shared: mask as u32,
        };
        // SAFETY: a block a column; everything has room for the columns, and the kernel waits for the one before.
        unsafe { self.gpu.launch_chained(&kernel, launch, &arguments) }
    }
}
