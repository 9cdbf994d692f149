//! Columns of text.

/// Between columns, as kubectl has it.
const GAP: usize = 3;

/// Pads every column to its widest cell. The last column is not padded. Colour codes do not count as width.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn with_header(columns: &[&str], shown: bool) -> Table {
        let header = columns.iter().map(|&column| column.to_owned()).collect();
        Table { rows: if shown { vec![header] } else { Vec::new() } }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(crate) fn render(&self, indent: usize) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                self.rows.iter().filter_map(|row| row.get(column)).map(|cell| width(cell)).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(indent);
            for (cell, column) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', column + GAP - width(cell)));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Characters that take a column. Names and states are ASCII; a wide character in a message stands last.
fn width(cell: &str) -> usize {
    let mut inside = false;
    cell.chars()
        .filter(|&c| {
            if c == '\x1b' {
                inside = true;
            }
            let counts = !inside;
            if inside && c == 'm' {
                inside = false;
            }
            counts
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_colours_take_no_room() {
        let mut table = Table::with_header(&["NAME", "STATUS", "AGE"], true);
        table.row(vec!["web".into(), "\x1b[32mRunning\x1b[0m".into(), "5s".into()]);
        table.row(vec!["a-long-name".into(), "-".into(), "2d".into()]);
        assert_eq!(
            table.render(0),
            "NAME          STATUS    AGE\n\
             web           \x1b[32mRunning\x1b[0m   5s\n\
             a-long-name   -         2d\n"
        );
        assert_eq!(Table::with_header(&["X"], false).render(0), "");
    }
}
