//! The subcommands that every program has.

use std::path::PathBuf;

use anyhow::anyhow;
use clap_complete::Shell;

use crate::{ResultExt, check, print_data};

/// Subcommands that every program has; flatten it into the program's own.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum StandardCommand {
    /// Compare every file of a finished directory with its manifest
    Verify {
        /// Output of a stage, whole or in shards
        dir: PathBuf,
    },
    /// Print the columns of a table, or of all tables
    Schema {
        /// Name of the table
        table: Option<String>,
    },
    /// Print a completion script
    Completions {
        /// The shell it is for
        shell: Shell,
    },
}

impl StandardCommand {
    /// Runs the subcommand; `command` is the whole program's, for completions.
    pub fn run(&self, mut command: clap::Command) -> anyhow::Result<()> {
        match self {
            Self::Verify { dir } => {
                let manifest = check::verify(dir)?;
                let (gone, there): (Vec<_>, Vec<_>) = manifest.files.iter().partition(|file| file.removed);
                let bytes: u64 = there.iter().map(|file| file.size).sum();
                let removed = if gone.is_empty() { String::new() } else { format!("; {} removed since", gone.len()) };
                tracing::info!("{}: {} files, {bytes} bytes, as written{removed}", dir.display(), there.len());
            }
            Self::Schema { table } => print_data(&schema(table.as_deref())?),
            Self::Completions { shell } => {
                let name = command.get_name().to_owned();
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut command, name, &mut script);
                print_data(&String::from_utf8_lossy(&script));
            }
        }
        Ok(())
    }
}

fn schema(table: Option<&str>) -> anyhow::Result<String> {
    let tables = mempo_data::TABLES;
    match table {
        None => Ok(tables.iter().map(|table| mempo_data::schema_markdown(table)).collect::<Vec<_>>().join("\n")),
        Some(table) if tables.contains(&table) => Ok(mempo_data::schema_markdown(table)),
        Some(table) => Err(anyhow!("no table `{table}`, expected one of {}", tables.join(", "))).usage(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_prints_one_or_all_tables() {
        assert!(schema(Some("steps")).unwrap().starts_with("# steps\n"));
        let all = schema(None).unwrap();
        assert!(mempo_data::TABLES.iter().all(|table| all.contains(&format!("# {table}\n"))));
        assert_eq!(crate::exit_code(&schema(Some("stairs")).unwrap_err()), 2);
    }
}
