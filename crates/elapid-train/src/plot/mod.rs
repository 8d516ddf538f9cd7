//! The loss plot of a run as SVG: training loss (every step, light, and smoothed), validation
//! points, horizontal lines to compare with, on linear or logarithmic steps, with a second unit on
//! the right-hand axis.

mod curve;
mod legend;
mod style;
mod ticks;

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};
use crate::metrics::Record;
use curve::{decimate, quantile, smooth};
use legend::draw_legend;
use style::{
    FAINT, INK, MUTED, REFERENCES, VALIDATION, raw_style, reference_style, smoothed_style, text,
    validation_style,
};
use ticks::{Axis, compact, label, linear_ticks, log_ticks};

/// Size of the picture in CSS pixels.
const SIZE: (u32, u32) = (960, 540);
/// Plotters draws on whole pixels; drawing this much larger and scaling down smooths the curves.
const FINE: u32 = 4;

/// What to draw. Points are (step, loss); those that are not finite are left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossPlot {
    /// Heading.
    pub title: String,
    /// Name and unit of the loss, such as "bits per byte".
    pub y_label: String,
    /// Training loss step by step.
    pub train: Vec<(f64, f64)>,
    /// Validation loss.
    pub validation: Vec<(f64, f64)>,
    /// Lines to compare with, in the unit of the loss.
    pub references: Vec<Reference>,
    /// A second unit on the right-hand axis.
    pub right_axis: Option<RightAxis>,
    /// Logarithmic steps; steps below 1 are then left out.
    pub log_x: bool,
}

/// A horizontal line, such as what gzip reaches on the same bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// What reaches this value.
    pub label: String,
    /// The value, in the unit of the loss.
    pub value: f64,
}

/// The same values in another unit.
#[derive(Debug, Clone, PartialEq)]
pub struct RightAxis {
    /// Name and unit.
    pub label: String,
    /// One unit of the left-hand axis in units of the right-hand one.
    pub factor: f64,
}

impl LossPlot {
    /// The plot of a run's records: in bits per byte, with nats on the right, where every record
    /// has them, otherwise in nats.
    pub fn from_records(title: impl Into<String>, records: &[Record]) -> Self {
        let values = |record: &Record| match record {
            Record::Train(r) => (r.step, r.loss, r.bits_per_byte),
            Record::Validation(r) => (r.step, r.loss, r.bits_per_byte),
        };
        let bits = !records.is_empty() && records.iter().all(|r| values(r).2.is_some());
        let mut plot = Self { title: title.into(), ..Default::default() };
        for record in records {
            let (step, loss, bits_per_byte) = values(record);
            let point = (step as f64, if bits { bits_per_byte.unwrap_or(loss) } else { loss });
            match record {
                Record::Train(_) => plot.train.push(point),
                Record::Validation(_) => plot.validation.push(point),
            }
        }
        plot.y_label = if bits { "bits per byte" } else { "loss (nats per token)" }.to_string();
        // Tokens of one byte: a bit is ln 2 nats. Other tokenizers have no fixed factor.
        let ratio = records.iter().map(values).find_map(|(_, loss, bits)| Some(loss / bits?));
        if let Some(factor) = ratio.filter(|f| bits && (f - std::f64::consts::LN_2).abs() < 1e-3) {
            plot.right_axis = Some(RightAxis { label: "nats per byte".to_string(), factor });
        }
        plot
    }

    /// Draws the plot.
    ///
    /// # Errors
    /// There is no finite point to draw.
    pub fn to_svg(&self) -> Result<String> {
        self.draw().map_err(|message| Error::Plot { path: "loss plot".into(), message })
    }

    /// Draws the plot into a file, which appears whole or not at all.
    ///
    /// # Errors
    /// There is no finite point to draw, or the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let svg = self.draw().map_err(|message| Error::Plot { path: path.into(), message })?;
        let partial = path.with_extension("svg.tmp");
        std::fs::write(&partial, svg).map_err(Error::io("write", &partial))?;
        std::fs::rename(&partial, path).map_err(Error::io("replace", path))
    }

    fn draw(&self) -> std::result::Result<String, String> {
        let place = |step: f64| if self.log_x { step.log10() } else { step };
        let keep = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            let finite = points.iter().map(|(x, y)| (place(*x), *y));
            finite.filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
        };
        let (train, validation) = (keep(&self.train), keep(&self.validation));
        let lines: Vec<&Reference> =
            self.references.iter().filter(|r| r.value.is_finite()).collect();
        let (left, right) = bounds(train.iter().chain(&validation).map(|p| p.0))
            .ok_or("there is no finite loss to draw")?;
        let raw = train.iter().map(|p| p.1).collect::<Vec<f64>>();
        // A few wild steps must not flatten the rest: of the raw curve only quantiles count.
        let usual = quantile(&raw, 0.002).zip(quantile(&raw, 0.998));
        let (floor, ceiling) = usual.unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
        // The first loss is where the run came from, however rare its height.
        let ceiling = raw.first().map_or(ceiling, |first| ceiling.max(*first));
        let tamed: Vec<(f64, f64)> =
            train.iter().map(|(x, y)| (*x, y.clamp(floor, ceiling))).collect();
        let smoothed = smooth(&tamed);
        let seen = tamed.iter().chain(&validation).map(|p| p.1);
        let (low, high) = bounds(seen.chain(lines.iter().map(|r| r.value)))
            .ok_or("there is no finite loss to draw")?;
        let margin = (0.05 * (high - low)).max(1e-3 * high.abs().max(1e-6));
        let (low, high) = (low - margin, high + margin);
        let right = if right > left { right } else { left + 1.0 };

        let x_ticks =
            if self.log_x { log_ticks(left, right) } else { linear_ticks(left, right, 8) };
        let frame = Frame { plot: self, x: (left, right, x_ticks), y: (low, high) };
        let curves = Curves {
            raw: decimate(&train, (left, right)),
            smoothed: decimate(&smoothed, (left, right)),
            validation,
            lines,
        };
        let mut svg = String::new();
        frame.render(&mut svg, &curves).map_err(|e| e.to_string())?;
        let fine = format!("width=\"{}\" height=\"{}\"", SIZE.0 * FINE, SIZE.1 * FINE);
        Ok(svg.replacen(&fine, &format!("width=\"{}\" height=\"{}\"", SIZE.0, SIZE.1), 1))
    }
}

struct Curves<'a> {
    raw: Vec<(f64, f64)>,
    smoothed: Vec<(f64, f64)>,
    validation: Vec<(f64, f64)>,
    lines: Vec<&'a Reference>,
}

struct Frame<'a> {
    plot: &'a LossPlot,
    x: (f64, f64, Vec<f64>),
    y: (f64, f64),
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

impl Frame<'_> {
    fn render(&self, svg: &mut String, curves: &Curves<'_>) -> Drawn {
        let size = (SIZE.0 * FINE, SIZE.1 * FINE);
        let root = SVGBackend::with_string(svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        let title = text(20, &INK).pos(Pos::new(HPos::Left, VPos::Top));
        root.draw(&Text::new(self.plot.title.clone(), at(74, 14), title))?;

        let (left, right, x_ticks) = &self.x;
        let (low, high) = self.y;
        let y_ticks = linear_ticks(low, high, 7);
        let y_step = y_ticks.get(1).map_or(1.0, |next| next - y_ticks[0]);
        let right_axis = self.plot.right_axis.as_ref().filter(|a| a.factor > 0.0);
        let factor = right_axis.map_or(1.0, |a| a.factor);
        let r_ticks = linear_ticks(low * factor, high * factor, 7);
        let r_step = r_ticks.get(1).map_or(1.0, |next| next - r_ticks[0]);
        let axis = |low: f64, high: f64, ticks: &[f64]| Axis { low, high, ticks: ticks.to_vec() };
        let mut chart = ChartBuilder::on(&root)
            .margin_top(46 * FINE)
            .margin_right(if right_axis.is_some() { 8 } else { 28 } * FINE)
            .margin_left(12 * FINE)
            .margin_bottom(10 * FINE)
            .x_label_area_size(48 * FINE)
            .y_label_area_size(62 * FINE)
            .right_y_label_area_size(if right_axis.is_some() { 62 } else { 0 } * FINE)
            .build_cartesian_2d(axis(*left, *right, x_ticks), axis(low, high, &y_ticks))?
            .set_secondary_coord(
                axis(*left, *right, x_ticks),
                axis(low * factor, high * factor, &r_ticks),
            );
        let log_x = self.plot.log_x;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT.stroke_width(FINE))
            .axis_style(MUTED.stroke_width(FINE))
            .set_all_tick_mark_size(5 * FINE)
            .label_style(text(14, &MUTED))
            .axis_desc_style(text(15, &INK))
            .x_desc("step")
            .y_desc(self.plot.y_label.clone())
            .x_label_formatter(&|x| compact(if log_x { 10f64.powf(*x) } else { *x }))
            .y_label_formatter(&|y| label(*y, y_step))
            .draw()?;
        if let Some(axis) = right_axis {
            chart
                .configure_secondary_axes()
                .axis_style(MUTED.stroke_width(FINE))
                .set_all_tick_mark_size(5 * FINE)
                .label_style(text(14, &MUTED))
                .axis_desc_style(text(15, &INK))
                .y_desc(axis.label.clone())
                .y_label_formatter(&|y| label(*y, r_step))
                .draw()?;
        }

        for (line, color) in curves.lines.iter().zip(REFERENCES.iter().cycle()) {
            let ends = [(*left, line.value), (*right, line.value)];
            let style = reference_style(color);
            chart.draw_series(DashedLineSeries::new(ends, 7 * FINE, 5 * FINE, style))?;
        }
        let clamped = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points.iter().map(|(x, y)| (*x, y.clamp(low, high))).collect()
        };
        chart.draw_series([PathElement::new(clamped(&curves.raw), raw_style())])?;
        chart.draw_series([PathElement::new(clamped(&curves.smoothed), smoothed_style())])?;
        let points = clamped(&curves.validation);
        if points.len() > 1 {
            chart.draw_series([PathElement::new(points.clone(), validation_style())])?;
        }
        let radius = if points.len() > 60 { FINE * 2 } else { FINE * 7 / 2 };
        chart.draw_series(points.iter().map(|p| Circle::new(*p, radius, VALIDATION.filled())))?;
        draw_legend(&root, curves, chart.plotting_area().get_pixel_range().0.end)?;
        root.present()
    }
}

/// A place in CSS pixels.
fn at(x: i32, y: i32) -> (i32, i32) {
    (x * FINE as i32, y * FINE as i32)
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.map(|v| (v, v)).reduce(|(low, high), (v, _)| (low.min(v), high.max(v)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{TrainRecord, ValidationRecord};

    fn records(bits: bool) -> Vec<Record> {
        // A curve like those of byte-level training, with deterministic noise.
        let loss = |s: f64| 1.45 + 4.1 / (1.0 + s / 40.0).powf(0.9);
        let noise = |s: u64| ((s.wrapping_mul(2_654_435_761) % 1000) as f64 / 1000.0 - 0.5) * 0.25;
        let unit = |loss: f64| bits.then_some(loss / std::f64::consts::LN_2);
        let mut all = Vec::new();
        for step in 1..=1200u64 {
            let mut train =
                TrainRecord { step, loss: loss(step as f64) + noise(step), ..Default::default() };
            if step == 700 {
                train.loss = 30.0;
            }
            train.bits_per_byte = unit(train.loss);
            all.push(Record::Train(train));
            if step % 100 == 0 {
                let loss = loss(step as f64) + 0.08;
                let bits_per_byte = unit(loss);
                all.push(Record::Validation(ValidationRecord {
                    step,
                    loss,
                    bits_per_byte,
                    ..Default::default()
                }));
            }
        }
        all
    }

    fn example() -> LossPlot {
        let mut plot = LossPlot::from_records("Byte-level Mamba, 1.2 M parameters", &records(true));
        plot.references = [("order-2 model", 3.02), ("gzip", 2.79), ("zstd -19", 2.61)]
            .map(|(label, value)| Reference { label: label.to_string(), value })
            .to_vec();
        plot
    }

    /// Writes the pictures where a person can look at them.
    fn keep(name: &str, svg: &str) {
        if let Some(folder) = std::env::var_os("ELAPID_KEEP_PLOTS") {
            std::fs::write(Path::new(&folder).join(name), svg).unwrap();
        }
    }

    #[test]
    fn a_plot_has_its_words_and_curves() {
        let plot = example();
        let svg = plot.to_svg().unwrap();
        keep("linear.svg", &svg);
        for word in [
            "Byte-level Mamba, 1.2 M parameters",
            "bits per byte",
            "nats per byte",
            "step",
            "gzip",
            "2.790",
            "zstd -19",
            "order-2 model",
            "training, every step",
            "1k",
        ] {
            assert!(svg.contains(word), "{word} is missing");
        }
        assert_eq!(svg.matches("<circle").count(), 12 + 1, "12 validations and the legend");
        assert!(svg.matches("<polyline").count() > 4);
        assert!(svg.len() < 200_000, "{} bytes", svg.len());
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert_eq!(svg, plot.to_svg().unwrap(), "the same records draw the same picture");
    }

    #[test]
    fn steps_may_be_logarithmic() {
        let plot = LossPlot { log_x: true, ..example() };
        let svg = plot.to_svg().unwrap();
        keep("log.svg", &svg);
        let labels = [">\n1\n<", ">\n10\n<", ">\n100\n<", ">\n1k\n<"];
        assert!(labels.iter().all(|l| svg.contains(l)), "{svg}");
    }

    #[test]
    fn without_bits_the_unit_is_nats() {
        let plot = LossPlot::from_records("induction heads", &records(false));
        assert_eq!(plot.right_axis, None);
        let svg = plot.to_svg().unwrap();
        keep("nats.svg", &svg);
        assert!(svg.contains("loss (nats per token)"));
    }

    #[test]
    fn odd_data_is_drawn_or_refused() {
        let one = LossPlot { train: vec![(1.0, 2.0)], ..Default::default() };
        assert!(one.to_svg().is_ok());
        let holes = vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, f64::INFINITY), (4.0, 1.0)];
        let svg = LossPlot { train: holes, log_x: true, ..Default::default() }.to_svg().unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let none = LossPlot { train: vec![(1.0, f64::NAN)], ..Default::default() };
        assert!(none.to_svg().unwrap_err().to_string().contains("no finite loss"));
        let title =
            LossPlot { title: "a < b & c".into(), train: vec![(1.0, 1.0)], ..Default::default() };
        assert!(title.to_svg().unwrap().contains("a &lt; b &amp; c"));
    }

    #[test]
    fn saving_replaces_the_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        std::fs::write(&path, "old").unwrap();
        example().save(&path).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("<svg"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(example().save(folder.path().join("none/loss.svg")).is_err());
    }
}
