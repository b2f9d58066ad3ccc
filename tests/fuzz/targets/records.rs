//! A line of training data.
#![no_main]

libfuzzer_sys::fuzz_target!(|line: &[u8]| {
    let _ = mempo_sft::record::parse_record(line, mempo_sft::record::InputFormat::Auto);
});
