//! What the machine can do at most, measured in the same run as everything that is compared with it: rates
//! drift with temperature, neighbours and memory layout, so a limit from another day means little.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use serde::Serialize;

use super::loops;
use super::sampling::median;

/// A resource that bounds an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Bytes read from main memory a second.
    MemoryRead,
    /// Floating-point operations a second of fused multiply-adds in registers, f32.
    MatrixF32,
    /// Scan state updates a second in registers.
    StateUpdates,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::MemoryRead, Self::MatrixF32, Self::StateUpdates];

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryRead => "memory read",
            Self::MatrixF32 => "matrix f32",
            Self::StateUpdates => "state updates",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::MemoryRead => "bytes/s",
            Self::MatrixF32 => "FLOP/s",
            Self::StateUpdates => "updates/s",
        }
    }

    /// A rate in billions with the unit that people read.
    pub fn show(self, rate: f64) -> String {
        let unit = match self {
            Self::MemoryRead => "GB/s",
            Self::MatrixF32 => "GFLOP/s",
            Self::StateUpdates => "Gupdate/s",
        };
        format!("{:.2} {unit}", rate / 1e9)
    }

    fn share_means(self) -> &'static str {
        match self {
            Self::MemoryRead => {
                "bytes that must be read or written once, over what reading alone would move in that time"
            }
            Self::MatrixF32 => {
                "multiplications and additions of the products, over those of fused multiply-adds in registers"
            }
            Self::StateUpdates => {
                "state updates (exp2, 2 products, 2 fused multiply-adds), over those of the same arithmetic \
                 with states in registers and all operands in the first-level cache; a backward counts two \
                 an update of the forward: one to compute the state again, one for its gradient"
            }
        }
    }
}

/// Least samples of the memory's rate: on a shared machine it moves by a fifth within a second, so the median of a few
/// neighbouring ones tells of that moment only.
const MEMORY_SAMPLES: usize = 21;

/// Samples of one rate.
#[derive(Debug, Serialize)]
pub struct Rate {
    /// Threads that ran at once.
    pub threads: usize,
    /// Median over all samples, a second.
    pub median: f64,
    /// Before anything else was measured.
    pub before: Vec<f64>,
    /// After everything else.
    pub after: Vec<f64>,
}

/// One limit of the machine.
#[derive(Debug, Serialize)]
pub struct Survey {
    /// Which.
    pub limit: Limit,
    unit: &'static str,
    share_means: &'static str,
    /// With one thread.
    pub one_thread: Rate,
    /// With all threads.
    pub all_threads: Rate,
}

/// Takes samples of the limits.
pub struct Meter {
    threads: usize,
    bytes: usize,
    values: Vec<f32>,
    multiply_rounds: usize,
    update_rounds: usize,
    wide: bool,
}

impl Meter {
    /// A meter that reads `bytes` of memory a sample and computes for about `seconds`.
    pub fn new(threads: usize, bytes: usize, seconds: f64) -> Self {
        const TRIAL: usize = 2000;
        let rounds = |work: &dyn Fn(usize) -> f64| {
            work(TRIAL);
            let took = (0..3).map(|_| time(|| work(TRIAL))).fold(f64::INFINITY, f64::min);
            ((seconds / took.max(1e-9) * TRIAL as f64) as usize).max(1)
        };
        let multiply_rounds = rounds(&loops::multiply_add);
        let update_rounds = rounds(&|n| loops::update_states(n, false));
        let rate = |wide: bool| {
            let took = (0..3).map(|_| time(|| loops::update_states(update_rounds / 4 + 1, wide)));
            let updates = if wide { 2.0 } else { 1.0 };
            updates / took.fold(f64::INFINITY, f64::min)
        };
        let wide = rate(true) > rate(false);
        Self { threads, bytes, values: Vec::new(), multiply_rounds, update_rounds, wide }
    }

    /// Bytes that a sample of the memory's rate reads.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives the memory back that samples of its rate read.
    pub fn release_memory(&mut self) {
        self.values = Vec::new();
    }

    /// One sample with all threads.
    pub fn sample(&mut self, limit: Limit) -> f64 {
        self.sample_with(limit, self.threads)
    }

    fn sample_with(&mut self, limit: Limit, threads: usize) -> f64 {
        let all = |count: f64, seconds: f64| count * threads as f64 / seconds;
        match limit {
            Limit::MemoryRead => {
                if self.values.is_empty() {
                    // Not zero, so that every page is written and has memory of its own behind it.
                    self.values = vec![0.5; self.bytes / size_of::<f32>()];
                }
                let part = (self.values.len() / threads).max(1);
                let parts: Vec<&[f32]> = self.values.chunks_exact(part).take(threads).collect();
                let seconds = together(parts.len(), |i| loops::read(parts[i]));
                (parts.len() * part * size_of::<f32>()) as f64 / seconds
            }
            Limit::MatrixF32 => {
                let rounds = self.multiply_rounds;
                let count = loops::multiply_add(1) * rounds as f64;
                all(
                    count,
                    together(threads, |_| {
                        loops::multiply_add(rounds);
                    }),
                )
            }
            Limit::StateUpdates => {
                let (rounds, wide) = (self.update_rounds, self.wide);
                let count = loops::update_states(1, wide) * rounds as f64;
                all(
                    count,
                    together(threads, |_| {
                        loops::update_states(rounds, wide);
                    }),
                )
            }
        }
    }

    /// Samples of every limit, those of one thread and those of all in turn.
    pub fn survey(&mut self, repeats: usize) -> Vec<Survey> {
        Limit::ALL.into_iter().map(|limit| self.survey_one(limit, repeats)).collect()
    }

    fn survey_one(&mut self, limit: Limit, repeats: usize) -> Survey {
        let threads = self.threads;
        let repeats = match limit {
            Limit::MemoryRead => repeats.max(MEMORY_SAMPLES),
            Limit::MatrixF32 | Limit::StateUpdates => repeats,
        };
        self.sample_with(limit, threads);
        let (mut one, mut all) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            one.push(self.sample_with(limit, 1));
            all.push(self.sample_with(limit, threads));
        }
        let rate = |threads, before: Vec<f64>| Rate {
            threads,
            median: median(&before),
            before,
            after: Vec::new(),
        };
        Survey {
            limit,
            unit: limit.unit(),
            share_means: limit.share_means(),
            one_thread: rate(1, one),
            all_threads: rate(threads, all),
        }
    }

    /// Adds the same number of samples at the end, which tells how much the machine drifted.
    pub fn survey_again(&mut self, surveys: &mut [Survey]) {
        for survey in surveys {
            let again = self.survey_one(survey.limit, survey.all_threads.before.len());
            for (rate, more) in [
                (&mut survey.one_thread, again.one_thread),
                (&mut survey.all_threads, again.all_threads),
            ] {
                rate.after = more.before;
                rate.median = median(&[&rate.before[..], &rate.after].concat());
            }
        }
    }
}

fn time<R>(work: impl FnOnce() -> R) -> f64 {
    let start = Instant::now();
    std::hint::black_box(work());
    start.elapsed().as_secs_f64()
}

/// Runs `work(0..threads)` at once, each on a processor of its own where there are enough, as otherwise two may share one for
/// a whole sample; seconds from the first start to the last end.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    if threads <= 1 {
        return time(|| work(0));
    }
    let barrier = Barrier::new(threads);
    let places = core_affinity::get_core_ids().filter(|places| places.len() >= threads);
    let run = |i: usize| {
        if let Some(place) = places.as_ref().and_then(|places| places.get(i)) {
            core_affinity::set_for_current(*place);
        }
        barrier.wait();
        let start = Instant::now();
        work(i);
        (start, Instant::now())
    };
    let run = &run;
    let spans: Vec<(Instant, Instant)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|i| scope.spawn(move || run(i))).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let start = spans.iter().map(|span| span.0).min();
    let end = spans.iter().map(|span| span.1).max();
    start.zip(end).map_or(f64::NAN, |(start, end)| (end - start).as_secs_f64())
}
