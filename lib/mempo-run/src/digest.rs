//! SHA-256 of files, of sets of files, and the seeds derived from it.

use std::{io::Read, path::Path};

use sha2::{Digest, Sha256};

/// Size and lower-case hexadecimal SHA-256 of a file.
pub(crate) fn of_file(path: &Path) -> std::io::Result<(u64, String)> {
    check_plain(path)?;
    let mut file = fs_err::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((size, hex(hasher))),
            length => {
                hasher.update(&buffer[..length]);
                size += length as u64;
            }
        }
    }
}

/// Refuses what is no plain file: a pipe would be waited for, a device read without an end.
pub(crate) fn check_plain(path: &Path) -> std::io::Result<()> {
    if fs_err::metadata(path)?.is_file() {
        return Ok(());
    }
    let message = format!("{}: not a plain file; write its content to one first", path.display());
    Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message))
}

/// SHA-256 of bytes.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}

/// One digest for a set of named files: SHA-256 over the sorted (name, SHA-256) pairs, one `name NUL digest LF` each.
pub(crate) fn of_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut pairs: Vec<_> = pairs.into_iter().collect();
    pairs.sort_unstable();
    let mut hasher = Sha256::new();
    for (name, digest) in pairs {
        for piece in [name, "\0", digest, "\n"] {
            hasher.update(piece);
        }
    }
    hex(hasher)
}

/// A seed for the work item that `parts` name: a keyed hash, so that no item's draws depend on another's.
pub fn seed_of(seed: u64, parts: &[&str]) -> u64 {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let digest = hasher.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}

fn hex(hasher: Sha256) -> String {
    format!("{:x}", hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs_err::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_file(&path).unwrap(), (3, expected.to_owned()));
        assert_eq!(of_bytes(b"abc"), expected);
    }

    #[test]
    fn order_of_files_does_not_matter_but_names_do() {
        let pairs = of_pairs([("a", "1"), ("b", "2")]);
        assert_eq!(pairs, of_pairs([("b", "2"), ("a", "1")]));
        assert_ne!(pairs, of_pairs([("a", "2"), ("b", "1")]));
    }

    #[test]
    fn seeds_differ_by_every_part_and_by_where_parts_end() {
        // Independent: python3 -c "import hashlib; ..." over the same bytes.
        assert_eq!(seed_of(0, &[]), u64::from_le_bytes([0xaf, 0x55, 0x70, 0xf5, 0xa1, 0x81, 0x0b, 0x7a]));
        let seeds = [
            seed_of(0, &["ab", "c"]),
            seed_of(0, &["a", "bc"]),
            seed_of(0, &["abc"]),
            seed_of(0, &["abc", ""]),
            seed_of(1, &["abc"]),
        ];
        for (index, seed) in seeds.iter().enumerate() {
            assert!(!seeds[..index].contains(seed));
        }
    }
}
