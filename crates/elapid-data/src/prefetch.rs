//! Prefetch: the next items are made by a thread while the present one is used.
//!
//! Order is kept and nothing is dropped, so prefetching changes no result. What is handed over carries
//! its own position: the thread runs ahead, and a checkpoint must say where the consumer is.

use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::{Batch, Error, Loader, Position, Result};

/// A thread that makes items ahead of their use. Dropping it ends the thread and waits for it.
#[derive(Debug)]
pub struct Prefetch<T> {
    receiver: Option<Receiver<Result<T>>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch<(Batch, Position)> {
    /// Takes batches from a loader, up to `depth` (at least 1) ahead; each comes with the position after
    /// it, from which a resumed run goes on.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn loader(mut loader: Loader, depth: usize) -> Result<Self> {
        Self::spawn(depth, move || {
            let batch = loader.next_batch()?;
            Ok(Some((batch, loader.position().clone())))
        })
    }
}

impl<T: Send + 'static> Prefetch<T> {
    /// Calls `make` up to `depth` (at least 1) items ahead, until it returns `None` or an error.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn spawn(
        depth: usize,
        make: impl FnMut() -> Result<Option<T>> + Send + 'static,
    ) -> Result<Self> {
        // One item more waits in the thread's hands while the channel is full.
        let (sender, receiver) = sync_channel(depth.saturating_sub(1));
        let thread = std::thread::Builder::new()
            .name("prefetch".into())
            .spawn(move || produce(make, &sender))
            .map_err(Error::Thread)?;
        Ok(Self { receiver: Some(receiver), thread: Some(thread) })
    }

    /// The next item, in order; `None` after the end, and after an error.
    ///
    /// # Errors
    /// The error of the call that should have made it; [`Error::Panicked`] if that call panicked.
    pub fn next_item(&mut self) -> Result<Option<T>> {
        match self.receiver.as_ref().map(Receiver::recv) {
            Some(Ok(item)) => item.map(Some),
            Some(Err(_)) | None => Ok(None),
        }
    }
}

impl<T: Send + 'static> Iterator for Prefetch<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        self.next_item().transpose()
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        // Without a receiver the thread's next send fails, so the wait is at most one item long.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends items until the end, an error, a panic, or until nobody receives any more.
fn produce<T>(mut make: impl FnMut() -> Result<Option<T>>, sender: &SyncSender<Result<T>>) {
    loop {
        // What `make` owns is not used again after a panic.
        let item = match panic::catch_unwind(AssertUnwindSafe(&mut make)) {
            Ok(Ok(Some(item))) => Ok(item),
            Ok(Ok(None)) => return,
            Ok(Err(error)) => Err(error),
            Err(payload) => Err(Error::Panicked(message(payload.as_ref()))),
        };
        let last = item.is_err();
        if sender.send(item).is_err() || last {
            return;
        }
    }
}

fn message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn counter(end: usize, made: Arc<AtomicUsize>) -> impl FnMut() -> Result<Option<usize>> + Send {
        move || {
            let next = made.fetch_add(1, Ordering::SeqCst);
            Ok((next < end).then_some(next))
        }
    }

    #[test]
    fn order_is_kept_to_the_end() {
        for depth in [0, 1, 2, 100] {
            let made = Arc::new(AtomicUsize::new(0));
            let mut items = Prefetch::spawn(depth, counter(50, made)).unwrap();
            for expected in 0..50 {
                assert_eq!(items.next_item().unwrap(), Some(expected));
            }
            assert_eq!(items.next_item().unwrap(), None);
            assert_eq!(items.next_item().unwrap(), None);
        }
    }

    #[test]
    fn no_more_than_depth_items_ahead_and_drop_joins() {
        struct Ended(Arc<AtomicUsize>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.store(1, Ordering::SeqCst);
            }
        }
        let (made, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (mut count, guard) = (counter(usize::MAX, made.clone()), Ended(ended.clone()));
        let mut items = Prefetch::spawn(3, move || {
            let _ = &guard;
            count()
        })
        .unwrap();
        assert_eq!(items.next_item().unwrap(), Some(0));
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(made.load(Ordering::SeqCst) <= 4);
        drop(items);
        assert_eq!(ended.load(Ordering::SeqCst), 1, "the thread outlived its handle");
    }

    #[test]
    fn errors_and_panics_arrive_after_what_came_before() {
        let mut left = 2;
        let mut failing = Prefetch::spawn(4, move || {
            left -= 1;
            if left < 0 { Err(Error::BadPosition("x".into())) } else { Ok(Some(left)) }
        })
        .unwrap();
        assert_eq!(failing.next_item().unwrap(), Some(1));
        assert_eq!(failing.next_item().unwrap(), Some(0));
        assert!(matches!(failing.next_item(), Err(Error::BadPosition(_))));
        assert_eq!(failing.next_item().unwrap(), None);

        let mut first = true;
        let mut panicking = Prefetch::spawn(1, move || {
            assert!(std::mem::take(&mut first), "second call");
            Ok(Some(7))
        })
        .unwrap();
        assert_eq!(panicking.next_item().unwrap(), Some(7));
        match panicking.next_item() {
            Err(Error::Panicked(text)) => assert_eq!(text, "second call"),
            other => panic!("{other:?}"),
        }
    }
}
