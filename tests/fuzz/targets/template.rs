//! A chat template: it is refused, or writes some text, and does not take long.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use mempo_text::{ChatTemplate, Message};

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder").keep());

libfuzzer_sys::fuzz_target!(|source: &[u8]| {
    fs_err::write(FOLDER.join("chat_template.jinja"), source).expect("there is room");
    let Ok(template) = ChatTemplate::load(&FOLDER) else { return };
    let messages = ["system", "user", "assistant"].map(|role| Message::new(role, "<m> é"));
    let _ = template.render(messages.to_vec(), true);
});
