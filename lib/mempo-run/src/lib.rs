//! A stage's directory and a program's manners: the commit protocol, manifests, resume, seeds, progress, logs, exit
//! codes. The only crate that prints.
//!
//! A subcommand names its [`Input`]s, opens its [`Stage`], writes the parts that are not there yet and finishes:
//!
//! ```
//! use mempo_run::{Stage, StageArgs};
//! # fn main() -> anyhow::Result<()> {
//! # let folder = tempfile::tempdir()?;
//! let args = StageArgs { out: folder.path().join("out"), seed: 1, restart: false, shard: None };
//! let arguments = serde_json::json!({ "objectives": 2 });
//! let stage = Stage::open("mempo-example", "numbers", &args, &arguments, &[])?.expect("new");
//! for unit in stage.shard_range(3) {
//!     stage.check_interrupt()?;
//!     if !stage.has_part("numbers", unit) {
//!         stage.write_part("numbers", unit, |sink| Ok(std::io::Write::write_all(sink, b"7")?))?;
//!     }
//! }
//! stage.finish(&[("numbers", 3)], serde_json::json!({ "sum": 21 }))?;
//!
//! let again = Stage::open("mempo-example", "numbers", &args, &arguments, &[])?;
//! assert!(again.is_none(), "it is finished");
//! # Ok(())
//! # }
//! ```

mod args;
mod check;
mod difference;
mod digest;
mod durable;
mod failure;
mod input;
mod interrupt;
mod lock;
mod log;
mod manifest;
mod metrics;
mod output;
mod overview;
mod progress;
mod stage;
mod standard;
mod status;
mod tensorboard;
mod thin;

pub use args::{CommonArgs, LogFormat, Shard, ShardedStageArgs, StageArgs};
pub use check::{finished, is_under_way, verify};
pub use digest::seed_of;
pub use durable::cannot_write;
pub use failure::{Failure, ResultExt, exit_code, main};
pub use input::Input;
pub use interrupt::check as check_interrupt;
pub use manifest::{FileRecord, InputRecord, Manifest, Run};
pub use metrics::MetricsFile;
pub use output::{print_data, print_table};
pub use overview::{blocks, overview};
pub use progress::Progress;
pub use stage::Stage;
pub use standard::StandardCommand;
pub use thin::thin;
