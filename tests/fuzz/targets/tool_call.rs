//! What a policy writes between `<tool_call>` and `</tool_call>`; what is read can be written and read again.
#![no_main]

use mempo_text::ToolCall;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(call) = ToolCall::parse(text) else { return };
    let written = call.render();
    let inside = written.strip_prefix("<tool_call>").and_then(|rest| rest.strip_suffix("</tool_call>"));
    assert_eq!(ToolCall::parse(inside.expect("tags stand around the call")).expect("our own form"), call);
});
