//! Memories gone wrong, as a small model writes them, and what a reader makes of one: supervision shows nothing of it otherwise,
//! and what a policy has not seen it carries on.

use crate::random::Random;
use crate::work::Memory;

const BETWEEN: &str = "; ";
const IS: &str = " = ";
/// Characters that a repetition comes to: up to about what fits into the longest step of the demo's readers.
const LEAST_REPEATED: usize = 20;
const MOST_REPEATED: usize = 260;

/// A memory with one thing wrong in it, tags included: an entry about another entity than was asked for, without a value,
/// under a garbled name, or twice; a wrong value under a right name; a memory that repeats itself or breaks off, without
/// its closing tag. `other` is a fact that nobody asked for.
pub(crate) fn spoil(memory: &Memory, asked: &[&str], other: (&str, &str), random: &mut Random) -> String {
    let rendered = memory.render();
    let mut entries: Vec<String> =
        rendered.split(BETWEEN).filter(|entry| !entry.is_empty()).map(str::to_owned).collect();
    let (name, value) = other;
    let mention = *random.pick(asked);
    let place = random.below(entries.len() + 1);
    let foreign = format!("{name}{IS}{value}");
    let last = entries.last().unwrap_or(&foreign).clone();
    match random.below(7) {
        0 => entries.insert(place, foreign),
        1 => entries.insert(place, name.to_owned()),
        2 => entries.insert(place, format!("{}{IS}{value}", spliced(name, mention, random))),
        3 => {
            entries.retain(|entry| !entry.starts_with(&format!("{mention}{IS}")));
            entries.insert(place.min(entries.len()), format!("{mention}{IS}{value}"));
        }
        4 => entries.push(last),
        5 => {
            let piece = runaway(&last, random);
            let text = [entries, vec![format!("{last}{piece}")]].concat().join(BETWEEN);
            return format!("<mem>{text}");
        }
        _ => {
            entries.insert(place, foreign);
            let text = entries.join(BETWEEN);
            return format!("<mem>{}", part(&text, random));
        }
    }
    format!("<mem>{}</mem>", entries.join(BETWEEN))
}

/// What a reader makes of a memory: its entries under names that were asked for, the first of each. One that breaks off is
/// none.
pub(crate) fn mend(text: &str, asked: &[&str]) -> Memory {
    let text = text.strip_prefix("<mem>").unwrap_or(text);
    let whole = text.strip_suffix("</mem>");
    let mut entries: Vec<&str> = whole.unwrap_or(text).split(BETWEEN).collect();
    if whole.is_none() {
        entries.pop();
    }
    let mut memory = Memory::default();
    for (name, value) in entries.iter().filter_map(|entry| entry.split_once(IS)) {
        if asked.contains(&name) && memory.answer(name).is_none() {
            memory.learn(name, value, true);
        }
    }
    memory
}

/// The beginning of one name and the end of another.
fn spliced(name: &str, mention: &str, random: &mut Random) -> String {
    let (from, rest) = (part(name, random), part(mention, random));
    format!("{from}{}", &mention[rest.len()..])
}

/// A beginning of a text, of any length.
fn part<'t>(text: &'t str, random: &mut Random) -> &'t str {
    &text[..text.floor_char_boundary(random.below(text.len() + 1))]
}

/// The end of an entry, or all of it, again and again.
fn runaway(entry: &str, random: &mut Random) -> String {
    let from = entry.floor_char_boundary(random.below(entry.len()));
    let piece = if random.chance(0.5) { entry[from..].to_owned() } else { format!("{BETWEEN}{entry}") };
    piece.chars().cycle().take(LEAST_REPEATED + random.below(MOST_REPEATED - LEAST_REPEATED)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mended_memory_holds_what_was_asked_for_and_is_whole() {
        for (text, expected) in [
            ("<mem>Peru = Lima; Chad = .td</mem>", "Peru = Lima; Chad = .td"),
            ("<mem>Benin = leopard; Peru = Lima</mem>", "Peru = Lima"),
            ("<mem>Benin; Peru = Lima</mem>", "Peru = Lima"),
            ("<mem>Benru = leopard; Chad = .td</mem>", "Chad = .td"),
            ("<mem>Peru = Lima; Peru = Paris; Peru = Lima</mem>", "Peru = Lima"),
            ("<mem>Peru = Lima; Peru = Lima; Pe", "Peru = Lima"),
            ("<mem>Chad = .td; Peru = Lima Lima Lima Lim", "Chad = .td"),
            ("<mem>", ""),
            ("<mem></mem>", ""),
        ] {
            assert_eq!(mend(text, &["Peru", "Chad"]).render(), expected, "{text}");
        }
    }

    #[test]
    fn memories_are_spoilt_in_every_way_and_none_is_as_it_was() {
        let mut memory = Memory::default();
        memory.learn("Perú", "Lima", true);
        let texts: Vec<String> =
            (0..500).map(|seed| spoil(&memory, &["Perú"], ("Benin", "leopard"), &mut Random::new(seed))).collect();
        assert!(texts.iter().all(|text| text.starts_with("<mem>") && text != "<mem>Perú = Lima</mem>"));
        for expected in [
            "<mem>Benin = leopard; Perú = Lima</mem>",
            "<mem>Perú = Lima; Benin = leopard</mem>",
            "<mem>Perú = Lima; Benin</mem>",
            "<mem>Beú = leopard; Perú = Lima</mem>",
            "<mem>Perú = leopard</mem>",
            "<mem>Perú = Lima; Perú = Lima</mem>",
            "<mem>Perú = Lima; Perú = Lima; Perú = Lima; Perú = Lima",
            "<mem>Perú = Lima; Perú = Limamama",
            "<mem>Perú = Lima; Beni",
        ] {
            assert!(texts.iter().any(|text| text.starts_with(expected)), "{expected}");
        }
    }
}
