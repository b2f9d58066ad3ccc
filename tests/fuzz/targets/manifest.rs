//! The two files that tell what a stage did, with any content.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder").keep());

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    for name in ["manifest.json", "run.json"] {
        fs_err::write(FOLDER.join(name), json).expect("there is room");
        drop((mempo_run::verify(&FOLDER), mempo_run::is_under_way(&FOLDER)));
        fs_err::remove_file(FOLDER.join(name)).expect("it was written");
    }
});
