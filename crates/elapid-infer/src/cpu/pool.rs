//! Threads that carry out one job together and meet at barriers, without queues or stealing.
//!
//! A decode step has some hundred barriers of a few microseconds' work between them, so threads wait by spinning. A
//! thread that waits long gives its processor away (another program, or more threads than processors, may need
//! it), and one that has had no job for a while sleeps. The threads are pinned to processors of their own where the
//! system allows. The caller's thread, which must not be, takes no part and sleeps meanwhile: beside a worker on one
//! processor it would have the job take as long as one thread does.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Turns of waiting before a thread lets others run: some tens of microseconds.
const SPINS: usize = 1000;
/// A thread without a job sleeps after so long.
const IDLE: Duration = Duration::from_millis(2);

/// A thread's part in a job.
pub(super) struct Member<'a> {
    /// From 0 on.
    pub index: usize,
    /// How many there are.
    pub threads: usize,
    barrier: &'a Barrier,
}

impl Member<'_> {
    /// Waits until every thread of the job is here; what they wrote before is seen after.
    pub(super) fn wait(&self) {
        self.barrier.wait(self.threads);
    }

    /// This thread's share of `count` units.
    pub(super) fn share(&self, count: usize) -> std::ops::Range<usize> {
        count * self.index / self.threads..count * (self.index + 1) / self.threads
    }
}

/// Runs a part that no other thread takes.
pub(super) fn alone<R>(part: impl FnOnce(&Member<'_>) -> R) -> R {
    part(&Member { index: 0, threads: 1, barrier: &Barrier::default() })
}

#[derive(Default)]
struct Barrier {
    arrived: AtomicUsize,
    turn: AtomicUsize,
    /// A thread of the job has panicked and will not come.
    broken: AtomicBool,
}

impl Barrier {
    fn wait(&self, threads: usize) {
        let turn = self.turn.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == threads {
            self.arrived.store(0, Ordering::Relaxed);
            self.turn.store(turn.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut turns = 0;
        while self.turn.load(Ordering::Acquire) == turn {
            assert!(!self.broken.load(Ordering::Relaxed), "another thread of the job panicked");
            pause(&mut turns);
        }
    }
}

/// One turn of waiting.
fn pause(turns: &mut usize) {
    *turns += 1;
    if *turns < SPINS { spin_loop() } else { thread::yield_now() }
}

type Job<'a> = dyn Fn(&Member<'_>) + Sync + 'a;

struct Shared {
    /// Counts jobs.
    epoch: AtomicUsize,
    /// The job of the epoch, valid until every worker has finished it.
    job: UnsafeCell<Option<*const Job<'static>>>,
    /// Workers that have finished it.
    finished: AtomicUsize,
    stop: AtomicBool,
    barrier: Barrier,
    sleepers: Mutex<usize>,
    wake: Condvar,
    /// True once all have finished the job; the caller sleeps until then.
    done: Mutex<bool>,
    all_done: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the caller between jobs, while no worker looks at it, and read after `epoch` changed.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in it is used only while the job it points to is alive.
unsafe impl Send for Shared {}

/// The threads.
pub(super) struct Pool {
    threads: usize,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// `threads` workers; a single one is the calling thread itself.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            finished: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            barrier: Barrier::default(),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
            done: Mutex::new(false),
            all_done: Condvar::new(),
            panic: Mutex::new(None),
        });
        let mut pool = Self { threads, shared, workers: Vec::new() };
        if threads == 1 {
            return Ok(pool);
        }
        // More threads than processors are left to the system.
        let places = core_affinity::get_core_ids().filter(|places| places.len() >= threads);
        for index in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let place = places.as_ref().map(|places| places[index]);
            let worker =
                thread::Builder::new().name(format!("decode-{index}")).spawn(move || {
                    if let Some(place) = place {
                        core_affinity::set_for_current(place);
                    }
                    work(&shared, index, threads);
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// How many threads take part.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `job` on every thread and returns when all are done. A panic of one is the caller's.
    pub(super) fn run(&mut self, job: &Job<'_>) {
        let shared = &*self.shared;
        if self.threads == 1 {
            return job(&Member { index: 0, threads: 1, barrier: &shared.barrier });
        }
        // SAFETY: only the lifetime changes; the job outlives this call, which ends after the last use.
        let erased: &'static Job<'static> = unsafe { std::mem::transmute(job) };
        // SAFETY: `self` is borrowed alone, and all workers have finished the job before.
        unsafe { *shared.job.get() = Some(erased) };
        shared.finished.store(0, Ordering::Relaxed);
        *lock(&shared.done) = false;
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if *lock(&shared.sleepers) > 0 {
            shared.wake.notify_all();
        }
        let mut done = lock(&shared.done);
        while !*done {
            done = shared.all_done.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
        drop(done);
        if let Some(panic) = lock(&shared.panic).take() {
            shared.barrier.arrived.store(0, Ordering::Relaxed);
            shared.barrier.broken.store(false, Ordering::Relaxed);
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _sleepers = lock(&self.shared.sleepers);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(shared: &Shared, index: usize, threads: usize) {
    let mut seen = 0;
    loop {
        if !await_job(shared, seen) {
            return;
        }
        seen = shared.epoch.load(Ordering::Acquire);
        // SAFETY: the caller of the job waits until this worker has finished it.
        let job = unsafe { (*shared.job.get()).map(|job| &*job) };
        let member = Member { index, threads, barrier: &shared.barrier };
        let outcome = job.map(|job| catch_unwind(AssertUnwindSafe(|| job(&member))));
        if let Some(Err(panic)) = outcome {
            // The first cause is kept, not the complaint of a thread that waited for it; the others end too.
            lock(&shared.panic).get_or_insert(panic);
            shared.barrier.broken.store(true, Ordering::Relaxed);
        }
        if shared.finished.fetch_add(1, Ordering::AcqRel) + 1 == threads {
            *lock(&shared.done) = true;
            shared.all_done.notify_one();
        }
    }
}

/// Waits for the job after epoch `seen`; false at the end.
fn await_job(shared: &Shared, seen: usize) -> bool {
    let there = || shared.epoch.load(Ordering::SeqCst) != seen;
    let stop = || shared.stop.load(Ordering::SeqCst);
    let mut turns = 0;
    let mut since = None;
    while !there() && !stop() {
        pause(&mut turns);
        if turns < SPINS {
            continue;
        }
        if since.get_or_insert_with(Instant::now).elapsed() < IDLE {
            continue;
        }
        let mut sleepers = lock(&shared.sleepers);
        *sleepers += 1;
        while !there() && !stop() {
            sleepers = shared.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
    }
    !stop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_passes_every_barrier() {
        for threads in [1, 2, 3, 9] {
            let mut pool = Pool::new(threads).unwrap();
            for round in 0..20 {
                let count = AtomicUsize::new(0);
                pool.run(&|member| {
                    for turn in 1..=50 {
                        count.fetch_add(1, Ordering::Relaxed);
                        member.wait();
                        assert_eq!(count.load(Ordering::Relaxed), turn * threads);
                        member.wait();
                    }
                });
                assert_eq!(count.into_inner(), 50 * threads);
                if round == 10 {
                    // Long enough for the workers to fall asleep.
                    thread::sleep(2 * IDLE);
                }
            }
        }
    }

    #[test]
    fn shares_cover_everything_once() {
        let mut pool = Pool::new(3).unwrap();
        let done: Vec<AtomicUsize> = (0..10).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|member| {
            for unit in member.share(10) {
                done[unit].fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(3).unwrap();
        for culprit in 0..3 {
            let run = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|member| {
                    assert!(member.index != culprit, "the culprit");
                    member.wait();
                });
            }));
            assert!(run.is_err());
            let count = AtomicUsize::new(0);
            pool.run(&|member| {
                member.wait();
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }
}
