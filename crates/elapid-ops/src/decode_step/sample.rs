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

/// Tokens that can take part at most: a penalty marks those that were seen in the memory of a block.
pub const MOST_CLASSES: usize = 1 << 18;

/// How a sequence's tokens are chosen: as the sampler on the host means it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable, PartialEq)]
pub struct Choice {
    /// Of the draws: what the seed and the stream make.
    pub key: u64,
    /// 0: the most probable.
    pub temperature: f64,
    /// 1: all.
    pub top_p: f64,
    /// 0: all.
    pub min_p: f64,
    /// 0: all.
    pub top_k: u64,
    /// 1: none.
    pub penalty: f32,
    /// How many of the last tokens the penalty is for: at least 1 if there is one.
    pub window: u32,
}

impl Default for Choice {
    /// The most probable token.
    fn default() -> Self {
        let (key, temperature, top_p, min_p) = (0, 0.0, 1.0, 0.0);
        Self { key, temperature, top_p, min_p, top_k: 0, penalty: 1.0, window: 0 }
    }
}

/// The sequence of a slot: what the kernels keep of it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable, PartialEq, Default)]
pub struct Slot {
    /// Keys its draws.
    pub id: u64,
    /// Tokens that its state has read.
    pub position: u64,
    /// Tokens sampled so far.
    pub produced: u64,
    /// Tokens still wanted. With 0, as at first, its tokens are chosen elsewhere and its logits stay as they are.
    pub left: u64,
    /// Tokens in its history, prompt included.
    pub seen: u64,
    /// How its tokens are chosen.
    pub choice: Choice,
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
    sequences: u64,
    ids: u64,
    history: u64,
    room: i64,
    out: u64,
    ring: i64,
    capacity: i64,
    ends: u64,
    end_count: i64,
}
// SAFETY: the layout of `SampleArguments` in sample.cu.
unsafe impl KernelArguments for SampleArguments {}

/// What sampling is to have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Tokens that take part, from 0 on; at most [`MOST_CLASSES`].
    pub classes: usize,
    /// Sequences.
    pub slots: usize,
    /// The longest window of a repetition penalty; 0 if no sequence has one.
    pub window: usize,
    /// Steps that the reading of tokens may be late, at least 1.
    pub ring: usize,
}

/// What sampling keeps in memory: the sequences of all slots, and where their tokens go.
#[derive(Debug)]
pub struct Sampling {
    gpu: Gpu,
    room: Room,
    sequences: DeviceBuffer<Slot>,
    history: DeviceBuffer<u32>,
    ends: DeviceBuffer<u32>,
    out: SharedBuffer<Sampled>,
}

impl Sampling {
    /// Sampling without sequences; a token of `ends` ends every one.
    ///
    /// # Errors
    /// If there is no memory, or the number of classes or the ring make no sense.
    pub fn new(gpu: &Gpu, room: Room, ends: &[u32]) -> Result<Self> {
        let Room { classes, slots, window, ring } = room;
        if classes == 0 || classes > MOST_CLASSES || ring == 0 {
            return Err(wrong(OP, format!("sampling from {classes} classes, {ring} steps late")));
        }
        Ok(Self {
            gpu: gpu.clone(),
            room,
            sequences: gpu.zeros(slots)?,
            history: gpu.zeros(slots * window)?,
            ends: gpu.upload(ends)?,
            out: gpu.shared(ring * slots)?,
        })
    }

    /// Sets the sequence of a slot, and the last tokens of its history: as many as the penalty is for, or more.
    ///
    /// # Errors
    /// If there is no such slot or no room for the penalty's window, or the driver refuses.
    pub fn set(&mut self, slot: usize, sequence: &Slot, history: &[u32]) -> Result<()> {
        let (window, penalty) = (sequence.choice.window as usize, sequence.choice.penalty);
        let penalised = sequence.left > 0 && penalty != 1.0;
        let fits = !penalised || (1..=self.room.window).contains(&window);
        if slot >= self.room.slots || !fits {
            let room = self.room;
            let message = format!("slot {slot}, a penalty for {window} tokens: room {room:?}");
            return Err(wrong(OP, message));
        }
        self.sequences.write_at(slot, &[*sequence])?;
        if !penalised {
            return Ok(());
        }
        let mut row = vec![0; window];
        let last = history.len().min(window);
        let first = (sequence.seen as usize).saturating_sub(last);
        for (i, &token) in history[history.len() - last..].iter().enumerate() {
            row[(first + i) % window] = token;
        }
        self.history.write_at(slot * self.room.window, &row)
    }

    /// The sequences of all slots as they are after all work before this call.
    ///
    /// # Errors
    /// If the driver refuses, or earlier work failed.
    pub fn read(&self) -> Result<Vec<Slot>> {
        self.sequences.read()
    }

    /// What a slot's sequence got as its token number `index` of those sampled here; its step must have ended, and be
    /// less than the ring's number of steps ago.
    pub fn token(&self, slot: usize, index: u64) -> Sampled {
        self.out.get((index % self.room.ring as u64) as usize * self.room.slots + slot)
    }

    /// Launches the choice of a token for each column with a slot whose sequence wants one, from its logits of the last
    /// step. The token becomes the column's id; a sequence that ends loses its column's slot.
    ///
    /// # Errors
    /// If something has another size, or the driver refuses.
    ///
    /// # Safety
    /// The columns' slots must be below [`Room::slots`], and no two columns may have the same one.
    pub unsafe fn run(
        &self,
        step: &Step,
        ids: &DeviceBuffer<u32>,
        slots: &DeviceBuffer<i32>,
        columns: usize,
    ) -> Result<()> {
        let Room { classes, window, ring, slots: capacity } = self.room;
        let stride = step.classes();
        let room = [ids.len(), slots.len(), step.capacity()];
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
            sequences: self.sequences.address(),
            ids: ids.address(),
            history: self.history.address(),
            room: window as i64,
            out: self.out.address(),
            ring: ring as i64,
            capacity: capacity as i64,
            ends: self.ends.address(),
            end_count: self.ends.len() as i64,
        };
        let threads = classes.div_ceil(32).next_multiple_of(32).clamp(64, 1024);
        let mask = if window == 0 { 0 } else { 4 * classes.div_ceil(32) };
        let kernel = self.gpu.module(&SAMPLE, &[])?.kernel("decode_sample")?;
        let launch = Launch {
            grid: [columns as u32, 1, 1],
            block: [threads as u32, 1, 1],
            shared: mask as u32,
        };
        // SAFETY: a block a column; everything has room for the columns and, by the caller's promise, for their slots; the
        // kernel waits for the one before.
        unsafe { self.gpu.launch_chained(&kernel, launch, &arguments) }
    }
}
