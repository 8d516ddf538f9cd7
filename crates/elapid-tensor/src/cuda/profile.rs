//! Where a GPU's time goes: the time of every launch, copy and product, added up by name.

use std::collections::HashMap;
use std::sync::PoisonError;

use super::error::Result;
use super::gpu::{Event, Gpu};

/// Time of the calls of one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Profiled {
    /// The kernel, or what else was called, with its sizes where they matter.
    pub name: String,
    /// Number of calls.
    pub calls: usize,
    /// Their time in all, in milliseconds.
    pub milliseconds: f64,
}

/// What has been called since the start of a profile.
#[derive(Default)]
pub(super) struct Profile {
    events: Vec<(String, Event, Event)>,
    sums: HashMap<String, (usize, f64)>,
}

/// Calls whose events are read together.
const TOGETHER: usize = 4096;

impl Profile {
    fn read(&mut self) -> Result<()> {
        for (name, from, to) in self.events.drain(..) {
            let sum = self.sums.entry(name).or_default();
            sum.0 += 1;
            sum.1 += to.since(&from)?;
        }
        Ok(())
    }
}

impl Gpu {
    /// Times every call from here on. What was recorded in graphs is not seen, and nothing is recorded meanwhile.
    pub fn start_profile(&self) {
        *self.profile().lock().unwrap_or_else(PoisonError::into_inner) = Some(Profile::default());
    }

    /// True between [`Gpu::start_profile`] and [`Gpu::end_profile`].
    pub fn is_profiling(&self) -> bool {
        self.profile().lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The calls by name, the longest first; waits for them.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn end_profile(&self) -> Result<Vec<Profiled>> {
        let profile = self.profile().lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut profile = profile.unwrap_or_default();
        profile.read()?;
        let mut found: Vec<Profiled> = profile
            .sums
            .into_iter()
            .map(|(name, (calls, milliseconds))| Profiled { name, calls, milliseconds })
            .collect();
        found.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok(found)
    }

    /// Runs a call, and times it if there is a profile.
    pub(super) fn timed(
        &self,
        name: impl FnOnce() -> String,
        call: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.is_profiling() {
            return call();
        }
        let from = self.event()?;
        call()?;
        let to = self.event()?;
        let mut profile = self.profile().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(profile) = profile.as_mut() {
            profile.events.push((name(), from, to));
            if profile.events.len() >= TOGETHER {
                profile.read()?;
            }
        }
        Ok(())
    }
}
