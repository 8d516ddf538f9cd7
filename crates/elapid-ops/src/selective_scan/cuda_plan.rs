//! How a scan is divided on a GPU: the shape of a block, and the segments that sequences are cut into.

use std::ops::Range;
use std::sync::Arc;

use elapid_tensor::cuda::{DeviceBuffer, Gpu, Launch, Result, is_batch_invariant};
use elapid_tensor::{Device, Sequences};

use super::{MAX_STATES, OP};
use crate::gpu::{Extents, wrong};

/// Threads of a block.
pub(super) const THREADS: usize = 128;
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
/// The same where each sequence is cut so that it fills the card alone: it may come with others, which then need no cuts.
const WORTH_CUTTING_ALONE: usize = 6;
/// Blocks a multiprocessor, one for each whole sequence and tile of channels, from which on sequences that are cut to be
/// alone what they are in a batch are walked from end to end, in one pass instead of two.
const WORTH_JOINING: f64 = 1.8;

/// How sequences are cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// So that the whole batch fills the card.
    Fill,
    /// Each sequence so that it fills the card alone: then the bits of its results do not depend on what else is in the
    /// batch.
    Alone,
    /// Into segments of so many tokens (rounded up to whole tiles): then the bits of a sequence's results do not
    /// depend on what else is in the batch, nor on the card.
    Every(usize),
    /// Not at all.
    Never,
}

/// The shape of a scan and the segments of its batch, prepared once for forward and backward.
#[derive(Debug)]
pub struct Plan {
    pub(super) channels: usize,
    pub(super) states: usize,
    pub(super) groups: usize,
    pub(super) shape: Shape,
    pub(super) extents: Extents,
    /// The segments of each sequence.
    pub(super) runs: Vec<Range<usize>>,
    pub(super) segments: DeviceBuffer<[i64; 4]>,
    /// Where each sequence's segments begin, and their number at the end.
    pub(super) run_starts: DeviceBuffer<i32>,
    /// Set if forward walks cut sequences from end to end.
    pub(super) joined: Option<Joined>,
    pub(super) chunks: usize,
    pub(super) count: usize,
}

/// Cut sequences as forward takes them if they are enough to fill the card.
#[derive(Debug)]
pub(super) struct Joined {
    /// Each sequence as a segment.
    pub(super) sequences: DeviceBuffer<[i64; 4]>,
    /// Tiles from cut to cut of each.
    pub(super) pieces: DeviceBuffer<i32>,
}

/// The shape of a block, as the kernels derive it from the number of states and of a lane's channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Channels a lane: 1 or 2.
    pub(super) pair: usize,
    pub(super) channels: usize,
    pub(super) steps: usize,
    pub(super) forward_floats: usize,
    pub(super) backward_floats: usize,
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

    /// For `cut` and the sequences of a batch, `alone` if each is cut by itself. Two channels a lane give the bits of one.
    fn of(
        gpu: &Gpu,
        (channels, groups, states): (usize, usize, usize),
        sequences: &Sequences,
        cut: Cut,
        alone: Option<&Alone>,
    ) -> Self {
        let (narrow, wide) = (Self::new(states, 1), Self::new(states, 2));
        let tiles = |shape: &Self| groups * (channels / groups).div_ceil(shape.channels);
        let many = |segments: f64| {
            tiles(&wide) as f64 * segments >= WORTH_PAIRING * gpu.multiprocessors() as f64
        };
        let worth_pairing = states <= PAIRED_STATES
            && match cut {
                Cut::Fill => {
                    let pieces = wide.pieces(gpu, tiles(&wide) * sequences.len());
                    let long = longest(sequences) / pieces.max(1) >= WORTH_PAIRING_SEGMENTS;
                    many(sequences.len() as f64) || (pieces >= WORTH_CUTTING && long)
                }
                Cut::Alone | Cut::Every(_) | Cut::Never => alone.is_some_and(|alone| {
                    many(if alone.joined { alone.alike } else { alone.segments as f64 })
                }),
            };
        if worth_pairing { wide } else { narrow }
    }

    /// Into how many pieces each of so many blocks' work must be cut to fill the card.
    fn pieces(&self, gpu: &Gpu, blocks: usize) -> usize {
        BLOCKS[self.pair - 1] * gpu.multiprocessors() / blocks.max(1)
    }

    /// Tokens of a segment with which so many blocks, the longest of so many tokens, fill the card; all if it holds less than
    /// `worth` times as many.
    fn segment(&self, gpu: &Gpu, blocks: usize, longest: usize, worth: usize) -> usize {
        let pieces = self.pieces(gpu, blocks);
        if pieces < worth {
            return usize::MAX;
        }
        longest.div_ceil(pieces).next_multiple_of(self.steps).max(4 * self.steps)
    }

    /// Tokens of a segment of a sequence that is cut by itself.
    fn alone(&self, gpu: &Gpu, tiles: usize, len: usize) -> usize {
        self.segment(gpu, tiles, len, WORTH_CUTTING_ALONE)
    }
}

/// How sequences are divided that are cut each by itself.
struct Alone {
    segments: usize,
    /// How many sequences as long as the longest would have as many tokens: shorter ones leave the card to it.
    alike: f64,
    /// Whether whole sequences are enough to fill the card.
    joined: bool,
}

impl Alone {
    fn of(gpu: &Gpu, shape: &Shape, tiles: usize, sequences: &Sequences) -> Self {
        let pieces = |len: usize| len.div_ceil(shape.alone(gpu, tiles, len)).max(1);
        let segments = sequences.iter().map(|s| pieces(s.len)).sum();
        let alike = sequences.tokens() as f64 / longest(sequences).max(1) as f64;
        let fills = tiles as f64 * alike >= WORTH_JOINING * gpu.multiprocessors() as f64;
        Self { segments, alike, joined: fills && segments > sequences.len() }
    }
}

fn longest(sequences: &Sequences) -> usize {
    sequences.iter().map(|s| s.len).max().unwrap_or(0)
}

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
        let tiles_of = |shape: &Shape| groups * (channels / groups).div_ceil(shape.channels);
        // What a sequence is cut into alone must not depend on the batch, as the lanes may.
        let narrow = Shape::new(states, 1);
        let narrow_tiles = tiles_of(&narrow);
        let alone = (cut == Cut::Alone).then(|| Alone::of(gpu, &narrow, narrow_tiles, sequences));
        let shape = Shape::of(gpu, (channels, groups, states), sequences, cut, alone.as_ref());
        let tiles = tiles_of(&shape);
        let size = match cut {
            Cut::Never => usize::MAX,
            Cut::Every(tokens) => tokens.max(1).next_multiple_of(shape.steps),
            Cut::Fill => {
                let blocks = tiles * sequences.len();
                shape.segment(gpu, blocks, longest(sequences), WORTH_CUTTING)
            }
            Cut::Alone => 0,
        };
        let (mut rows, mut starts, mut runs) = (Vec::new(), vec![0], Vec::new());
        let (mut whole, mut tiles_of_pieces) = (Vec::new(), Vec::new());
        let mut chunks = 0;
        for s in sequences {
            let first = rows.len();
            let row = |begin: usize, length: usize, ends: i64| {
                let flags = ends | i64::from(s.continued) << 2;
                [
                    (s.start + begin) as i64,
                    length as i64,
                    (chunks + begin / shape.steps) as i64,
                    s.slot as i64 | flags << 32,
                ]
            };
            let size = match cut {
                Cut::Alone => narrow.alone(gpu, narrow_tiles, s.len),
                _ => size,
            };
            let pieces = s.len.div_ceil(size).max(1);
            for piece in 0..pieces {
                let begin = piece * size.min(s.len);
                let length = size.min(s.len - begin);
                let ends = i64::from(piece == 0) | i64::from(piece + 1 == pieces) << 1;
                rows.push(row(begin, length, ends));
            }
            whole.push(row(0, s.len, 3));
            tiles_of_pieces.push(i32::try_from(size / shape.steps).unwrap_or(i32::MAX));
            chunks += s.len.div_ceil(shape.steps);
            runs.push(first..rows.len());
            starts.push(rows.len() as i32);
        }
        let joined = alone.is_some_and(|alone| alone.joined).then(|| -> Result<Joined> {
            let (sequences, pieces) = (gpu.upload(&whole)?, gpu.upload(&tiles_of_pieces)?);
            Ok(Joined { sequences, pieces })
        });
        Ok(Self {
            joined: joined.transpose()?,
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

    /// [`Plan::new`] on the first call, later what that call made. Sequences are cut to fill the card, within
    /// [`elapid_tensor::cuda::batch_invariant`] each by itself.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn of(
        gpu: &Gpu,
        sequences: &Sequences,
        (channels, groups, states): (usize, usize, usize),
    ) -> elapid_tensor::Result<Arc<Self>> {
        let cut = if is_batch_invariant() { Cut::Alone } else { Cut::Fill };
        let key = (Device::Cuda(gpu.id()), [channels, groups, states, (cut == Cut::Alone).into()]);
        let sizes = (channels, groups, states);
        sequences.kept(key, || Ok(Self::new(gpu, sequences, sizes, cut)?))
    }

    pub(super) fn matrix(&self) -> usize {
        self.channels * self.states
    }

    pub(super) fn state_len(&self) -> usize {
        self.extents.slots * self.matrix()
    }

    /// Tiles of channels in a group.
    pub(super) fn tiles(&self) -> usize {
        (self.channels / self.groups).div_ceil(self.shape.channels)
    }

    pub(super) fn is_cut(&self) -> bool {
        self.runs.iter().any(|run| run.len() > 1)
    }

    /// One block a segment and tile.
    pub(super) fn launch(&self, floats: usize) -> Launch {
        self.blocks(self.count, floats)
    }

    /// One block a sequence and tile.
    pub(super) fn launch_joined(&self, floats: usize) -> Launch {
        self.blocks(self.runs.len(), floats)
    }

    fn blocks(&self, segments: usize, floats: usize) -> Launch {
        let blocks = segments * self.groups * self.tiles();
        Launch { shared: (4 * floats) as u32, ..Launch::linear(blocks as u32, THREADS as u32) }
    }

    /// One thread for each of `count` results, in blocks of 256.
    pub(super) fn threads(count: usize) -> Launch {
        Launch::linear(count.div_ceil(256) as u32, 256)
    }
}
