//! The learning rate as a pure function of the step: linear warm-up, then constant or half a cosine.
//!
//! Steps count from 0. During `warmup` W steps the rate is peak · (s + 1) / (W + 1), so that no step
//! is wasted at rate 0 and step W is the first at the peak. The cosine then runs from the peak at
//! step W to the final rate at the last step N - 1, both exactly. Past the end the rate stays final,
//! so a run that is resumed with the same N sees the same rates.

use crate::config::{ScheduleConfig, ScheduleKind};
use crate::error::{Error, Place, Result};

/// Share of the peak at which a cosine ends when nothing else is said.
pub const DEFAULT_FINAL_LR_FRACTION: f64 = 0.1;

/// A learning-rate schedule whose lengths are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// Largest learning rate.
    pub peak_lr: f64,
    /// Learning rate of the last step (cosine only).
    pub final_lr: f64,
    /// Steps of linear warm-up W.
    pub warmup_steps: u64,
    /// All steps N.
    pub steps: u64,
}

impl Schedule {
    /// The schedule of a run of `steps` steps.
    ///
    /// # Errors
    /// `schedule.warmup_steps` is not below `steps`.
    pub fn new(config: &ScheduleConfig, peak_lr: f64, steps: u64) -> Result<Self> {
        let warmup_steps = match (config.warmup_steps, config.warmup_fraction) {
            (Some(warmup), _) => warmup,
            (None, Some(fraction)) => (fraction * steps as f64).round() as u64,
            (None, None) => 0,
        };
        // A share below 1 rounds up to a whole run only where there is almost no run.
        let warmup_steps = match config.warmup_steps {
            None => warmup_steps.min(steps.saturating_sub(1)),
            Some(_) => warmup_steps,
        };
        if warmup_steps > 0 && warmup_steps >= steps {
            return Err(Error::BadValue {
                place: Place::Nowhere,
                key: "schedule.warmup_steps".to_string(),
                expected: format!("fewer than the run's {steps} steps"),
                found: warmup_steps.to_string(),
            });
        }
        let final_lr = match (config.kind, config.final_lr) {
            (ScheduleKind::Constant, _) => peak_lr,
            (ScheduleKind::Cosine, Some(lr)) => lr,
            (ScheduleKind::Cosine, None) => {
                peak_lr * config.final_lr_fraction.unwrap_or(DEFAULT_FINAL_LR_FRACTION)
            }
        };
        Ok(Self { kind: config.kind, peak_lr, final_lr, warmup_steps, steps })
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak_lr * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        if self.kind == ScheduleKind::Constant || step == self.warmup_steps {
            return self.peak_lr;
        }
        let last = self.steps.saturating_sub(1);
        if step >= last {
            return self.final_lr;
        }
        let progress = (step - self.warmup_steps) as f64 / (last - self.warmup_steps) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.final_lr + (self.peak_lr - self.final_lr) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cosine(warmup: u64, steps: u64, final_lr: f64) -> Schedule {
        let config = ScheduleConfig {
            warmup_steps: Some(warmup),
            final_lr: Some(final_lr),
            ..Default::default()
        };
        Schedule::new(&config, 1.0, steps).unwrap()
    }

    #[test]
    fn warmup_then_cosine_has_exact_values() {
        let schedule = cosine(3, 8, 0.2);
        let warm: Vec<f64> = (0..4).map(|s| schedule.lr(s)).collect();
        assert_eq!(warm, [0.25, 0.5, 0.75, 1.0]);
        // Steps 3..=7 are the cosine at 0, 1/4, 1/2, 3/4, 1.
        let root = std::f64::consts::FRAC_1_SQRT_2;
        assert!((schedule.lr(4) - (0.6 + 0.4 * root)).abs() < 1e-15);
        assert!((schedule.lr(5) - 0.6).abs() < 1e-15);
        assert!((schedule.lr(6) - (0.6 - 0.4 * root)).abs() < 1e-15);
        assert_eq!(schedule.lr(7), 0.2);
        assert_eq!(schedule.lr(1000), 0.2);
    }

    #[test]
    fn constant_keeps_the_peak() {
        let config = ScheduleConfig {
            kind: ScheduleKind::Constant,
            warmup_steps: Some(1),
            ..Default::default()
        };
        let schedule = Schedule::new(&config, 2e-3, 4).unwrap();
        let rates: Vec<f64> = (0..6).map(|s| schedule.lr(s)).collect();
        assert_eq!(rates, [1e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3]);
    }

    #[test]
    fn shares_become_steps() {
        let config = ScheduleConfig { warmup_fraction: Some(0.1), ..Default::default() };
        let schedule = Schedule::new(&config, 3e-3, 200).unwrap();
        assert_eq!(schedule.warmup_steps, 20);
        assert_eq!(schedule.final_lr, 3e-3 * DEFAULT_FINAL_LR_FRACTION);
        assert_eq!(schedule.lr(20), 3e-3);
        let config = ScheduleConfig { final_lr_fraction: Some(0.0), ..config };
        assert_eq!(Schedule::new(&config, 3e-3, 200).unwrap().lr(199), 0.0);
    }

    #[test]
    fn the_shortest_runs_are_defined() {
        assert_eq!(cosine(0, 1, 0.1).lr(0), 1.0);
        assert_eq!(cosine(0, 2, 0.1).lr(1), 0.1);
        assert_eq!(cosine(0, 0, 0.1).lr(0), 1.0);
        let config = ScheduleConfig { warmup_fraction: Some(0.9), ..Default::default() };
        assert_eq!(Schedule::new(&config, 1.0, 1).unwrap().warmup_steps, 0);
    }

    #[test]
    fn a_warmup_longer_than_the_run_is_refused() {
        let config = ScheduleConfig { warmup_steps: Some(10), ..Default::default() };
        let error = Schedule::new(&config, 1.0, 10).unwrap_err().to_string();
        assert!(error.contains("schedule.warmup_steps") && error.contains("10 steps"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn rates_stay_between_zero_and_peak_and_fall_after_the_peak(
            warmup in 0u64..50, extra in 1u64..200, fraction in 0.0f64..1.0,
        ) {
            let schedule = cosine(warmup, warmup + extra, fraction);
            for step in 0..warmup + extra + 5 {
                let (now, next) = (schedule.lr(step), schedule.lr(step + 1));
                proptest::prop_assert!(now > 0.0 || fraction == 0.0);
                proptest::prop_assert!(now <= 1.0);
                let rising = step < warmup;
                let ordered = if rising { next > now } else { next <= now + 1e-15 };
                proptest::prop_assert!(ordered, "step {step}: {now} then {next}");
            }
        }
    }
}
