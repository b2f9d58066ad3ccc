//! `mempo-sft show`: one example as text, its targets coloured (or in `[ ]` where there is no colour).

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use mempo_data::{SftExample, read_rows};
use mempo_run::{Input, ResultExt, print_data};
use mempo_text::Tokenizer;

const TARGET: (&str, &str) = ("\u{1b}[1;32m", "\u{1b}[0m");
const CONTEXT: (&str, &str) = ("\u{1b}[2m", "\u{1b}[0m");

/// Print one example with its targets coloured; with `[ ]` around them where there is no colour (NO_COLOR, a pipe).
#[derive(Debug, clap::Args)]
pub(crate) struct ShowArguments {
    /// Directory written by `mempo-sft build`, or a Parquet file of its table
    #[arg(value_name = "EXAMPLES")]
    examples: PathBuf,
    /// Model directory with tokenizer.json
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,
    /// Which example, from 0
    #[arg(long, default_value_t = 0)]
    row: usize,
}

/// Prints the example.
pub(crate) fn run(arguments: &ShowArguments) -> anyhow::Result<()> {
    let example = read_example(&arguments.examples, arguments.row)?;
    let tokenizer = Tokenizer::load(&arguments.tokenizer).bad_input()?;
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    print_data(&render(&example, colour, |ids| tokenizer.decode(ids)));
    Ok(())
}

fn read_example(path: &Path, row: usize) -> anyhow::Result<SftExample> {
    let files =
        if path.is_dir() { Input::stage("examples", path)?.table("sft_examples")? } else { vec![path.to_path_buf()] };
    let mut found = 0;
    for example in read_rows::<SftExample>(&files).bad_input()? {
        if found == row {
            return example.bad_input();
        }
        found += 1;
    }
    Err(anyhow!("{}: --row {row}, expected less than {found}, the number of rows", path.display())).usage()
}

/// The example as text: what it is, how many tokens, and the tokens with the targets marked.
fn render(example: &SftExample, colour: bool, decode: impl Fn(&[i32]) -> String) -> String {
    let mut text = format!("example     {}\ntrajectory  {}\n", example.example_id, example.trajectory_id);
    for (name, value) in [("task        ", &example.task_id), ("split       ", &example.split)] {
        if let Some(value) = value {
            text.extend([name, value, "\n"]);
        }
    }
    let tokens = example.input_ids.len();
    let _ =
        write!(text, "step        {}\ntokens      {tokens}, targets {}\n\n", example.step_index, example.target_count);
    let mut start = 0;
    for run in example.loss_mask.chunk_by(|before, after| before == after) {
        let words = printable(&decode(&example.input_ids[start..start + run.len()]));
        let (open, close) = match (colour, run[0]) {
            (true, true) => TARGET,
            (true, false) => CONTEXT,
            (false, true) => ("[", "]"),
            (false, false) => ("", ""),
        };
        let _ = write!(text, "{open}{words}{close}");
        start += run.len();
    }
    text + "\n"
}

/// Text that cannot steer the terminal: control characters other than line breaks and tabs are spelled out.
fn printable(text: &str) -> String {
    let spelled = |letter: char| match letter {
        '\n' | '\t' => letter.to_string(),
        letter if letter.is_control() => letter.escape_default().to_string(),
        letter => letter.to_string(),
    };
    text.chars().map(spelled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> SftExample {
        SftExample {
            example_id: "000000001-00002".into(),
            trajectory_id: "t".into(),
            task_id: None,
            split: Some("dev".into()),
            step_index: 2,
            input_ids: vec![1, 2, 3, 4, 5],
            loss_mask: vec![false, false, true, true, false],
            target_count: 2,
        }
    }

    #[test]
    fn targets_are_marked_with_and_without_colour() {
        let words = ["", "a", "b\u{1b}[31m", "c", "d\n", "e"];
        let decode = |ids: &[i32]| ids.iter().map(|id| words[*id as usize]).collect::<String>();
        let head =
            "example     000000001-00002\ntrajectory  t\nsplit       dev\nstep        2\ntokens      5, targets 2\n\n";
        assert_eq!(render(&example(), false, decode), format!("{head}ab\\u{{1b}}[31m[cd\n]e\n"));
        let coloured = render(&example(), true, decode);
        assert_eq!(
            coloured,
            format!("{head}\u{1b}[2mab\\u{{1b}}[31m\u{1b}[0m\u{1b}[1;32mcd\n\u{1b}[0m\u{1b}[2me\u{1b}[0m\n")
        );
    }
}
