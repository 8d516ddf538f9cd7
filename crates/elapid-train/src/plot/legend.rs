//! The legend: what each curve is, and where it ended.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::style::{
    INK, REFERENCES, VALIDATION, raw_style, reference_style, smoothed_style, text, validation_style,
};
use super::ticks::label;
use super::{Area, Curves, Drawn, FINE, at};

/// Names every curve and line with its last value, in the upper right corner, which a falling loss
/// leaves empty.
pub(super) fn draw_legend(root: &Area<'_>, curves: &Curves<'_>, right: i32) -> Drawn {
    let last = |points: &[(f64, f64)]| points.last().map_or(String::new(), |p| label(p.1, 0.001));
    let mut rows: Vec<(Sample, &str, String, ShapeStyle)> = Vec::new();
    if !curves.raw.is_empty() {
        let value = last(&curves.smoothed);
        rows.push((Sample::Line, "training, smoothed", value, smoothed_style()));
        rows.push((Sample::Line, "training, every step", String::new(), raw_style()));
    }
    if !curves.validation.is_empty() {
        rows.push((Sample::Dot, "validation", last(&curves.validation), validation_style()));
    }
    for (line, color) in curves.lines.iter().zip(REFERENCES.iter().cycle()) {
        let value = label(line.value, 0.001);
        rows.push((Sample::Dashes, &line.label, value, reference_style(color)));
    }

    let (top, row_height) = (56, 20);
    let right = right / FINE as i32 - 14;
    // No font is loaded, so the width of a name is an estimate, generous for Latin letters.
    let longest = rows.iter().map(|(_, name, ..)| name.chars().count()).max().unwrap_or(0);
    let left = right - 7 * longest.min(60) as i32 - 106;
    let bottom = top + row_height * rows.len() as i32 + 8;
    let ground = WHITE.mix(0.85).filled();
    root.draw(&Rectangle::new([at(left - 10, top), at(right + 6, bottom)], ground))?;
    for (row, (sample, name, value, style)) in rows.into_iter().enumerate() {
        let y = top + row_height * row as i32 + row_height / 2 + 4;
        let strokes: &[(i32, i32)] = match sample {
            Sample::Line | Sample::Dot => &[(0, 24)],
            Sample::Dashes => &[(0, 9), (15, 24)],
        };
        for (from, to) in strokes {
            root.draw(&PathElement::new([at(left + from, y), at(left + to, y)], style))?;
        }
        if matches!(sample, Sample::Dot) {
            root.draw(&Circle::new(at(left + 12, y), FINE * 7 / 2, VALIDATION.filled()))?;
        }
        let style = text(14, &INK).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&Text::new(name, at(left + 34, y), style))?;
        let style = text(14, &INK).pos(Pos::new(HPos::Right, VPos::Center));
        root.draw(&Text::new(value, at(right, y), style))?;
    }
    Ok(())
}

/// How the legend hints at a curve.
enum Sample {
    Line,
    Dot,
    Dashes,
}
