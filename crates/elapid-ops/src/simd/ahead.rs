//! Asking for memory before it is used, where the processor can be asked: rows that lie far apart are foreseen by no
//! processor, and a page that it has not used for a while costs it more than the lines do.

/// f32 values in a cache line.
pub(crate) const LINE: usize = 16;

/// Asks for the cache line at `at` to read it.
#[inline(always)]
pub(crate) fn prefetch_line(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, which changes nothing that the program sees and takes any
        // address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the cache line at `at` to write it.
#[inline(always)]
pub(crate) fn prefetch_line_to_write(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction takes any address and changes nothing that the program sees; 64-bit processors that do not
    // have it do nothing. (The compiler's own form of it is the one for reading on those.)
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// [`prefetch_line`] for all lines of `values` elements.
#[inline(always)]
pub(crate) fn prefetch(from: *const f32, values: usize) {
    for i in (0..values).step_by(LINE) {
        prefetch_line(from.wrapping_add(i));
    }
}

/// [`prefetch_line_to_write`] for all lines of `values` elements.
#[inline(always)]
pub(crate) fn prefetch_to_write(to: *const f32, values: usize) {
    for i in (0..values).step_by(LINE) {
        prefetch_line_to_write(to.wrapping_add(i));
    }
}

/// Asks for the cache lines of `values` elements to come as near as the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_outer(from: *const f32, values: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..values).step_by(LINE) {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: as in `prefetch_line`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(i).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, values);
}
