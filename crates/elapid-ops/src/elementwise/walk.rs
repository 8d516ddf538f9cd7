//! Broadcasting and strided walks: how an output in order meets inputs that are repeated along some axes or
//! lie with gaps. Neighbouring axes that all tensors step through evenly are merged, so that what remains is
//! a few long runs.

use std::ops::Range;

use elapid_tensor::{Element, MAX_RANK, Shape, Tensor};
use rayon::prelude::*;

/// Elements of one task: enough work to be worth a hand-over to another thread.
const BLOCK: usize = 16 << 10;

/// The common shape of two operands as in numpy: axes are matched from the last one on, and an extent of 1
/// (or a missing axis) is repeated. None if they do not fit.
pub fn broadcast_shape(a: &[usize], b: &[usize]) -> Option<Shape> {
    let rank = a.len().max(b.len());
    let mut shape = [1; MAX_RANK];
    for (axis, extent) in shape[..rank].iter_mut().enumerate() {
        let extent_of = |dims: &[usize]| match (axis + dims.len()).checked_sub(rank) {
            Some(own) => dims[own],
            None => 1,
        };
        *extent = match (extent_of(a), extent_of(b)) {
            (1, n) | (n, 1) => n,
            (n, m) if n == m => n,
            _ => return None,
        };
    }
    Some(Shape::new(&shape[..rank]))
}

/// Strides with which `tensor` is read as if it had `shape`, which it must broadcast to: 0 where repeated.
fn broadcast_strides(tensor: &Tensor, shape: &[usize]) -> [usize; MAX_RANK] {
    let mut strides = [0; MAX_RANK];
    let missing = shape.len() - tensor.rank();
    for (own, &extent) in tensor.shape().iter().enumerate() {
        if extent == shape[missing + own] {
            strides[missing + own] = tensor.strides()[own];
        }
    }
    strides
}

/// A walk over an output in order and `K` inputs read with strides.
pub(super) struct Walk<const K: usize> {
    /// Number of merged axes, at least 1.
    pub(super) rank: usize,
    /// Their extents, the innermost first; 1 behind them.
    pub(super) shape: [usize; MAX_RANK],
    /// Steps of each input along them.
    pub(super) strides: [[usize; MAX_RANK]; K],
}

impl<const K: usize> Walk<K> {
    /// A walk over `shape`, which every input must broadcast to.
    pub(super) fn new(shape: &[usize], inputs: [&Tensor; K]) -> Self {
        let given = inputs.map(|input| broadcast_strides(input, shape));
        let mut walk = Self { rank: 0, shape: [1; MAX_RANK], strides: [[1; MAX_RANK]; K] };
        for axis in (0..shape.len()).rev().filter(|&axis| shape[axis] != 1) {
            // Kept in reverse while merging: entry 0 is the innermost axis.
            let merges = walk.rank > 0
                && (0..K).all(|k| {
                    let last = walk.rank - 1;
                    given[k][axis] == walk.strides[k][last] * walk.shape[last]
                });
            if merges {
                walk.shape[walk.rank - 1] *= shape[axis];
                continue;
            }
            walk.shape[walk.rank] = shape[axis];
            for (strides, given) in walk.strides.iter_mut().zip(&given) {
                strides[walk.rank] = given[axis];
            }
            walk.rank += 1;
        }
        walk.rank = walk.rank.max(1);
        walk
    }

    /// The step of each input along a run.
    pub(super) fn inner_strides(&self) -> [usize; K] {
        std::array::from_fn(|k| self.strides[k][0])
    }

    /// Calls `f(position in range, start of each input, length)` for the runs that make up a range of the
    /// output.
    pub(super) fn runs(&self, range: Range<usize>, mut f: impl FnMut(usize, [usize; K], usize)) {
        let mut at = range.start;
        while at < range.end {
            let inner = at % self.shape[0];
            let len = (self.shape[0] - inner).min(range.end - at);
            let mut rest = at / self.shape[0];
            let mut starts: [usize; K] = std::array::from_fn(|k| inner * self.strides[k][0]);
            for axis in 1..self.rank {
                let index = rest % self.shape[axis];
                rest /= self.shape[axis];
                for (start, strides) in starts.iter_mut().zip(&self.strides) {
                    *start += index * strides[axis];
                }
            }
            f(at - range.start, starts, len);
            at += len;
        }
    }
}

/// Calls `f(first element's number, elements)` for blocks of `out`, on several threads if there are many.
pub(super) fn for_each_block<T: Element>(out: &mut [T], f: impl Fn(usize, &mut [T]) + Sync) {
    if out.len() <= BLOCK {
        f(0, out);
    } else {
        out.par_chunks_mut(BLOCK).enumerate().for_each(|(block, out)| f(block * BLOCK, out));
    }
}
