//! TensorBoard's event file: a record a step, in the form that `tf.summary.scalar` had first.
//!
//! A record is its length, the CRC of the length, a protobuf `Event`, the CRC of that (tensorflow/core/lib/io/record_writer).

use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use fs_err::File;
use serde_json::Value;

/// The folder of event files in a stage's directory; no part of its result, as it holds times.
pub(crate) const FOLDER: &str = "tensorboard";

/// An event file that is written from its beginning.
#[derive(Debug)]
pub(crate) struct EventFile {
    file: File,
}

impl EventFile {
    /// Writes `DIR/tensorboard` anew, with what is known so far.
    pub(crate) fn create(dir: &Path, lines: &[Value]) -> anyhow::Result<Self> {
        let folder = dir.join(FOLDER);
        fs_err::create_dir_all(&folder)?;
        let file = File::create(folder.join("events.out.tfevents.0000000000.mempo"))?;
        let mut events = Self { file };
        // The first record says the version.
        events.write(&[field(1, now()), text(3, b"brain.Event:2")].concat())?;
        for line in lines {
            events.push(line)?;
        }
        Ok(events)
    }

    /// Every number of a line as a scalar, at its `global_step` or `step`.
    pub(crate) fn push(&mut self, line: &Value) -> anyhow::Result<()> {
        let Some(numbers) = line.as_object() else { return Ok(()) };
        let step = ["global_step", "step"].iter().find_map(|name| line[*name].as_u64()).unwrap_or(0);
        let scalar = |(name, value): (&String, &Value)| {
            let number = value.as_f64()? as f32;
            Some(text(1, &[text(1, name.as_bytes()), [&[(2 << 3) | 5], &number.to_le_bytes()[..]].concat()].concat()))
        };
        let summary: Vec<u8> = numbers.iter().filter_map(scalar).flatten().collect();
        self.write(&[field(1, now()), number(2, step), text(5, &summary)].concat())
    }

    fn write(&mut self, event: &[u8]) -> anyhow::Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked_crc(&length), event, &masked_crc(event)].concat();
        Ok(self.file.write_all(&record)?)
    }
}

/// Seconds since 1970, as a protobuf double.
fn now() -> [u8; 8] {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs_f64().to_le_bytes()
}

/// A field of eight bytes.
fn field(tag: u8, bytes: [u8; 8]) -> Vec<u8> {
    [&[(tag << 3) | 1], &bytes[..]].concat()
}

/// A whole number.
fn number(tag: u8, value: u64) -> Vec<u8> {
    [vec![tag << 3], varint(value)].concat()
}

/// Text, bytes or a message.
fn text(tag: u8, bytes: &[u8]) -> Vec<u8> {
    [vec![(tag << 3) | 2], varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// CRC-32C, turned and shifted as records have it.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c(bytes);
    (crc.rotate_right(15).wrapping_add(0xa282_ead8)).to_le_bytes()
}

/// Castagnoli's CRC, bit by bit: an event is some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn records_hold_what_they_say() {
        let folder = tempfile::tempdir().unwrap();
        let lines = [json!({ "step": 1, "global_step": 300, "loss": 0.5, "kl": null, "name": "x" })];
        EventFile::create(folder.path(), &lines).unwrap();
        let bytes = fs_err::read(folder.path().join("tensorboard/events.out.tfevents.0000000000.mempo")).unwrap();
        let mut records = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]));
            assert_eq!(rest[12 + length..16 + length], masked_crc(&rest[12..12 + length]));
            records.push(&rest[12..12 + length]);
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"brain.Event:2"));
        // Field 2, 300 as a varint.
        assert_eq!(records[1][9..12], [0x10, 0xac, 0x02]);
        let loss = [&b"\x0a\x04loss\x15"[..], &0.5_f32.to_le_bytes()].concat();
        assert!(records[1].windows(loss.len()).any(|part| part == loss));
        assert!(!records[1].windows(2).any(|part| part == b"kl"));
    }
}
