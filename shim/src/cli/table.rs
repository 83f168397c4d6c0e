//! Aligned columns of text.

/// Rows under a `header`, each column as wide as its widest cell, two blanks apart; the last one is not filled up.
///
/// Cells show what others named: control characters in them are made visible.
pub fn render<const COLUMNS: usize>(header: [&str; COLUMNS], rows: &[[String; COLUMNS]]) -> String {
    let rows: Vec<[String; COLUMNS]> = std::iter::once(header.map(str::to_owned))
        .chain(rows.iter().map(|row| row.each_ref().map(|c| plain(c))))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..COLUMNS).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// `text` on one line, with its control characters escaped as in Rust's strings.
pub fn plain(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// A value that may be unknown.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A duration in its largest unit, as `kubectl` has it.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let rows = [["a".to_owned(), "longer".to_owned()], ["wide one".to_owned(), String::new()]];
        assert_eq!(render(["ID", "STATE"], &rows), "ID        STATE\na         longer\nwide one\n");
    }

    #[test]
    fn a_cell_cannot_leave_its_place() {
        assert_eq!(render(["ID"], &[["a\x1b[2J\nb".to_owned()]]), "ID\na\\u{1b}[2J\\nb\n");
    }

    #[test]
    fn ages_are_told_in_one_unit() {
        let told = [5, 119, 120, 7_199, 7_200, 172_799, 172_800].map(age);
        assert_eq!(told, ["5s", "119s", "2m", "119m", "2h", "47h", "2d"]);
    }
}
