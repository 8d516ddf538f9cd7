//! Scales for groups of values: weighted least squares over the integers that a range of steps would give.
//!
//! The step that maps the largest magnitude to the last integer is rarely the best one. Some tens of steps around it
//! are tried; each gives integers, the integers give the least-squares scale (and offset), and the best is kept.
//! Sums run over eight lanes in a fixed order, so that the compiler can use vectors and bits depend on nothing else.

/// Partial sums of each loop.
const LANES: usize = 8;

/// Rounds to the nearest integer, ties to even, for magnitudes below 2^22 (by addition, which vectors can do
/// on every processor).
#[inline(always)]
pub(super) fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// `(scale, offset)`, both at least 0, so that `scale q - offset` with q in `0..=MAX` is near the 32 values `x` in
/// the sense of `sum weight (scale q - offset - x)²`.
pub(super) fn affine<const MAX: u8>(x: &[f32; 32], weight: &[f32; 32]) -> (f32, f32) {
    let low = x.iter().fold(0f32, |low, &v| low.min(v));
    let high = x.iter().fold(f32::NEG_INFINITY, |high, &v| high.max(v));
    if high <= low {
        return (0.0, -low);
    }
    let max = f32::from(MAX);
    let levels = |per_range: f32, low: f32| -> [f32; 32] {
        let inverse = per_range / (high - low);
        std::array::from_fn(|i| nearest((inverse * (x[i] - low)).clamp(0.0, max)))
    };
    let sums = Sums::new(x, weight);

    let (mut scale, mut minimum) = ((high - low) / max, low);
    let mut smallest = squared_error(x, weight, &levels(max, low), scale, minimum);
    for step in 0..=20u8 {
        if high <= minimum {
            break;
        }
        // From the best minimum so far, which moves towards the one that fits.
        let q = levels(max - 1.0 + 0.1 * f32::from(step), minimum);
        if let Some((s, m)) = sums.solve(x, weight, &q) {
            let error = squared_error(x, weight, &q, s, m);
            if error < smallest {
                (smallest, scale, minimum) = (error, s, m);
            }
        }
    }
    (scale, -minimum)
}

/// What the normal equations need of values and weights alone.
struct Sums {
    weight: f32,
    x: f32,
}

impl Sums {
    fn new(x: &[f32; 32], weight: &[f32; 32]) -> Self {
        Self { weight: lane_sum(|i| weight[i]), x: lane_sum(|i| weight[i] * x[i]) }
    }

    /// The scale and the minimum (at most 0) of least error for the integers `q`; none if they are all equal.
    fn solve(&self, x: &[f32; 32], weight: &[f32; 32], q: &[f32; 32]) -> Option<(f32, f32)> {
        let sum_q = lane_sum(|i| weight[i] * q[i]);
        let sum_qq = lane_sum(|i| weight[i] * q[i] * q[i]);
        let sum_qx = lane_sum(|i| weight[i] * q[i] * x[i]);
        let determinant = self.weight * sum_qq - sum_q * sum_q;
        if determinant <= 0.0 {
            return None;
        }
        let minimum = (sum_qq * self.x - sum_q * sum_qx) / determinant;
        if minimum > 0.0 {
            return Some((sum_qx / sum_qq, 0.0));
        }
        Some(((self.weight * sum_qx - self.x * sum_q) / determinant, minimum))
    }
}

fn squared_error(
    x: &[f32; 32],
    weight: &[f32; 32],
    q: &[f32; 32],
    scale: f32,
    minimum: f32,
) -> f32 {
    lane_sum(|i| {
        let difference = scale * q[i] + minimum - x[i];
        weight[i] * difference * difference
    })
}

#[inline(always)]
fn lane_sum(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    for start in (0..32).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    lanes.iter().sum()
}

/// The scale (of either sign) so that `scale q` with q in `-MAX..MAX` is near the values `x` in the sense of
/// `sum x² (scale q - x)²`.
pub(super) fn symmetric<const MAX: u8, const LEN: usize>(x: &[f32; LEN]) -> f32 {
    let extreme =
        x.iter().fold(0f32, |extreme, &v| if v.abs() > extreme.abs() { v } else { extreme });
    if extreme.abs() < f32::MIN_POSITIVE {
        return 0.0;
    }
    let max = f32::from(MAX);
    // Relative to the extreme, so that squares neither overflow nor vanish.
    let relative = x.map(|v| v / extreme);
    let mut best = (0.0, 0.0);
    for step in -9..=9i8 {
        let per_extreme = -(max + 0.1 * f32::from(step));
        let (mut sum_qx, mut sum_qq) = (0f32, 0f32);
        for &v in &relative {
            let q = nearest((per_extreme * v).clamp(-max, max - 1.0));
            let weight = v * v;
            sum_qx += weight * q * v;
            sum_qq += weight * q * q;
        }
        // The error is a constant minus this.
        let gain = sum_qx * sum_qx / sum_qq;
        if sum_qq > 0.0 && gain > best.0 {
            best = (gain, sum_qx / sum_qq);
        }
    }
    best.1 * extreme
}
