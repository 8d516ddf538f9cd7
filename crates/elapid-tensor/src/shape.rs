//! Shapes and strides of up to six axes, held inline.

use std::fmt;
use std::ops::Deref;

/// The largest number of axes.
pub const MAX_RANK: usize = 6;

/// The extents of a tensor's axes; derefs to a slice.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: usize,
}

impl Shape {
    /// A shape of at most [`MAX_RANK`] axes.
    ///
    /// # Panics
    /// With more axes: a tensor's rank is fixed by the code that makes it, never by outside input.
    pub fn new(dims: &[usize]) -> Self {
        assert!(dims.len() <= MAX_RANK, "a shape has at most {MAX_RANK} axes, got {dims:?}");
        let mut all = [0; MAX_RANK];
        all[..dims.len()].copy_from_slice(dims);
        Self { dims: all, rank: dims.len() }
    }

    /// Number of elements; 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.iter().product()
    }

    /// Strides of a contiguous tensor of this shape, in elements, last axis fastest.
    pub fn contiguous_strides(&self) -> Shape {
        let mut strides = *self;
        let mut step = 1;
        for axis in (0..self.rank).rev() {
            strides.dims[axis] = step;
            step *= self.dims[axis];
        }
        strides
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Self::new(dims)
    }
}

impl<const K: usize> From<[usize; K]> for Shape {
    fn from(dims: [usize; K]) -> Self {
        Self::new(&dims)
    }
}

impl<const K: usize> From<&[usize; K]> for Shape {
    fn from(dims: &[usize; K]) -> Self {
        Self::new(dims)
    }
}
