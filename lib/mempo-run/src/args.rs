//! The options that all programs share.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::lock::Lock;
use crate::manifest::MANIFEST;
use crate::{input, log};

/// How a program goes about its work, whatever the work is.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub struct CommonArgs {
    /// Say nothing but warnings and errors
    #[arg(long, global = true)]
    pub quiet: bool,
    /// Form of the log on standard error
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Do not read inputs that stages wrote only to compare their SHA-256 with their manifests: sizes are still compared. For
    /// inputs of many gigabytes; what was made from them says so in its own manifest
    #[arg(long, global = true)]
    pub trust_inputs: bool,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people, and progress bars where there is a terminal.
    Text,
    /// One JSON object a line.
    Json,
}

impl CommonArgs {
    /// Sets up logging, progress and inputs for the rest of the process. The variable `RUST_LOG` filters more finely.
    pub fn init(&self) {
        log::init(self.quiet, self.log_format);
        if self.trust_inputs {
            input::trust_stages();
        }
    }
}

/// Where a stage writes, and which part of the work it does.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub struct StageArgs {
    /// Directory to write to; run the same command again to continue a run that was stopped
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub out: PathBuf,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Throw away what an earlier run of this stage left in --out
    #[arg(long)]
    #[serde(skip)]
    pub restart: bool,
    /// Which part of the work, where it can be cut.
    #[arg(skip)]
    #[serde(skip)]
    pub shard: Option<Shard>,
}

/// The same for a stage that works unit by unit, so that its work can be cut.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub struct ShardedStageArgs {
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
    /// Do part I of N of the work, from 0; all N write to the same --out and are read as one. `auto` takes both from a
    /// Slurm array, `auto/N` takes I from that or from an indexed Kubernetes job
    #[arg(long, value_name = "I/N")]
    #[serde(skip)]
    shard: Option<Shard>,
}

impl ShardedStageArgs {
    /// Where this shard, if it is one, writes.
    pub fn stage(&self) -> StageArgs {
        StageArgs { shard: self.shard, ..self.stage.clone() }
    }
}

impl StageArgs {
    /// Where the stage writes: `--out`, or the shard's folder inside it.
    pub(crate) fn dir(&self) -> PathBuf {
        self.shard.map_or_else(|| self.out.clone(), |shard| self.out.join(shard.folder()))
    }

    /// Refuses a directory that another process writes to, before inputs are read, which may take long.
    pub fn check_free(&self) -> anyhow::Result<()> {
        Lock::probe(&self.dir())
    }

    /// Whether there is work to do, and not only a finished directory to look at: then inputs have to be all there.
    pub fn has_work(&self) -> bool {
        self.restart || !self.dir().join(MANIFEST).exists()
    }
}

/// Part `index` of `count` parts of a stage's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shard {
    /// Which part, from 0.
    pub index: usize,
    /// How many parts there are.
    pub count: usize,
}

impl Shard {
    /// The folder inside the stage's directory that the shard writes to.
    pub(crate) fn folder(self) -> String {
        format!("shard-{}-of-{}", self.index, self.count)
    }

    /// The shard that writes to a folder of this name.
    pub(crate) fn of_folder(name: &str) -> Option<Self> {
        let (index, count) = name.strip_prefix("shard-")?.split_once("-of-")?;
        let shard = Self { index: index.parse().ok()?, count: count.parse().ok()? };
        (shard.index < shard.count && shard.folder() == name).then_some(shard)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_shard(text, |name| std::env::var(name).ok())
    }
}

fn parse_shard(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Shard, String> {
    let (index, count) = text.split_once('/').unwrap_or((text, "auto"));
    let number = |name: &str| variable(name)?.parse::<usize>().ok();
    let index_here = || match number("SLURM_ARRAY_TASK_ID") {
        Some(task) => task.checked_sub(number("SLURM_ARRAY_TASK_MIN").unwrap_or(0)),
        None => number("JOB_COMPLETION_INDEX"),
    };
    let index = if index == "auto" {
        index_here().ok_or("no SLURM_ARRAY_TASK_ID and no JOB_COMPLETION_INDEX in the environment: give I/N")?
    } else {
        index.parse().map_err(|_| WANTED)?
    };
    let count = match count {
        "auto" if text == "auto" => number("SLURM_ARRAY_TASK_COUNT").ok_or("no SLURM_ARRAY_TASK_COUNT: give auto/N")?,
        count => count.parse().map_err(|_| WANTED)?,
    };
    if index < count { Ok(Shard { index, count }) } else { Err(WANTED.to_owned()) }
}

const WANTED: &str = "expected I/N with I from 0 to N-1, such as 0/4";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_parsed_and_named() {
        let shard = Shard { index: 3, count: 12 };
        assert_eq!("3/12".parse(), Ok(shard));
        assert_eq!(shard.to_string(), "3/12");
        assert_eq!(Shard::of_folder(&shard.folder()), Some(shard));
        for wrong in ["4/4", "1", "/", "-1/2", "a/b", "0/0", "1/2/3"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
        for wrong in ["shard-4-of-4", "shard-01-of-4", "shard-1", "other"] {
            assert_eq!(Shard::of_folder(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn schedulers_say_which_shard_this_is() {
        let parse = |text: &str, environment: &[(&str, &str)]| {
            parse_shard(text, |name| Some(environment.iter().find(|(key, _)| *key == name)?.1.to_owned()))
        };
        let slurm = [("SLURM_ARRAY_TASK_ID", "5"), ("SLURM_ARRAY_TASK_MIN", "3"), ("SLURM_ARRAY_TASK_COUNT", "4")];
        let kubernetes = [("JOB_COMPLETION_INDEX", "1")];
        assert_eq!(parse("auto", &slurm), Ok(Shard { index: 2, count: 4 }));
        assert_eq!(parse("auto/8", &slurm), Ok(Shard { index: 2, count: 8 }));
        assert_eq!(parse("auto/8", &kubernetes), Ok(Shard { index: 1, count: 8 }));
        assert_eq!(parse("0/2", &slurm), Ok(Shard { index: 0, count: 2 }));
        assert!(parse("auto", &kubernetes).unwrap_err().contains("auto/N"));
        assert!(parse("auto/8", &[]).unwrap_err().contains("JOB_COMPLETION_INDEX"));
        assert!(parse("auto/2", &slurm).unwrap_err().contains("0 to N-1"));
        for wrong in ["3", "0/auto", "auto/auto", "x/auto"] {
            assert!(parse(wrong, &slurm).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_may_differ_between_runs_is_not_serialised() {
        let shard = Some(Shard { index: 0, count: 2 });
        let args = StageArgs { out: "x".into(), seed: 7, restart: true, shard };
        assert_eq!(serde_json::to_value(args).unwrap(), serde_json::json!({ "seed": 7 }));
    }
}
