//! Charts as SVG, from the reports of `--json`. Without scripts or fonts, so that any browser shows them.

use std::fmt::Write as _;

/// Points are (x, y), in the order of x.
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// The labels and scale of the axes.
pub struct Axes {
    /// The title.
    pub title: String,
    /// The label of x, with its unit.
    pub x: String,
    /// The label of y, with its unit.
    pub y: String,
    /// Whether x is logarithmic (base ten), for positive values.
    pub logarithmic: bool,
}

/// Minimum size of the picture, and the plot area, in pixels. Long legends widen it by this width per letter.
const MIN_SIZE: (f64, f64) = (760.0, 420.0);
const LETTER_WIDTH: f64 = 7.5;
const PLOT_AREA: (f64, f64, f64, f64) = (70.0, 50.0, 480.0, 310.0);
/// The gap between plot area and legend.
const LEGEND_GAP: f64 = 48.0;
/// Colours for colour-blind readers (Okabe and Ito, "Color Universal Design").
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"];
/// Approximate number of steps of an axis.
const AXIS_STEPS: f64 = 5.0;

/// Renders the chart.
pub fn svg(axes: &Axes, curves: &[Curve]) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let smallest = points().map(|(x, _)| *x).filter(|x| *x > 0.0).fold(f64::INFINITY, f64::min);
    let x = Scale::new(points().map(|(x, _)| *x), axes.logarithmic.then_some(smallest).filter(|x| x.is_finite()));
    let y = Scale::new(points().map(|(_, y)| *y), None);
    let (left, top, width, height) = PLOT_AREA;
    let at = |(px, py): &(f64, f64)| (left + width * x.position(*px), top + height * (1.0 - y.position(*py)));
    let longest = curves.iter().map(|curve| curve.name.chars().count()).max().unwrap_or_default();
    let page_width =
        f64::from(u16::try_from(longest).unwrap_or(u16::MAX)).mul_add(LETTER_WIDTH, left + width + LEGEND_GAP).max(MIN_SIZE.0);
    let mut out = String::new();
    let _ = write!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-family="sans-serif" font-size="13" role="img" aria-label="{title}">
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{left}" y="26" font-size="16" font-weight="bold">{title}</text>
<g stroke="#dddddd">"##,
        page_width,
        MIN_SIZE.1,
        title = escape_xml(&axes.title)
    );
    let bottom = top + height;
    for step in y.ticks() {
        let y_position = top + height * (1.0 - y.position(step));
        let _ = write!(out, "\n<path d=\"M{left} {y_position:.1}h{width}\"/>");
    }
    let _ = write!(out, "\n</g>\n<g fill=\"#333333\">");
    for step in y.ticks() {
        let y_position = top + height * (1.0 - y.position(step)) + 4.0;
        let _ = write!(out, "\n<text x=\"{}\" y=\"{y_position:.1}\" text-anchor=\"end\">{}</text>", left - 8.0, tick_label(step));
    }
    for step in x.ticks() {
        let x_position = left + width * x.position(step);
        let _ = write!(
            out,
            "\n<text x=\"{x_position:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 18.0,
            tick_label(step)
        );
    }
    let _ = write!(
        out,
        "\n<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n<text transform=\"translate(18 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n</g>",
        left + width / 2.0,
        bottom + 40.0,
        escape_xml(&axes.x),
        top + height / 2.0,
        escape_xml(&axes.y)
    );
    let _ = write!(out, "\n<path d=\"M{left} {top}v{height}h{width}\" fill=\"none\" stroke=\"#333333\"/>");
    for ((curve, colour), row) in curves.iter().zip(COLOURS.iter().cycle()).zip(0_u16..) {
        let positions: Vec<(f64, f64)> = curve.points.iter().map(at).collect();
        let path: Vec<String> = positions.iter().map(|(px, py)| format!("{px:.1} {py:.1}")).collect();
        let _ = write!(out, "\n<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", path.join("L"));
        // With few points, each is marked as a single measurement.
        if positions.len() <= 12 {
            for (px, py) in &positions {
                let _ = write!(out, "\n<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
            }
        }
        let (legend, line) = (left + width + LEGEND_GAP - 24.0 - 8.0, top + 10.0 + 20.0 * f64::from(row));
        let name = escape_xml(&curve.name);
        let _ = write!(
            out,
            "\n<path d=\"M{legend} {line}h18\" stroke=\"{colour}\" stroke-width=\"3\"/>\n<text x=\"{}\" y=\"{}\">{name}</text>",
            legend + 24.0,
            line + 4.0
        );
    }
    out.push_str("\n</svg>\n");
    out
}

/// Maps values to positions on an axis.
struct Scale {
    from: f64,
    to: f64,
    step: f64,
    logarithmic: bool,
}

impl Scale {
    /// A linear scale from 0. With `smallest`, a logarithmic scale from a power of ten below it.
    fn new(values: impl Iterator<Item = f64>, smallest: Option<f64>) -> Scale {
        let max_value = values.fold(0.0, f64::max);
        if let Some(smallest) = smallest {
            let (from, to) = (smallest.log10().floor(), max_value.log10().ceil());
            return Scale { from, to: to.max(from + 1.0), step: 1.0, logarithmic: true };
        }
        let min_step = (max_value / AXIS_STEPS).max(f64::MIN_POSITIVE);
        let ten = 10_f64.powf(min_step.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * ten).into_iter().find(|step| *step >= min_step).unwrap_or(10.0 * ten);
        Scale { from: 0.0, to: step * (max_value / step).ceil().max(1.0), step, logarithmic: false }
    }

    /// 0 at the begin of the axis, 1 at its end.
    fn position(&self, value: f64) -> f64 {
        // On a logarithmic scale zero is drawn at the begin.
        let value = if self.logarithmic { value.max(10_f64.powf(self.from)).log10() } else { value };
        (value - self.from) / (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        let count = ((self.to - self.from) / self.step).round();
        let steps = (0_u32..).map(f64::from).take_while(|n| *n <= count).map(|n| self.from + n * self.step);
        steps.map(|step| if self.logarithmic { 10_f64.powf(step) } else { step }).collect()
    }
}

/// An axis label: 50000 is `50,000`, 0.25 stays.
fn tick_label(value: f64) -> String {
    if value < 1.0 && value > 0.0 {
        let text = format!("{value:.3}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    let digits = format!("{value:.0}");
    if (value - value.round()).abs() > 1e-9 {
        return format!("{value:.1}");
    }
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

fn escape_xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes(logarithmic: bool) -> Axes {
        Axes { title: "cost & count".to_owned(), x: "peers".to_owned(), y: "ms".to_owned(), logarithmic }
    }

    #[test]
    fn values_map_to_axis_positions() {
        let linear = Scale::new([0.0, 50_000.0].into_iter(), None);
        assert_eq!((linear.position(0.0), linear.position(25_000.0), linear.position(50_000.0)), (0.0, 0.5, 1.0));
        assert_eq!(linear.ticks(), [0.0, 10_000.0, 20_000.0, 30_000.0, 40_000.0, 50_000.0]);
        let logarithmic = Scale::new([1.0, 1000.0].into_iter(), Some(1.0));
        assert_eq!(logarithmic.ticks().iter().map(|step| step.round()).collect::<Vec<_>>(), [1.0, 10.0, 100.0, 1000.0]);
        assert!((logarithmic.position(10.0) - 1.0 / 3.0).abs() < 1e-9);
        let small = Scale::new([0.7].into_iter(), None);
        assert_eq!(small.ticks().iter().map(|step| tick_label(*step)).collect::<Vec<_>>(), ["0", "0.2", "0.4", "0.6", "0.8"]);
        assert_eq!([1234567.0, 2.5, 1000.0].map(tick_label), ["1,234,567", "2.5", "1,000"]);
    }

    #[test]
    fn each_curve_is_a_named_path() {
        let curve = |name: &str, y: f64| Curve { name: name.to_owned(), points: vec![(1000.0, y), (10_000.0, 10.0 * y)] };
        let image = svg(&axes(false), &[curve("agent", 14.0), curve("raw <limit>", 9.0)]);
        assert!(image.starts_with("<svg") && image.ends_with("</svg>\n"), "{image}");
        assert_eq!(image.matches("stroke-width=\"2\"").count(), 2);
        assert_eq!(image.matches("<circle").count(), 4);
        assert!(image.contains("cost &amp; count") && image.contains("raw &lt;limit&gt;"), "{image}");
        // Values stay within the plot area.
        assert!(!image.contains("NaN") && !image.contains("inf"), "{image}");
    }

    #[test]
    fn empty_data_gives_empty_plot() {
        let image = svg(&axes(true), &[]);
        assert!(image.contains("peers") && !image.contains("NaN") && !image.contains("inf"), "{image}");
    }
}
