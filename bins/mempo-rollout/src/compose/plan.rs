//! Which passages a document has, and in which order.

use std::collections::HashSet;

use anyhow::anyhow;
use mempo_run::seed_of;
use mempo_text::answer::normalize;

use super::library::Library;
use super::permutation::Permutation;

/// After so many passages in succession that do not fit, a document is taken as full.
const MISSES: usize = 16;
/// Share of the wanted tokens below which filler is taken, too, where the other passages are too long for what is left.
const NEARLY_FULL: f64 = 0.9;

/// What a document is made for.
pub(crate) struct Wanted<'a> {
    /// What its draws are told apart by: the same at every length.
    pub(crate) name: &'a str,
    pub(crate) seed: u64,
    /// Passages that tell the answers, and how deep each is to stand, from 0 to 1.
    pub(crate) gold: &'a [(u32, f64)],
    /// Others that the questions came with.
    pub(crate) given: &'a [u32],
    /// Answers that no passage drawn may hold.
    pub(crate) kept_out: &'a [String],
    /// Tokens that it may have.
    pub(crate) tokens: u64,
    /// Whether passages may come again once all are used.
    pub(crate) may_repeat: bool,
}

/// A document's passages in order.
#[derive(Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) passages: Vec<u32>,
    /// Of those drawn, how many are filler, and how many are there for another time.
    pub(crate) filler: u64,
    pub(crate) repeated: u64,
}

impl Plan {
    /// Draws passages until the document is as long as it may be, and puts the gold ones at their depths. The order of draws
    /// does not depend on the length, so what a shorter document has a longer one has, too, but for the last few.
    pub(crate) fn new(library: &mut Library, wanted: &Wanted<'_>) -> anyhow::Result<Self> {
        let mut draw = Draw::begin(library, wanted)?;
        let mut round = 0;
        while !draw.round(round)? {
            round += 1;
        }
        let Draw { drawn, filler, repeated, .. } = draw;
        Ok(Self { passages: arrange(library, wanted, &drawn)?, filler, repeated })
    }

    /// Refuses a document that is too short for the passages that have to be there.
    pub(crate) fn check_room(library: &mut Library, wanted: &Wanted<'_>) -> anyhow::Result<()> {
        Draw::begin(library, wanted).map(drop)
    }
}

/// What stands before a passage, by its place from 1.
pub(crate) fn heading(place: usize) -> String {
    format!("Document {place}:\n")
}

/// A document being filled.
struct Draw<'l, 'w> {
    library: &'l mut Library,
    wanted: &'w Wanted<'w>,
    excluded: HashSet<u32>,
    kept_out: Vec<String>,
    drawn: Vec<u32>,
    filler: u64,
    repeated: u64,
    /// Tokens so far.
    tokens: u64,
    /// Passages in succession that did not fit.
    misses: usize,
}

impl<'l, 'w> Draw<'l, 'w> {
    /// Begins with the passages that have to be there.
    fn begin(library: &'l mut Library, wanted: &'w Wanted<'w>) -> anyhow::Result<Self> {
        let drawn = wanted.given.to_vec();
        let excluded: HashSet<u32> = wanted.gold.iter().map(|(passage, _)| *passage).chain(drawn.clone()).collect();
        let kept_out = wanted.kept_out.iter().map(|answer| format!(" {} ", normalize(answer)));
        let closed = [" yes ", " no ", "  "];
        let kept_out = kept_out.filter(|answer| !closed.contains(&answer.as_str())).collect();
        let mut draw =
            Self { library, wanted, excluded, kept_out, drawn, filler: 0, repeated: 0, tokens: 0, misses: 0 };
        let needed: Vec<u32> = wanted.gold.iter().map(|(passage, _)| *passage).chain(draw.drawn.clone()).collect();
        for (passage, place) in needed.into_iter().zip(1..) {
            draw.tokens += draw.cost(passage, place)?;
        }
        if draw.tokens > wanted.tokens {
            let (name, found, limit) = (wanted.name, draw.tokens, wanted.tokens);
            return Err(anyhow!(
                "{name}: the passages that came with its questions have {found} tokens, more than --document-tokens {limit}"
            ));
        }
        Ok(draw)
    }

    fn cost(&mut self, passage: u32, place: usize) -> anyhow::Result<u64> {
        Ok(self.library.count(&heading(place)) + self.library.tokens(passage)?)
    }

    /// Goes through documents, then filler, in an order of this round; whether the document is full.
    fn round(&mut self, round: u64) -> anyhow::Result<bool> {
        let (before, mut too_long) = (self.drawn.len(), false);
        for range in [self.library.documents(), self.library.filler()].into_iter().filter(|range| !range.is_empty()) {
            self.misses = 0;
            let parts = ["passages", self.wanted.name, &round.to_string(), &range.start.to_string()];
            let order = Permutation::new(seed_of(self.wanted.seed, &parts), range.len());
            for number in order.iter() {
                self.offer(range.start + number as u32, round)?;
                if self.misses == MISSES {
                    break;
                }
            }
            too_long |= self.misses == MISSES;
            if too_long && self.tokens as f64 >= NEARLY_FULL * self.wanted.tokens as f64 {
                return Ok(true);
            }
        }
        let is_full = self.misses > 0 || self.tokens == self.wanted.tokens;
        let has_drawn = self.drawn.len() > before;
        match (is_full, self.wanted.may_repeat && has_drawn) {
            (false, true) => Ok(false),
            (false, false) if !too_long => Err(self.too_little()),
            _ if 2 * self.tokens < self.wanted.tokens => Err(self.too_long()),
            _ => Ok(true),
        }
    }

    /// Takes a passage if it may be there and fits.
    fn offer(&mut self, passage: u32, round: u64) -> anyhow::Result<()> {
        if self.excluded.contains(&passage) || self.holds_an_answer(passage)? {
            return Ok(());
        }
        let cost = self.cost(passage, self.wanted.gold.len() + self.drawn.len() + 1)?;
        if self.tokens + cost > self.wanted.tokens {
            self.misses += 1;
            return Ok(());
        }
        self.misses = 0;
        self.tokens += cost;
        self.drawn.push(passage);
        self.filler += u64::from(self.library.filler().contains(&passage));
        self.repeated += u64::from(round > 0);
        Ok(())
    }

    fn holds_an_answer(&self, passage: u32) -> anyhow::Result<bool> {
        if self.kept_out.is_empty() {
            return Ok(false);
        }
        let text = format!(" {} ", normalize(&self.library.text(passage)?));
        Ok(self.kept_out.iter().any(|answer| text.contains(answer)))
    }

    fn too_long(&self) -> anyhow::Error {
        anyhow!(
            "{}: its document has {} of --document-tokens {}, and the passages that are left are longer than the rest: cut those of \
             --documents, or give shorter ones with --filler",
            self.wanted.name,
            self.tokens,
            self.wanted.tokens
        )
    }

    fn too_little(&self) -> anyhow::Error {
        anyhow!(
            "{}: all passages that may be in its document have {} tokens together, too few for --document-tokens {}: give more \
             with --documents or --filler, or let them come again with --repeat-distractors",
            self.wanted.name,
            self.tokens,
            self.wanted.tokens
        )
    }
}

/// Shuffles what was drawn and puts each gold passage between two others, where the share of the rest that stands before it is
/// nearest to its depth.
fn arrange(library: &mut Library, wanted: &Wanted<'_>, drawn: &[u32]) -> anyhow::Result<Vec<u32>> {
    let parts = ["order", wanted.name, &wanted.tokens.to_string()];
    let order = Permutation::new(seed_of(wanted.seed, &parts), drawn.len());
    let mut gold = wanted.gold.to_vec();
    gold.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let mut rest = 0;
    for passage in drawn {
        rest += library.tokens(*passage)?;
    }
    let mut gold = gold.into_iter().peekable();
    let (mut passages, mut before) = (Vec::new(), 0.0);
    for number in order.iter() {
        let tokens = library.tokens(drawn[number])? as f64;
        while let Some((passage, _)) = gold.next_if(|(_, depth)| depth * rest as f64 <= before + tokens / 2.0) {
            passages.push(passage);
        }
        passages.push(drawn[number]);
        before += tokens;
    }
    passages.extend(gold.map(|(passage, _)| passage));
    Ok(passages)
}

#[cfg(test)]
mod tests {
    use super::super::library::testing::library;
    use super::*;

    const WANTED: Wanted<'static> = Wanted {
        name: "t-0000001",
        seed: 4,
        gold: &[(3, 0.5), (5, 0.02)],
        given: &[7],
        kept_out: &[],
        tokens: 1200,
        may_repeat: false,
    };

    fn texts(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("Number {i} says {}.", format!("word{} ", i * 31).repeat(1 + i % 7))).collect()
    }

    fn borrowed(texts: &[String]) -> Vec<&'static str> {
        texts.iter().map(|text| text.clone().leak() as &str).collect()
    }

    fn small(directory: &std::path::Path) -> Library {
        let (documents, filler) = (texts(60), texts(100).split_off(60));
        library(directory, &borrowed(&documents), &borrowed(&filler))
    }

    fn tokens(library: &mut Library, plan: &Plan) -> u64 {
        let passages = plan.passages.iter().enumerate();
        passages.map(|(place, passage)| library.count(&heading(place + 1)) + library.tokens(*passage).unwrap()).sum()
    }

    #[test]
    fn a_document_is_as_long_as_it_may_be_and_repeats_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut library = small(directory.path());
        let largest = (0..100).map(|passage| library.tokens(passage).unwrap()).max().unwrap() + 12;
        let mut shorter: HashSet<u32> = HashSet::new();
        for target in [200, 400, 800, 1200] {
            let plan = Plan::new(&mut library, &Wanted { tokens: target, ..WANTED }).unwrap();
            assert_eq!(plan, Plan::new(&mut library, &Wanted { tokens: target, ..WANTED }).unwrap());
            let tokens = tokens(&mut library, &plan);
            assert!(tokens <= target && tokens + largest > target, "{tokens} of {target}");
            let passages: HashSet<u32> = plan.passages.iter().copied().collect();
            assert_eq!(passages.len(), plan.passages.len(), "each once");
            assert!([3, 5, 7].iter().all(|passage| passages.contains(passage)));
            assert!(shorter.difference(&passages).count() <= 3, "longer documents hold the shorter ones'");
            shorter = passages;
        }
    }

    #[test]
    fn filler_and_then_repetition_are_the_last_resort() {
        let directory = tempfile::tempdir().unwrap();
        let mut library = small(directory.path());
        let every = Plan { passages: (0..100).collect(), filler: 40, repeated: 0 };
        let all = tokens(&mut library, &every);
        let few = Plan::new(&mut library, &WANTED).unwrap();
        assert_eq!((few.filler, few.repeated), (0, 0));
        let more = Plan::new(&mut library, &Wanted { tokens: all * 9 / 10, ..WANTED }).unwrap();
        assert!(more.filler > 10 && more.repeated == 0, "{more:?}");
        let error = Plan::new(&mut library, &Wanted { tokens: 3 * all, ..WANTED }).unwrap_err().to_string();
        assert!(error.contains("t-0000001") && error.contains("--repeat-distractors"), "{error}");
        let again = Plan::new(&mut library, &Wanted { tokens: 3 * all, may_repeat: true, ..WANTED }).unwrap();
        assert!(again.repeated > 100 && again.filler > 80, "{again:?}");
        assert!([3, 5].iter().all(|gold| again.passages.iter().filter(|passage| *passage == gold).count() == 1));
        let error = Plan::new(&mut library, &Wanted { tokens: 20, ..WANTED }).unwrap_err().to_string();
        assert!(error.contains("more than --document-tokens 20"), "{error}");
    }

    #[test]
    fn passages_too_long_for_what_is_left_give_way_to_filler() {
        let directory = tempfile::tempdir().unwrap();
        let long = "It says so. ".repeat(500);
        let documents: Vec<String> =
            (0..60).map(|i| if i < 8 { format!("Number {i}.") } else { format!("{i} {long}") }).collect();
        let filler: Vec<String> = (0..40).map(|i| format!("Chapter {i} says this and that.")).collect();
        let mut both = library(&directory.path().join("filled"), &borrowed(&documents), &borrowed(&filler));
        let wanted = Wanted { tokens: 300, ..WANTED };
        let plan = Plan::new(&mut both, &wanted).unwrap();
        assert!(plan.filler > 5 && tokens(&mut both, &plan) > 270, "{plan:?}");
        // Filler that comes to an end leaves it as full as it is; where it may come again, it does.
        let some = Wanted { tokens: 1100, ..WANTED };
        let plan = Plan::new(&mut both, &some).unwrap();
        assert!(plan.filler == 40 && tokens(&mut both, &plan) > 550, "{plan:?}");
        let again = Plan::new(&mut both, &Wanted { may_repeat: true, ..some }).unwrap();
        assert!(again.repeated > 5 && tokens(&mut both, &again) > 990, "{again:?}");
        let mut alone = library(&directory.path().join("alone"), &borrowed(&documents), &[]);
        let error = Plan::new(&mut alone, &wanted).unwrap_err().to_string();
        assert!(error.contains("of --document-tokens 300") && error.contains("--filler"), "{error}");
    }

    #[test]
    fn answers_can_be_kept_out_of_what_is_drawn() {
        let directory = tempfile::tempdir().unwrap();
        let mut library = small(directory.path());
        let kept_out = ["the Number 11".to_owned(), "yes".to_owned(), "says".repeat(2)];
        let wanted = Wanted { kept_out: &kept_out, tokens: 100_000, may_repeat: true, ..WANTED };
        let plan = Plan::new(&mut library, &wanted).unwrap();
        assert!(!plan.passages.contains(&11) && plan.passages.contains(&12) && plan.passages.contains(&1));
        let everything = ["says".to_owned()];
        let error = Plan::new(&mut library, &Wanted { kept_out: &everything, ..wanted }).unwrap_err();
        assert!(error.to_string().contains("too few"), "{error}");
    }

    #[test]
    fn gold_passages_stand_where_they_are_to() {
        let directory = tempfile::tempdir().unwrap();
        let mut library = small(directory.path());
        for depth in [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0] {
            let gold = [(3, depth), (5, 1.0 - depth)];
            let plan = Plan::new(&mut library, &Wanted { gold: &gold, ..WANTED }).unwrap();
            let rest: Vec<u32> = plan.passages.iter().filter(|passage| ![3, 5].contains(*passage)).copied().collect();
            let mut tokens = |passages: &[u32]| -> f64 {
                passages.iter().map(|passage| library.tokens(*passage).unwrap() as f64).sum()
            };
            let (all, longest) = (tokens(&rest), rest.iter().map(|passage| tokens(&[*passage])).fold(0.0, f64::max));
            for (passage, depth) in gold {
                let place = plan.passages.iter().position(|other| *other == passage).unwrap();
                let before: Vec<u32> =
                    plan.passages[..place].iter().filter(|passage| ![3, 5].contains(*passage)).copied().collect();
                let off = (tokens(&before) - depth * all).abs();
                assert!(off <= longest / 2.0 + 1e-9, "{depth}: {off} of {all}");
            }
        }
    }
}
