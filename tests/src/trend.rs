//! Whether what is measured over and over stays level: a straight line through the samples, and how steep it may be. Pure.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

/// A quantity that must not grow with the number of cycles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gauge {
    /// What is measured, and of whom.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// By how much the line may rise in one cycle, however many there are: less than the least that could leak.
    pub per_cycle: f64,
    /// By how much the line may rise over all of them without any leak, since single samples are off by about so much.
    pub jitter: f64,
}

impl Gauge {
    /// The steepest slope that counts as level, per cycle, of a line through samples of `span` cycles.
    fn bound(&self, span: f64) -> f64 {
        self.per_cycle + self.jitter / span
    }
}

/// Samples of several gauges, in the order of the cycles after which they were taken.
#[derive(Debug, Clone, Default)]
pub struct Trends {
    samples: Vec<(Gauge, Vec<(f64, f64)>)>,
}

impl Trends {
    /// Adds what was read after `cycle`.
    pub fn add(&mut self, cycle: u32, readings: &[(Gauge, f64)]) {
        for &(gauge, value) in readings {
            let point = (f64::from(cycle), value);
            match self.samples.iter_mut().find(|(known, _)| known.name == gauge.name) {
                Some((_, points)) => points.push(point),
                None => self.samples.push((gauge, vec![point])),
            }
        }
    }

    /// A table of the slopes, without what was sampled before `warm_up` cycles; then whether all of them are level.
    ///
    /// Beside a slope stand the means of each third of its samples: what fills up once grows less from third to third.
    /// An error names every gauge that rises too steeply; it is one as well when there are too few samples for a line.
    pub fn judge(&self, warm_up: u32) -> (String, Result<()>) {
        let mut text = format!("{:<40} {:>9} {:>9}  {:<9} thirds\n", "per cycle", "slope", "bound", "unit");
        let mut steep = Vec::new();
        for (gauge, points) in &self.samples {
            let points: Vec<_> = points.iter().copied().filter(|(cycle, _)| *cycle >= f64::from(warm_up)).collect();
            let (Some(slope), Some(first), Some(last)) = (slope(&points), points.first(), points.last()) else {
                steep.push(format!("{}: too few samples for a line", gauge.name));
                continue;
            };
            let bound = gauge.bound(last.0 - first.0);
            let (name, unit) = (gauge.name, gauge.unit);
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<40} {slope:>+9.3} {bound:>9.3}  {unit:<9} {}", thirds(&points));
            if slope > bound {
                steep.push(format!("{name} rise by {slope:.3} {unit} per cycle, level is at most {bound:.3}"));
            }
        }
        let level = || -> Result<()> {
            ensure!(!self.samples.is_empty(), "nothing was measured");
            ensure!(steep.is_empty(), "{}", steep.join("; "));
            Ok(())
        };
        (text, level())
    }
}

/// Slope of the straight line with the least squares of distances to `points`; `None` unless two of them have different
/// places.
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = u32::try_from(points.len()).ok().map(f64::from)?;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (middle_x, middle_y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|(x, _)| (x - middle_x).powi(2)).sum();
    let along: f64 = points.iter().map(|(x, y)| (x - middle_x) * (y - middle_y)).sum();
    (spread > 0.0).then(|| along / spread)
}

/// Means of the values of each third of `points`, which are at least two.
fn thirds(points: &[(f64, f64)]) -> String {
    let means = points.chunks(points.len().div_ceil(3)).filter_map(|third| {
        let count = u32::try_from(third.len()).ok().map(f64::from)?;
        Some(format!("{:.1}", third.iter().map(|(_, value)| value).sum::<f64>() / count))
    });
    means.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: Gauge = Gauge { name: "files", unit: "files", per_cycle: 0.1, jitter: 2.0 };

    fn trends(values: impl IntoIterator<Item = f64>) -> Trends {
        let mut trends = Trends::default();
        for (cycle, value) in (0..).zip(values) {
            trends.add(cycle, &[(FILES, value)]);
        }
        trends
    }

    #[test]
    fn the_slope_is_that_of_least_squares() {
        assert_eq!(slope(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]), Some(2.0));
        // By hand: the means are 2.5 and 5, the sums 8 and 5.
        assert_eq!(slope(&[(1.0, 2.0), (2.0, 6.0), (3.0, 4.0), (4.0, 8.0)]), Some(1.6));
        assert_eq!(slope(&[(3.0, 7.0), (3.0, 9.0)]), None);
        assert_eq!(slope(&[]), None);
    }

    #[test]
    fn a_leak_of_one_in_each_cycle_is_found_in_a_short_run() {
        let (table, level) = trends((0..20).map(|cycle| 10.0 + f64::from(cycle))).judge(5);
        let said = level.expect_err("it rises").to_string();
        assert_eq!(said, "files rise by 1.000 files per cycle, level is at most 0.243");
        assert!(table.lines().nth(1).is_some_and(|line| line.ends_with(" 17.0, 22.0, 27.0")), "{table}");
    }

    #[test]
    fn a_leak_in_every_fourth_cycle_is_found_in_a_long_run() {
        trends((0..500).map(|cycle| f64::from(cycle / 4))).judge(50).1.expect_err("it rises");
    }

    #[test]
    fn samples_that_jump_about_a_level_are_level() {
        trends((0..20).map(|cycle| f64::from(10 + cycle % 3))).judge(5).1.expect("it is level");
    }

    #[test]
    fn what_is_filled_once_does_not_count() {
        trends((0..20).map(|cycle| f64::from(cycle.min(5)))).judge(5).1.expect("it is level");
    }

    #[test]
    fn too_few_samples_are_an_error() {
        trends([1.0, 1.0]).judge(1).1.expect_err("one sample is no line");
        Trends::default().judge(0).1.expect_err("there are no samples");
    }
}
