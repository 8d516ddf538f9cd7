//! Working memory of the scan's kernels: one aligned buffer a thread, kept between calls, and the handle
//! through which parallel work writes disjoint parts of one output.

use std::cell::Cell;

use crate::simd::{LINE, prefetch_to_write};

/// A cache line, so that no vector straddles two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Rounds a number of f32 values up to whole cache lines.
pub(super) const fn padded(values: usize) -> usize {
    values.next_multiple_of(LINE)
}

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// This thread's scratch, taken for a while. A guard and not a function of a closure, because a closure
/// called from elsewhere would be compiled without the kernel's instruction set.
pub(super) struct Scratch(Vec<Line>);

impl Scratch {
    /// Takes the scratch; a second taker on the same thread starts with an empty buffer.
    pub(super) fn take() -> Self {
        Self(SCRATCH.take())
    }

    /// Room for `values` f32 of arbitrary content, to be handed out in parts.
    pub(super) fn parts(&mut self, values: usize) -> Parts<'_> {
        let needed = values.div_ceil(LINE);
        if self.0.len() < needed {
            self.0.resize(needed, Line([0.0; LINE]));
        }
        let start = self.0.as_mut_ptr().cast::<f32>();
        // SAFETY: `Line` is exactly `LINE` f32 without padding, and `needed` of them are initialised.
        Parts(unsafe { std::slice::from_raw_parts_mut(start, needed * LINE) })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.0));
    }
}

/// Hands out consecutive, line-aligned parts of a scratch buffer.
pub(super) struct Parts<'a>(&'a mut [f32]);

impl<'a> Parts<'a> {
    /// The next `values` f32; their padding to whole lines is lost.
    pub(super) fn take(&mut self, values: usize) -> &'a mut [f32] {
        let rest = std::mem::take(&mut self.0);
        let (part, rest) = rest.split_at_mut(padded(values));
        self.0 = rest;
        &mut part[..values]
    }
}

/// An output array that parallel work writes without overlap.
#[derive(Clone, Copy)]
pub(super) struct Shared<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: a `Shared` gives access only through the unsafe `part`, whose callers keep parts apart.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn new(values: &mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len() }
    }

    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// The array must still be alive and mutably borrowed by the creator, and no other part in use may
    /// overlap this one.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

impl Shared<f32> {
    /// Asks for the cache lines of `len` elements from `start` on, which will be written.
    #[inline(always)]
    pub(super) fn prefetch(&self, start: usize, len: usize) {
        prefetch_to_write(self.start.wrapping_add(start).cast_const(), len);
    }
}
