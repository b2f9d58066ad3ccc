//! Many steps on one screen: of every metric its first, mean and last value, and its course as a line of blocks.

use serde_json::Value;

/// Characters of a course, at most.
const WIDTH: usize = 48;
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Header and rows, for [`crate::print_table`], of those of the `metrics` that some line has as a number.
pub fn overview(lines: &[Value], metrics: &[&str]) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let row = |name: &&str| {
        let values: Vec<f64> = lines.iter().filter_map(|line| line[*name].as_f64()).collect();
        let (first, last) = (values.first()?, values.last()?);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let cells = [*first, mean, *last].map(short);
        Some([&[(*name).to_owned()][..], &cells, &[course(&values)]].concat())
    };
    (vec!["", "first", "mean", "last", "course"], metrics.iter().filter_map(row).collect())
}

/// Four significant digits.
fn short(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { (3 - value.abs().log10().floor() as i32).clamp(0, 9) };
    format!("{value:.*}", digits as usize)
}

/// The values from left to right, neighbours averaged where there are more than fit, the least as the lowest block.
fn course(values: &[f64]) -> String {
    let width = values.len().min(WIDTH);
    let bound = |index: usize| index * values.len() / width;
    let means = (0..width).map(|index| {
        let part = &values[bound(index)..bound(index + 1)];
        part.iter().sum::<f64>() / part.len() as f64
    });
    let means: Vec<f64> = means.collect();
    let least = means.iter().copied().fold(f64::INFINITY, f64::min);
    blocks(&means.iter().map(|mean| mean - least).collect::<Vec<f64>>())
}

/// One block a value, as high as the value is beside the largest.
pub fn blocks(values: &[f64]) -> String {
    let most = values.iter().copied().fold(0.0, f64::max);
    let level = |value: &f64| if most > 0.0 { value / most * 7.0 } else { 0.0 };
    values.iter().map(|value| BLOCKS[level(value).round() as usize]).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_metric_is_a_row() {
        let lines: Vec<Value> = (0..8).map(|step| json!({"loss": 8 - step, "kl": null, "rate": 3e-4})).collect();
        let (header, rows) = overview(&lines, &["loss", "kl", "rate", "none"]);
        assert_eq!(header.len(), 5);
        assert_eq!(
            rows,
            [
                ["loss", "8.000", "4.500", "1.000", "█▇▆▅▄▃▂▁"],
                ["rate", "0.0003000", "0.0003000", "0.0003000", "▁▁▁▁▁▁▁▁"],
            ]
        );
    }

    #[test]
    fn neighbours_are_averaged_where_there_are_too_many() {
        let values: Vec<f64> = (0..1000).map(f64::from).collect();
        let course: Vec<char> = course(&values).chars().collect();
        assert_eq!(course.len(), WIDTH);
        assert!(course.is_sorted() && course[0] == '▁' && course[WIDTH - 1] == '█');
        assert_eq!([0.0, 1234.6, -0.012_345, 1e-12].map(short), ["0", "1235", "-0.01235", "0.000000000"]);
    }
}
