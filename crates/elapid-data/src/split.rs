//! The split of documents into training and validation.
//!
//! Whole documents are held out, chosen by a hash of their content, so that copies of one document never
//! lie on both sides and the choice hardly changes when documents are added. Where whole documents do not
//! do, as with a single one, the longest document is split by position and its end is held out.

use std::collections::BTreeMap;
use std::ops::Range;

use elapid_tensor::rng;

use crate::{Documents, Error, Result};

/// A stretch of one document. Nothing outside it is read, not even as a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Index of the document.
    pub document: usize,
    /// Bytes of the document.
    pub bytes: Range<usize>,
}

impl Span {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if there is no byte.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes themselves.
    pub fn of<'a>(&self, documents: &'a Documents) -> &'a [u8] {
        &documents.get(self.document)[self.bytes.clone()]
    }
}

/// How to split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitOptions {
    /// Share of the bytes that is held out for validation, `0 <= fraction < 1`.
    pub fraction: f64,
    /// Chooses the documents.
    pub seed: u64,
}

/// Training and validation spans, both in document order; together they cover every byte once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// What is trained on.
    pub train: Vec<Span>,
    /// What is held out.
    pub validation: Vec<Span>,
}

/// Random draws of this module.
const STREAM: u64 = 0x0073_706c_6974;

impl Split {
    /// Every document whole, for data that comes split already.
    pub fn whole(documents: &Documents) -> Vec<Span> {
        (0..documents.len())
            .map(|document| Span { document, bytes: 0..documents.get(document).len() })
            .collect()
    }

    /// Holds out `fraction` of the bytes.
    ///
    /// In the order of their seeded hash, documents go to validation as long as they fit in
    /// `fraction` of all bytes. If that gives less than half of it, the shortest other document goes too,
    /// provided that it has at most twice the bytes wanted; if none has, the end of the longest document
    /// makes up the rest. Equal documents are treated alike.
    ///
    /// # Errors
    /// A fraction outside `[0, 1)`; no document of two bytes or more on one of the sides.
    pub fn new(documents: &Documents, options: SplitOptions) -> Result<Self> {
        let fraction = options.fraction;
        if !(0.0..1.0).contains(&fraction) {
            return Err(Error::option("validation fraction", "0 <= fraction < 1", fraction));
        }
        let whole = Self::whole(documents);
        let split = if fraction == 0.0 {
            Self { train: whole, validation: Vec::new() }
        } else {
            Self::hold_out(documents, whole, options)
        };
        split.check("training", &split.train)?;
        if fraction > 0.0 {
            split.check("validation", &split.validation)?;
        }
        Ok(split)
    }

    fn hold_out(documents: &Documents, whole: Vec<Span>, options: SplitOptions) -> Self {
        let mut groups: BTreeMap<u64, Group> = BTreeMap::new();
        for span in &whole {
            let hash = documents.hash(span.document);
            let [a, b, ..] = rng::draw(options.seed, STREAM, hash, 0);
            let group = groups.entry(u64::from(a) << 32 | u64::from(b)).or_default();
            group.documents.push(span.document);
            group.bytes += span.len() as u64;
        }
        let mut groups: Vec<Group> = groups.into_values().collect();
        let wanted = (documents.bytes() as f64 * options.fraction).round() as u64;
        let mut held = 0;
        for group in &mut groups {
            if held + group.bytes <= wanted {
                held += group.bytes;
                group.held = true;
            }
        }
        // Bytes to take from the end of each document of the longest group that is trained on.
        let mut tails = vec![0; documents.len()];
        if held * 2 < wanted.max(1) {
            let several = groups.iter().filter(|group| !group.held).count() > 1;
            let others = groups.iter_mut().filter(|group| !group.held);
            match others.min_by_key(|group| group.bytes) {
                Some(shortest) if several && shortest.bytes <= 2 * wanted => shortest.held = true,
                _ => {
                    let others = groups.iter().filter(|group| !group.held);
                    let length = |group: &&Group| group.bytes / group.documents.len() as u64;
                    if let Some(longest) = others.max_by_key(length) {
                        let tail = (wanted - held) as usize / longest.documents.len();
                        longest
                            .documents
                            .iter()
                            .for_each(|&document| tails[document] = tail.max(2));
                    }
                }
            }
        }
        let mut whole_held = vec![false; documents.len()];
        for document in groups.iter().filter(|group| group.held).flat_map(|group| &group.documents)
        {
            whole_held[*document] = true;
        }
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for Span { document, bytes } in whole {
            // Two bytes stay on the training side: one to read and one to predict.
            let cut = match whole_held[document] {
                true => bytes.start,
                false => bytes.end - tails[document].min(bytes.len().saturating_sub(2)),
            };
            train.push(Span { document, bytes: bytes.start..cut });
            validation.push(Span { document, bytes: cut..bytes.end });
        }
        train.retain(|span| !span.is_empty());
        validation.retain(|span| !span.is_empty());
        Self { train, validation }
    }

    fn check(&self, part: &'static str, spans: &[Span]) -> Result<()> {
        if spans.iter().any(|span| span.len() >= 2) {
            return Ok(());
        }
        let bytes = spans.iter().map(|span| span.len() as u64).sum();
        Err(Error::TooSmall { part, documents: spans.len(), bytes })
    }
}

/// Documents of one content.
#[derive(Default)]
struct Group {
    documents: Vec<usize>,
    bytes: u64,
    held: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn covered(documents: &Documents, split: &Split) -> bool {
        let mut count: Vec<Vec<u8>> = documents.iter().map(|d| vec![0; d.len()]).collect();
        for span in split.train.iter().chain(&split.validation) {
            count[span.document][span.bytes.clone()].iter_mut().for_each(|c| *c += 1);
        }
        count.iter().flatten().all(|&c| c == 1)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_overlap_and_nothing_lost(
            lengths in prop::collection::vec(0usize..200, 1..20),
            fraction in 0.0f64..0.9,
            seed in any::<u64>(),
            copies in any::<bool>(),
        ) {
            let fill = |i: usize| if copies { 1 } else { i as u8 };
            let data = lengths.iter().enumerate().map(|(i, &n)| vec![fill(i); n]);
            let documents = Documents::from_memory(data);
            let options = SplitOptions { fraction, seed };
            match Split::new(&documents, options) {
                Ok(split) => {
                    prop_assert!(covered(&documents, &split));
                    prop_assert_eq!(&split, &Split::new(&documents, options).unwrap());
                    // By document, with at most one that is cut, and close to what was asked for.
                    let cut = |span: &&Span| span.len() < documents.get(span.document).len();
                    if !copies {
                        prop_assert!(split.validation.iter().filter(cut).count() <= 1);
                    }
                    let held: u64 = split.validation.iter().map(|s| s.len() as u64).sum();
                    let wanted = documents.bytes() as f64 * fraction;
                    let slack = 2.0 * documents.len() as f64;
                    prop_assert!(held as f64 <= 2.5 * wanted + slack, "{} of {}", held, wanted);
                    prop_assert!(held as f64 >= 0.5 * wanted - slack || copies, "{} of {}", held, wanted);
                }
                Err(error) => prop_assert!(matches!(error, Error::TooSmall { .. }), "{}", error),
            }
        }
    }

    #[test]
    fn equal_documents_stay_together() {
        let data = (0..40u8).map(|i| vec![i % 20; 100]);
        let documents = Documents::from_memory(data);
        for seed in 0..20 {
            let split = Split::new(&documents, SplitOptions { fraction: 0.3, seed }).unwrap();
            assert!(!split.validation.is_empty());
            for span in &split.validation {
                let twin = (span.document + 20) % 40;
                assert!(split.validation.iter().any(|other| other.document == twin));
            }
        }
    }

    #[test]
    fn the_seed_chooses() {
        let documents = Documents::from_memory((0..50u8).map(|i| vec![i; 100]));
        let split = |seed| Split::new(&documents, SplitOptions { fraction: 0.1, seed }).unwrap();
        assert_eq!(split(1), split(1));
        assert_ne!(split(1), split(2));
        assert_eq!(split(1).validation.len(), 5);
    }

    #[test]
    fn a_single_document_splits_by_position() {
        let documents = Documents::from_memory([(0..100).collect::<Vec<u8>>()]);
        let split = Split::new(&documents, SplitOptions { fraction: 0.1, seed: 0 }).unwrap();
        assert_eq!(split.train, [Span { document: 0, bytes: 0..90 }]);
        assert_eq!(split.validation, [Span { document: 0, bytes: 90..100 }]);
    }

    #[test]
    fn a_small_document_beside_a_large_one_is_not_enough() {
        let data = [vec![1u8; 10_000], vec![2; 30]];
        let documents = Documents::from_memory(data);
        let split = Split::new(&documents, SplitOptions { fraction: 0.1, seed: 0 }).unwrap();
        assert_eq!(split.train, [Span { document: 0, bytes: 0..9027 }]);
        assert_eq!(split.validation.iter().map(Span::len).sum::<usize>(), 1003);
        // Two equal ones: a tenth of one, not half of all.
        let documents = Documents::from_memory([vec![1u8; 100], vec![2; 100]]);
        let split = Split::new(&documents, SplitOptions { fraction: 0.1, seed: 0 }).unwrap();
        assert_eq!(split.validation.iter().map(Span::len).sum::<usize>(), 20);
        // Seven equal ones: one whole.
        let documents = Documents::from_memory((0..7).map(|i| vec![i; 100]));
        let split = Split::new(&documents, SplitOptions { fraction: 0.1, seed: 0 }).unwrap();
        assert_eq!((split.validation.len(), split.validation[0].len()), (1, 100));
    }

    #[test]
    fn what_is_too_small_or_out_of_range_is_refused() {
        let one = |n: usize| Documents::from_memory([vec![0; n]]);
        let options = SplitOptions { fraction: 0.5, seed: 0 };
        for n in 1..4 {
            assert!(matches!(Split::new(&one(n), options), Err(Error::TooSmall { .. })), "{n}");
        }
        assert!(Split::new(&one(4), options).is_ok());
        for fraction in [-0.1, 1.0, f64::NAN] {
            let options = SplitOptions { fraction, seed: 0 };
            assert!(matches!(Split::new(&one(9), options), Err(Error::Option { .. })));
        }
        let split = Split::new(&one(9), SplitOptions { fraction: 0.0, seed: 0 }).unwrap();
        assert!(split.validation.is_empty());
    }
}
