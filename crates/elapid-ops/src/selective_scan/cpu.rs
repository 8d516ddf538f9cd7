//! The scan on the CPU: cuts the work into units of (piece of a sequence, channel tile) and runs them.
//!
//! Forward lanes are independent of each other, so its tiles may follow the number of threads. Backward sums over
//! channels (dB, dC) and over sequences (parameters), so its partitions and runs are fixed.

use std::marker::PhantomData;
use std::ops::Range;

use elapid_tensor::{Buffer, RowView};
use rayon::prelude::*;

use super::arguments::{Arguments, Gradients};
use super::backward::{BackwardPiece, BackwardUnit, Target};
use super::chunks::{GradientUnit, combine, segments};
use super::field::{Complex, Field, Real};
use super::forward::{ForwardUnit, Output, Piece};
use super::partial::{Partial, sum_runs};
use super::scratch::Shared;
use super::tile::{CHUNK, Tiles};
use crate::simd::dispatch;

/// Most channels of a forward tile: long runs of each row, and scratch that fits the second-level cache.
const TILE: usize = 256;
/// Fewest channels of a forward tile: a cache line of each row.
const NARROW_TILE: usize = 16;
/// Channels over which one partial sum of dB and dC goes.
const PARTITION: usize = 64;
/// Tokens after which the sums for parameters start a new row.
const RUN: usize = 512;
/// State updates below which handing work to other threads costs more than it saves.
const SERIAL_WORK: usize = 1 << 15;

/// Length of the states at chunk starts that [`forward`] saves for [`backward`]: `[chunks, N, E]`.
pub fn chunk_states_len(x: &Arguments<'_, f32>) -> usize {
    x.sequences.iter().map(|s| s.len.div_ceil(CHUNK)).sum::<usize>() * x.matrix_len()
}

/// The scan: output `[T, E]` to `y`, states after the batch `[slots, E, N]` to `last`, and, if backward will be
/// asked for, the states at chunk starts to `chunk_states`.
///
/// # Panics
/// If an array does not have the length that [`Arguments`] says.
pub fn forward(
    x: &Arguments<'_, f32>,
    y: &mut [f32],
    last: &mut [f32],
    chunk_states: Option<&mut [f32]>,
) {
    if x.complex {
        run_forward::<Complex>(x, y, last, chunk_states);
    } else {
        run_forward::<Real>(x, y, last, chunk_states);
    }
}

/// The gradients of `Σ y dy + Σ last dlast`, from the chunk states of [`forward`].
///
/// # Panics
/// If an array does not have the length that [`Arguments`] says.
pub fn backward(
    x: &Arguments<'_, f32>,
    chunk_states: &[f32],
    dy: RowView<'_, f32>,
    dlast: Option<&[f32]>,
) -> Gradients<Buffer<f32>> {
    if x.complex {
        run_backward::<Complex>(x, chunk_states, dy, dlast)
    } else {
        run_backward::<Real>(x, chunk_states, dy, dlast)
    }
}

/// Whether the work is worth several threads.
fn is_parallel(x: &Arguments<'_, f32>) -> bool {
    x.sequences.tokens() * x.matrix_len() >= SERIAL_WORK
}

/// Runs units `0..count`, on several threads if that pays.
pub(super) fn for_each(parallel: bool, count: usize, unit: impl Fn(usize) + Sync + Send) {
    if parallel {
        // One by one: left to itself, the iterator hands out quarters, and a thread that is held up keeps its own.
        (0..count).into_par_iter().with_max_len(1).for_each(unit);
    } else {
        (0..count).for_each(unit);
    }
}

/// Row `row` of `[rows, E, N]`.
fn row<'a>(x: &Arguments<'_, f32>, values: &'a [f32], row: usize) -> &'a [f32] {
    &values[row * x.matrix_len()..(row + 1) * x.matrix_len()]
}

/// A segment of a sequence, in tokens of the batch.
struct Segment {
    tokens: Range<usize>,
    slot: usize,
    continued: bool,
    first_chunk: usize,
    first: bool,
    last: bool,
}

/// The segments of all sequences in order; sequences without tokens have none.
fn all_segments(x: &Arguments<'_, f32>) -> Vec<Segment> {
    let mut list = Vec::with_capacity(x.sequences.len());
    let mut chunk = 0;
    for s in x.sequences {
        for tokens in segments(x.channels, s) {
            list.push(Segment {
                slot: s.slot,
                continued: s.continued,
                first_chunk: chunk + tokens.start / CHUNK,
                first: tokens.start == 0,
                last: tokens.end == s.len,
                tokens: s.start + tokens.start..s.start + tokens.end,
            });
        }
        chunk += s.len.div_ceil(CHUNK);
    }
    list
}

fn run_forward<F: Field>(
    x: &Arguments<'_, f32>,
    y: &mut [f32],
    last: &mut [f32],
    chunk_states: Option<&mut [f32]>,
) {
    assert_eq!((y.len(), last.len()), (x.sequences.tokens() * x.channels, x.state_len()));
    assert!(chunk_states.as_ref().is_none_or(|saved| saved.len() == chunk_states_len(x)));
    match x.h0 {
        Some(h0) => last.copy_from_slice(h0),
        None => last.fill(0.0),
    }
    for s in x.sequences.iter().filter(|s| s.len == 0 && !s.continued) {
        last[s.slot * x.matrix_len()..(s.slot + 1) * x.matrix_len()].fill(0.0);
    }

    let list = all_segments(x);
    let parallel = is_parallel(x);
    let tiles = forward_tiles(x, &list);
    let begin = |segment: &Segment| {
        x.h0.filter(|_| segment.first && segment.continued).map(|h0| row(x, h0, segment.slot))
    };
    let mut pieces: Vec<Piece<'_>> = list
        .iter()
        .map(|segment| Piece {
            start: segment.tokens.start,
            len: segment.tokens.len(),
            first_chunk: segment.first_chunk,
            begin: begin(segment),
            end: segment.last.then_some(segment.slot),
        })
        .collect();

    // States between the segments of cut sequences, in row k the state after segment k.
    let cut = list.iter().any(|segment| !segment.last);
    let mut ends = vec![0.0; if cut { list.len() * x.matrix_len() } else { 0 }];
    if cut {
        let mut sums = vec![0.0; list.len() * x.channels];
        let output = Output {
            y: None,
            last: Shared::new(&mut ends),
            chunk_states: None,
            delta_sums: Some(Shared::new(&mut sums)),
        };
        for_each(parallel, list.len() * tiles.len(), |i| {
            let k = i / tiles.len();
            if !list[k].last {
                let piece = Piece { end: Some(k), ..pieces[k] };
                let tile = tiles.get(i % tiles.len());
                dispatch(ForwardUnit::<F> { x, output: &output, piece, tile, field: PhantomData });
            }
        });
        for_each_sequence(&list, |range| {
            let (e, s) = (x.matrix_len(), x.channels);
            let ends = &mut ends[range.start * e..range.end * e];
            combine(x, ends, &sums[range.start * s..range.end * s], false);
        });
        for (k, segment) in list.iter().enumerate().filter(|(_, segment)| !segment.first) {
            debug_assert!(segment.tokens.start > 0);
            pieces[k].begin = Some(row(x, &ends, k - 1));
        }
    }

    let output = Output {
        y: Some(Shared::new(y)),
        last: Shared::new(last),
        chunk_states: chunk_states.map(Shared::new),
        delta_sums: None,
    };
    for_each(parallel, pieces.len() * tiles.len(), |i| {
        let piece = pieces[i / tiles.len()];
        let tile = tiles.get(i % tiles.len());
        dispatch(ForwardUnit::<F> { x, output: &output, piece, tile, field: PhantomData });
    });
}

/// Calls `f` with the range of each cut sequence's segments.
fn for_each_sequence(list: &[Segment], mut f: impl FnMut(Range<usize>)) {
    let mut start = 0;
    for (k, segment) in list.iter().enumerate() {
        if segment.first {
            start = k;
        }
        if segment.last && k > start {
            f(start..k + 1);
        }
    }
}

/// Forward tiles: as wide as they may be while the longest piece does not hold up all other threads. Narrow
/// tiles read memory in short runs far apart, which costs more than an uneven division of the work.
fn forward_tiles(x: &Arguments<'_, f32>, list: &[Segment]) -> Tiles {
    let longest = list.iter().map(|segment| segment.tokens.len()).max().unwrap_or(0);
    let width = if is_parallel(x) && longest > 0 {
        let share = x.sequences.tokens().div_ceil(rayon::current_num_threads());
        (x.channels * share / longest).next_multiple_of(NARROW_TILE)
    } else {
        TILE
    };
    Tiles::new(x.channels, x.groups(), width.clamp(NARROW_TILE, TILE))
}

/// Runs of pieces: consecutive ones until they have [`RUN`] tokens.
fn runs(pieces: &[BackwardPiece<'_>]) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (i, piece) in pieces.iter().enumerate() {
        tokens += piece.len;
        if tokens >= RUN || i + 1 == pieces.len() {
            runs.push(start..i + 1);
            (start, tokens) = (i + 1, 0);
        }
    }
    runs
}

/// Gradients by the states after all segments but each sequence's last, in row k that after segment k.
fn gradients_between<F: Field>(
    x: &Arguments<'_, f32>,
    dy: RowView<'_, f32>,
    dlast: Option<&[f32]>,
    list: &[Segment],
    tiles: &Tiles,
) -> Vec<f32> {
    // Rows in the order in which the gradient passes the segments: from the last to the first.
    let rows = list.len();
    let mut before = vec![0.0; rows * x.matrix_len()];
    let mut sums = vec![0.0; rows * x.channels];
    let (shared, shared_sums) = (Shared::new(&mut before), Shared::new(&mut sums));
    for_each(is_parallel(x), rows * tiles.len(), |i| {
        let k = i / tiles.len();
        let segment = &list[k];
        if !segment.first {
            dispatch(GradientUnit::<F> {
                x,
                dy,
                tokens: segment.tokens.clone(),
                after: dlast.filter(|_| segment.last).map(|dlast| row(x, dlast, segment.slot)),
                before: &shared,
                delta_sums: &shared_sums,
                row: rows - 1 - k,
                tile: tiles.get(i % tiles.len()),
                field: PhantomData,
            });
        }
    });
    for_each_sequence(list, |range| {
        // Without the first segment: nobody needs the gradient before it here.
        let range = rows - range.end..rows - 1 - range.start;
        let (e, s) = (x.matrix_len(), x.channels);
        let before = &mut before[range.start * e..range.end * e];
        combine(x, before, &sums[range.start * s..range.end * s], true);
    });
    let mut after = Vec::with_capacity(before.len());
    for k in 0..rows {
        // What is before segment k + 1 is after segment k.
        let row_before = if k + 1 < rows { rows - 2 - k } else { 0 };
        after.extend_from_slice(row(x, &before, row_before));
    }
    after
}

fn run_backward<F: Field>(
    x: &Arguments<'_, f32>,
    chunk_states: &[f32],
    dy: RowView<'_, f32>,
    dlast: Option<&[f32]>,
) -> Gradients<Buffer<f32>> {
    assert_eq!(chunk_states.len(), chunk_states_len(x));
    assert!(dlast.is_none_or(|dlast| dlast.len() == x.state_len()));
    let tokens = x.sequences.tokens();
    let (parallel, list) = (is_parallel(x), all_segments(x));
    let tiles = Tiles::new(x.channels, x.groups(), PARTITION);

    let cut = list.iter().any(|segment| !segment.last);
    let between =
        if cut { gradients_between::<F>(x, dy, dlast, &list, &tiles) } else { Vec::new() };
    let pieces: Vec<BackwardPiece<'_>> = list
        .iter()
        .enumerate()
        .map(|(k, segment)| BackwardPiece {
            start: segment.tokens.start,
            len: segment.tokens.len(),
            first_chunk: segment.first_chunk,
            after: if segment.last {
                dlast.map(|dlast| row(x, dlast, segment.slot))
            } else {
                Some(row(x, &between, k))
            },
            before: (segment.first && segment.continued && x.h0.is_some()).then_some(segment.slot),
        })
        .collect();
    let runs = runs(&pieces);

    let mut du = Buffer::scratch(tokens * x.channels);
    let mut ddelta = Buffer::scratch(tokens * x.channels);
    let mut dz = Buffer::scratch(x.z.map_or(0, |_| tokens * x.channels));
    let mut dh0 = Buffer::scratch(x.h0.map_or(0, <[f32]>::len));
    if x.h0.is_some() {
        // Slots that no sequence changes hand their gradient through; fresh sequences stop it.
        match dlast {
            Some(dlast) => dh0.copy_from_slice(dlast),
            None => dh0.fill(0.0),
        }
        for s in x.sequences.iter().filter(|s| !s.continued) {
            dh0[s.slot * x.matrix_len()..(s.slot + 1) * x.matrix_len()].fill(0.0);
        }
    }
    let mut da = vec![0.0; runs.len() * x.matrix_len()];
    let mut dd = vec![0.0; runs.len() * x.channels];
    let mut dbias = vec![0.0; runs.len() * x.channels];
    let mut db = Partial::new(x, &x.b, runs.len(), &tiles);
    let mut dc = Partial::new(x, &x.c, runs.len(), &tiles);
    let target = Target {
        dy,
        chunk_states,
        du: Shared::new(&mut du),
        ddelta: Shared::new(&mut ddelta),
        dz: Shared::new(&mut dz),
        da: Shared::new(&mut da),
        dd: Shared::new(&mut dd),
        dbias: Shared::new(&mut dbias),
        db: db.share(),
        dc: dc.share(),
        before: Shared::new(&mut dh0),
    };
    for_each(parallel, runs.len() * tiles.len(), |i| {
        let run = i / tiles.len();
        dispatch(BackwardUnit::<F> {
            x,
            target: &target,
            pieces: &pieces[runs[run].clone()],
            run,
            tile: tiles.get(i % tiles.len()),
            field: PhantomData,
        });
    });
    Gradients {
        u: du,
        delta: ddelta,
        a: sum_runs(&da, x.matrix_len()),
        b: db.sum(parallel),
        c: dc.sum(parallel),
        d: sum_runs(&dd, x.d.map_or(0, |_| x.channels)),
        z: dz,
        delta_bias: sum_runs(&dbias, x.delta_bias.map_or(0, |_| x.channels)),
        h0: dh0,
    }
}
