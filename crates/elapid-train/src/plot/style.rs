//! Colours, strokes and letters of the plot.

use plotters::prelude::*;

use super::FINE;

pub(super) const INK: RGBColor = RGBColor(38, 43, 51);
pub(super) const FAINT: RGBColor = RGBColor(228, 231, 236);
pub(super) const MUTED: RGBColor = RGBColor(104, 112, 125);
pub(super) const TRAIN: RGBColor = RGBColor(38, 104, 186);
pub(super) const VALIDATION: RGBColor = RGBColor(213, 94, 0);
pub(super) const FONT: &str = "Helvetica, Arial, sans-serif";
/// Colours of the lines to compare with, in turn.
pub(super) const REFERENCES: [RGBColor; 5] = [
    RGBColor(20, 128, 94),
    RGBColor(146, 78, 160),
    RGBColor(158, 118, 8),
    RGBColor(176, 42, 76),
    RGBColor(90, 98, 110),
];

pub(super) fn smoothed_style() -> ShapeStyle {
    TRAIN.stroke_width(2 * FINE)
}

pub(super) fn raw_style() -> ShapeStyle {
    TRAIN.mix(0.35).stroke_width(FINE)
}

pub(super) fn validation_style() -> ShapeStyle {
    VALIDATION.mix(0.7).stroke_width(FINE + FINE / 4)
}

pub(super) fn reference_style(color: &RGBColor) -> ShapeStyle {
    color.stroke_width(FINE + FINE / 4)
}

pub(super) fn text(size: u32, color: &RGBColor) -> TextStyle<'_> {
    TextStyle::from((FONT, size * FINE)).color(color)
}
