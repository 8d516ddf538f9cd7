//! Launches that are recorded once and carried out again as a whole.
//!
//! Small models are bound by launches: a step of two layers of width 64 has some two hundred, each of which takes the
//! host longer than the card. A recorded step is one call. Everything it touches has a fixed address: memory that the
//! recorded work takes and gives back stays in a pool of the graph's own for as long as the graph lives, and what changes
//! from step to step (token ids, targets, the optimizer's numbers) is written to buffers that were there before.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLockReadGuard};
use std::thread::ThreadId;
use std::time::Duration;

use super::card::CardGraph;
use super::error::{GpuError, Result};
use super::gpu::{Driver, Gpu};

type Work = Box<dyn Fn() + Send + Sync>;

/// That a thread is recording.
pub(super) struct Recording {
    thread: ThreadId,
    pool: u64,
    work: Arc<Mutex<Vec<Work>>>,
}

/// A thread's turn to use a GPU: no other thread is recording.
pub(super) struct Turn<'a>(RwLockReadGuard<'a, Option<Recording>>);

impl Turn<'_> {
    /// Carries out the emulation's work, or writes it down.
    pub(super) fn host(&self, work: impl Fn() + Send + Sync + 'static) {
        match &*self.0 {
            None => work(),
            Some(recording) => {
                let mut list = recording.work.lock().unwrap_or_else(PoisonError::into_inner);
                list.push(Box::new(work));
            }
        }
    }

    /// Refuses what cannot be recorded: the host would be waited for, or its memory read long after.
    pub(super) fn outside(&self, call: &'static str, gpu: &Gpu) -> Result<()> {
        match &*self.0 {
            None => Ok(()),
            Some(_) => Err(GpuError::Call {
                device: gpu.to_string(),
                call,
                message: "this cannot be part of a recorded graph".into(),
            }),
        }
    }
}

/// Recorded launches, copies and products of a GPU.
pub struct Graph {
    gpu: Gpu,
    pool: u64,
    code: Option<Code>,
}

enum Code {
    Card(CardGraph),
    Host(Arc<Mutex<Vec<Work>>>),
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({})", self.gpu)
    }
}

/// Ends a recording also when what is recorded panics.
struct End<'a> {
    gpu: &'a Gpu,
    ended: bool,
}

impl End<'_> {
    /// None if it has ended: what is recorded now is another thread's.
    fn finish(&mut self) -> Option<Result<Code>> {
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        let mut recording = self.gpu.recording().write().unwrap_or_else(PoisonError::into_inner);
        let ended = recording.take()?;
        Some(match self.gpu.driver() {
            Driver::Card(card) => card.end_recording().map(Code::Card),
            Driver::Host => Ok(Code::Host(ended.work)),
        })
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        // After a panic, what was recorded is given up.
        let _ = self.finish();
    }
}

impl Gpu {
    /// Waits while another thread is recording.
    pub(super) fn turn(&self) -> Turn<'_> {
        let own = std::thread::current().id();
        loop {
            let guard = self.recording().read().unwrap_or_else(PoisonError::into_inner);
            if guard.as_ref().is_none_or(|recording| recording.thread == own) {
                return Turn(guard);
            }
            drop(guard);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The pool that this thread's allocations belong to.
    pub(super) fn recording_pool(&self) -> u64 {
        self.turn().0.as_ref().map_or(0, |recording| recording.pool)
    }

    /// Writes down what `f` launches instead of carrying it out. Tensors that come out of `f` have no values before the
    /// graph is launched. Kernels and products must have run once before, so that none is compiled or chosen here.
    ///
    /// # Errors
    /// Those of `f`, among them host copies and waiting, which cannot be recorded; and if this GPU is recording
    /// already, or the driver refuses.
    pub fn record<R, E: From<GpuError>>(
        &self,
        f: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<(R, Graph), E> {
        static POOLS: AtomicU64 = AtomicU64::new(1);
        let pool = POOLS.fetch_add(1, Ordering::Relaxed);
        loop {
            self.turn().outside("cuStreamBeginCapture", self)?;
            let mut recording = self.recording().write().unwrap_or_else(PoisonError::into_inner);
            // Another thread may have begun since.
            if recording.is_some() {
                continue;
            }
            if let Driver::Card(card) = self.driver() {
                card.begin_recording()?;
            }
            let thread = std::thread::current().id();
            *recording = Some(Recording { thread, pool, work: Arc::default() });
            break;
        }
        let mut end = End { gpu: self, ended: false };
        let mut graph = Graph { gpu: self.clone(), pool, code: None };
        let result = f();
        let code = end.finish();
        let result = result?;
        graph.code = code.transpose()?;
        Ok((result, graph))
    }
}

impl Graph {
    /// Carries out what was recorded, after all earlier work. It runs on while this call returns.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Safety
    /// Memory that the recorded work uses and that was there before it must still be where it was, and nobody may
    /// hold on to what the work overwrites.
    pub unsafe fn launch(&self) -> Result<()> {
        let turn = self.gpu.turn();
        turn.outside("cuGraphLaunch", &self.gpu)?;
        match (&self.code, self.gpu.driver()) {
            (Some(Code::Card(graph)), Driver::Card(card)) => card.launch_graph(graph),
            (Some(Code::Host(work)), _) => {
                let work = work.lock().unwrap_or_else(PoisonError::into_inner);
                work.iter().for_each(|work| work());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.code = None;
        self.gpu.dissolve_pool(self.pool);
    }
}
