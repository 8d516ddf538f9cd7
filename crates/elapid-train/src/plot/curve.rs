//! Curves made readable: smoothing without lag, quantiles, and no more points than pixels.

/// A centred moving average, run twice, whose window grows with the index: the steep beginning
/// keeps its shape and the long tail loses its noise.
pub(super) fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = |i: usize| (points.len() / 60).min(i / 6);
    let average = |values: &[f64]| -> Vec<f64> {
        let mut sums = vec![0.0];
        for value in values {
            sums.push(sums[sums.len() - 1] + value);
        }
        let mean = |i: usize| {
            let (from, to) = (i - half(i), (i + half(i) + 1).min(values.len()));
            (sums[to] - sums[from]) / (to - from) as f64
        };
        (0..values.len()).map(mean).collect()
    };
    let values: Vec<f64> = points.iter().map(|p| p.1).collect();
    let smoothed = average(&average(&values));
    points.iter().zip(smoothed).map(|((x, _), y)| (*x, y)).collect()
}

/// The value below which a share `q` of the values lies.
pub(super) fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * q).round() as usize).copied()
}

/// At most four points (first, lowest, highest, last) for each of 800 columns: the same picture from
/// a run of any length. Points are ordered by x.
pub(super) fn decimate(points: &[(f64, f64)], (left, right): (f64, f64)) -> Vec<(f64, f64)> {
    const COLUMNS: f64 = 800.0;
    let column = |p: &(f64, f64)| ((p.0 - left) / (right - left) * COLUMNS) as u64;
    let mut kept = Vec::new();
    for group in points.chunk_by(|a, b| column(a) == column(b)) {
        let by = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let extremes =
            [group.first(), group.iter().min_by(by), group.iter().max_by(by), group.last()];
        let mut chosen: Vec<(f64, f64)> = extremes.into_iter().flatten().copied().collect();
        chosen.sort_by(|a, b| a.0.total_cmp(&b.0));
        chosen.dedup();
        kept.extend(chosen);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_keeps_lines_and_removes_noise() {
        let line: Vec<(f64, f64)> = (0..600).map(|i| (i as f64, 2.0 * i as f64)).collect();
        let smoothed = smooth(&line);
        assert_eq!(smoothed[0], line[0]);
        assert!((smoothed[300].1 - 600.0).abs() < 1e-9, "a centred window has no lag");
        let zigzag: Vec<(f64, f64)> = (0..600).map(|i| (i as f64, (i % 2) as f64)).collect();
        assert!((smooth(&zigzag)[400].1 - 0.5).abs() < 0.01);
        assert!(smooth(&[]).is_empty());
    }

    #[test]
    fn decimation_keeps_extremes_and_order() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (i as f64, 1.0)).collect();
        points[54_321].1 = 9.0;
        let kept = decimate(&points, (0.0, 99_999.0));
        assert!(kept.len() <= 4 * 801 && kept.contains(&(54_321.0, 9.0)));
        assert!(kept.windows(2).all(|w| w[0].0 <= w[1].0));
        assert_eq!((kept.first(), kept.last()), (points.first(), points.last()));
    }

    #[test]
    fn quantiles() {
        let values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&values, 0.25), Some(25.0));
        assert_eq!(quantile(&values, 1.0), Some(100.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
