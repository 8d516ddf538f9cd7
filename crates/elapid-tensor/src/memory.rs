//! Host memory: 64-byte aligned blocks, recycled between uses.
//!
//! A training step asks for the same few sizes again and again. Handing such blocks back to the system
//! and faulting them in anew costs more than the arithmetic done on them, so freed blocks of 32 KiB and
//! more wait in size classes (eight to a power of two, so at most an eighth is wasted). In use and waiting
//! they take at most an eighth more than the program's own peak: without that room, a step whose sizes change
//! as it goes would give blocks back for others and later ask for them again. Memory is zeroed when it comes
//! from the system and is always initialised afterwards, so a recycled block holds stale values, never
//! undefined ones.
//!
//! Large blocks ask for huge pages where the system has them (Linux): kernels that walk rows far apart come to a new page
//! with every row, and finding a page costs more than reading it.

#[cfg(target_os = "linux")]
use std::alloc::alloc;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

use crate::Element;

const ALIGN: usize = 64;
const POOLED_FROM: usize = 32 << 10;
/// A huge page; blocks of this size and more start on one.
const HUGE: usize = 2 << 20;
/// The cache may lift the total above the peak of real use by this fraction of it.
const SLACK: usize = 8;

/// Bytes held by tensors and by the recycling cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes in blocks that are in use now.
    pub in_use: usize,
    /// The largest `in_use` since the start or the last [`reset_peak`].
    pub peak: usize,
    /// Bytes in blocks that wait to be used again.
    pub cached: usize,
}

#[derive(Default)]
struct Pool {
    free: BTreeMap<usize, Vec<NonNull<u8>>>,
    usage: Usage,
    high_water: usize,
}

// SAFETY: the pool owns the memory behind its pointers; nobody else has them.
unsafe impl Send for Pool {}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: BTreeMap::new(),
    usage: Usage { in_use: 0, peak: 0, cached: 0 },
    high_water: 0,
});

fn pool() -> MutexGuard<'static, Pool> {
    // The pool's own code does not panic between its updates, so a poisoned lock still guards sound data.
    POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What is in use, what was the most, and what waits in the cache. Blocks under 32 KiB are not counted.
pub fn usage() -> Usage {
    pool().usage
}

/// Starts the measurement of the peak anew from what is in use now.
pub fn reset_peak() {
    let mut pool = pool();
    pool.usage.peak = pool.usage.in_use;
}

/// Gives every cached block back to the system.
pub fn trim() {
    let mut pool = pool();
    let free = std::mem::take(&mut pool.free);
    pool.usage.cached = 0;
    drop(pool);
    for (capacity, blocks) in free {
        for block in blocks {
            // SAFETY: the block came from `system_block(capacity)` and the pool gave up its only pointer.
            unsafe { dealloc(block.as_ptr(), block_layout(capacity)) };
        }
    }
}

fn size_class(bytes: usize) -> usize {
    if bytes < POOLED_FROM {
        return bytes.max(1).next_multiple_of(ALIGN);
    }
    let step = (bytes.next_power_of_two() / 16).max(4096);
    bytes.next_multiple_of(step)
}

fn block_layout(capacity: usize) -> Layout {
    // The size is a multiple of 64 made from a real request; only a request near isize::MAX can fail.
    let align = if capacity < HUGE { ALIGN } else { HUGE };
    Layout::from_size_align(capacity, align).expect("a tensor's size fits the address space")
}

fn system_block(capacity: usize) -> NonNull<u8> {
    let layout = block_layout(capacity);
    #[cfg(target_os = "linux")]
    if capacity >= HUGE {
        // SAFETY: the layout's size is not zero, and the block is written as long as it is.
        let block = unsafe {
            let block = NonNull::new(alloc(layout)).unwrap_or_else(|| handle_alloc_error(layout));
            ask_for_huge_pages(block, capacity);
            block.write_bytes(0, capacity);
            block
        };
        return block;
    }
    // SAFETY: the layout's size is at least 64.
    let pointer = unsafe { alloc_zeroed(layout) };
    NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout))
}

/// Asks for huge pages behind the whole ones of a block, so that it takes no more memory than it is long. A system
/// without them refuses, which changes nothing.
///
/// # Safety
/// The block must be `capacity` bytes long and the caller's.
#[cfg(target_os = "linux")]
unsafe fn ask_for_huge_pages(block: NonNull<u8>, capacity: usize) {
    // SAFETY: the advice changes how memory is backed, never what it holds.
    unsafe {
        libc::madvise(block.as_ptr().cast(), capacity / HUGE * HUGE, libc::MADV_HUGEPAGE);
    }
}

/// An aligned, initialised block of bytes that returns to the pool when dropped.
#[derive(Debug)]
pub(crate) struct Block {
    pointer: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a block owns its memory, and shared access is read-only.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// At least `bytes` bytes; zeros if `zeroed`, else whatever the block last held.
    pub(crate) fn new(bytes: usize, zeroed: bool) -> Self {
        let capacity = size_class(bytes);
        if capacity < POOLED_FROM {
            return Self { pointer: system_block(capacity), capacity };
        }
        let recycled = {
            let mut pool = pool();
            let recycled = pool.free.get_mut(&capacity).and_then(Vec::pop);
            if recycled.is_some() {
                pool.usage.cached -= capacity;
            }
            pool.usage.in_use += capacity;
            pool.usage.peak = pool.usage.peak.max(pool.usage.in_use);
            pool.high_water = pool.high_water.max(pool.usage.in_use);
            if recycled.is_none() {
                pool.make_room(capacity);
            }
            recycled
        };
        match recycled {
            Some(pointer) => {
                if zeroed {
                    // SAFETY: the block is `capacity >= bytes` long and nobody else has it.
                    unsafe { pointer.as_ptr().write_bytes(0, bytes) };
                }
                Self { pointer, capacity }
            }
            None => Self { pointer: system_block(capacity), capacity },
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `capacity` initialised bytes are ours for the lifetime of `self`.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.capacity) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.capacity) }
    }
}

impl Pool {
    /// Frees cached blocks so that a new block does not lift the total too far above the peak of real use.
    fn make_room(&mut self, wanted: usize) {
        let limit = self.high_water + self.high_water / SLACK;
        let mut excess = (self.usage.in_use + self.usage.cached).saturating_sub(limit);
        excess = excess.min(self.usage.cached).min(wanted);
        while excess > 0 {
            let Some((&capacity, _)) =
                self.free.iter().rev().find(|(_, blocks)| !blocks.is_empty())
            else {
                return;
            };
            let Some(block) = self.free.get_mut(&capacity).and_then(Vec::pop) else { return };
            self.usage.cached -= capacity;
            excess = excess.saturating_sub(capacity);
            // SAFETY: the block came from `system_block(capacity)` and this was its only pointer.
            unsafe { dealloc(block.as_ptr(), block_layout(capacity)) };
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.capacity < POOLED_FROM {
            // SAFETY: allocated with this very layout.
            unsafe { dealloc(self.pointer.as_ptr(), block_layout(self.capacity)) };
            return;
        }
        let mut pool = pool();
        pool.usage.in_use -= self.capacity;
        pool.usage.cached += self.capacity;
        pool.free.entry(self.capacity).or_default().push(self.pointer);
    }
}

/// An owned, writable run of elements that becomes a tensor without a copy.
#[derive(Debug)]
pub struct Buffer<T: Element> {
    block: Block,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self { block: Block::new(len * size_of::<T>(), true), len, element: PhantomData }
    }

    /// `len` elements of arbitrary value, for callers that overwrite all of them.
    pub fn scratch(len: usize) -> Self {
        Self { block: Block::new(len * size_of::<T>(), false), len, element: PhantomData }
    }

    /// A copy of `values`.
    pub fn copy_of(values: &[T]) -> Self {
        let mut buffer = Self::scratch(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    pub(crate) fn into_block(self) -> Block {
        self.block
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.block.bytes()[..self.len * size_of::<T>()])[..self.len]
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = self.len * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.block.bytes_mut()[..bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recycled_blocks_are_zeroed_on_request() {
        let mut dirty = Buffer::<f32>::scratch(20_000);
        dirty.fill(7.0);
        drop(dirty);
        assert!(Buffer::<f32>::zeros(20_000).iter().all(|&v| v == 0.0));
    }

    #[test]
    fn blocks_are_aligned() {
        for len in [0usize, 1, 3, 1000, 100_000] {
            let buffer = Buffer::<f64>::zeros(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
        }
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in (POOLED_FROM..1 << 22).step_by(997) {
            let class = size_class(bytes);
            assert!(class >= bytes && class - bytes <= (bytes / 8).max(4096), "{bytes} -> {class}");
        }
    }
}
