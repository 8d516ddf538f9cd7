//! Work whose results for a sequence must not depend on what else is computed with it.
//!
//! The fastest way to do some rows of a product, or to divide a scan, depends on how much there is, and with it the
//! order of sums. Within [`batch_invariant`] the order follows from each row or sequence alone.

use std::cell::Cell;

/// Rows of which products within [`batch_invariant`] take the algorithm: a long prompt's. Many more fill the card by any such
/// algorithm, and few are a matter of latency.
const MANY: usize = 2048;
/// The same within [`few_rows`].
const FEW: usize = 64;

thread_local! {
    static ROWS: Cell<Option<usize>> = const { Cell::new(None) };
}

struct Restore(Option<usize>);

impl Restore {
    fn after(rows: Option<usize>) -> Self {
        Self(ROWS.replace(rows))
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        ROWS.set(self.0);
    }
}

/// Runs `f` so that what it computes on a GPU has the same bits for a sequence alone and among others. On this thread
/// only; of no effect on the CPU, where it always is so.
pub fn batch_invariant<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore::after(Some(MANY));
    f()
}

/// Runs `f`, whose products never have more than some dozens of rows: within [`batch_invariant`], so that they are done by
/// what is fast for so few. Elsewhere it changes nothing.
pub fn few_rows<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore::after(invariant_rows().map(|_| FEW));
    f()
}

/// True within [`batch_invariant`].
pub fn is_batch_invariant() -> bool {
    invariant_rows().is_some()
}

/// Within [`batch_invariant`], the number of rows whose algorithm products of any number share.
pub fn invariant_rows() -> Option<usize> {
    ROWS.get()
}
