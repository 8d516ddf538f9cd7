//! Work whose results for a sequence must not depend on what else is computed with it.
//!
//! The fastest way to do some rows of a product, or to divide a scan, depends on how much there is, and with it the
//! order of sums. Within [`batch_invariant`] the order follows from each row or sequence alone.

use std::cell::Cell;

thread_local! {
    static INVARIANT: Cell<bool> = const { Cell::new(false) };
}

struct Restore(bool);

impl Drop for Restore {
    fn drop(&mut self) {
        INVARIANT.set(self.0);
    }
}

/// Runs `f` so that what it computes on a GPU has the same bits for a sequence alone and among others. On this thread
/// only; of no effect on the CPU, where it always is so.
pub fn batch_invariant<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore(INVARIANT.replace(true));
    f()
}

/// True within [`batch_invariant`].
pub fn is_batch_invariant() -> bool {
    INVARIANT.get()
}
