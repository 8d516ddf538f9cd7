//! The loader: what a batch holds, that an epoch is complete, and that a saved place is exact.

use std::collections::HashMap;

use elapid_data::{
    Batch, Documents, Error, IGNORE, Loader, LoaderOptions, Packer, Position, Prefetch, Span,
    Split, Validation, padding_rate,
};
use proptest::prelude::*;

/// Documents in which the byte at `t` of document `d` says which it is, as far as a byte can.
fn documents(lengths: &[usize]) -> Documents {
    let document = |(d, &n): (usize, &usize)| (0..n).map(|t| (d * 37 + t * 11) as u8).collect();
    Documents::from_memory(lengths.iter().enumerate().map(document))
}

fn loader(lengths: &[usize], options: LoaderOptions) -> Loader {
    let documents = documents(lengths);
    let spans = Split::whole(&documents);
    Loader::new(documents, spans, options).unwrap()
}

/// What every batch must satisfy.
fn check(batch: &Batch, options: &LoaderOptions) {
    assert_eq!(batch.ids.len(), batch.targets.len());
    assert_eq!(batch.ids.len(), batch.sequences.tokens());
    assert!(batch.tokens() <= options.batch_tokens);
    assert_eq!(batch.predicted, batch.targets.iter().filter(|&&t| t != IGNORE).count());
    let filler = usize::from(options.filler);
    let real = &batch.sequences.as_slice()[..batch.sequences.len() - filler];
    assert_eq!(batch.real_tokens, real.iter().map(|s| s.len).sum::<usize>());
    for sequence in real {
        assert!((1..=options.context).contains(&sequence.len));
        let (ids, targets) = (&batch.ids[sequence.tokens()], &batch.targets[sequence.tokens()]);
        for t in 1..ids.len() {
            assert_eq!(targets[t - 1], i64::from(ids[t]));
        }
    }
}

#[test]
fn equal_windows_make_batches_of_batch_size_windows() {
    let options = LoaderOptions { window: 1, ..LoaderOptions::new(4, 16) };
    let mut loader = loader(&[16 * 40 + 1], options);
    for _ in 0..10 {
        let batch = loader.next_batch().unwrap();
        check(&batch, &options);
        assert_eq!((batch.tokens(), batch.sequences.len(), batch.predicted), (64, 4, 64));
        assert!(batch.sequences.iter().all(|s| s.len == 16 && !s.continued && s.position == 0));
    }
    assert_eq!((loader.position().epoch, loader.epoch_tokens(), loader.epochs()), (0, 640, 1.0));
    assert_eq!(loader.padding_rate(), 0.0);
    loader.next_batch().unwrap();
    assert_eq!((loader.position().step, loader.position().epoch), (11, 1));
}

#[test]
fn the_last_token_of_a_window_predicts_the_next_byte_of_its_document() {
    let data: Vec<u8> = (0..10).collect();
    let documents = Documents::from_memory([data]);
    let spans = vec![Span { document: 0, bytes: 0..9 }];
    let options = LoaderOptions { window: 1, ..LoaderOptions::new(1, 4) };
    let mut loader = Loader::new(documents, spans, options).unwrap();
    let mut seen: Vec<(Vec<u32>, Vec<i64>)> = (0..2)
        .map(|_| loader.next_batch().map(|batch| (batch.ids, batch.targets)).unwrap())
        .collect();
    seen.sort();
    // Byte 8 is predicted by the second window; it alone would predict nothing, since 9 is not ours.
    assert_eq!(seen[0], (vec![0, 1, 2, 3], vec![1, 2, 3, 4]));
    assert_eq!(seen[1], (vec![4, 5, 6, 7], vec![5, 6, 7, 8]));
    let documents = Documents::from_memory([vec![1, 2, 3]]);
    let spans = Split::whole(&documents);
    let mut loader = Loader::new(documents, spans, LoaderOptions::new(1, 4)).unwrap();
    assert_eq!(loader.next_batch().unwrap().targets, [2, 3, IGNORE]);
}

/// Ids of the sequences of batches and how often each came.
fn counts<'a>(batches: impl IntoIterator<Item = &'a Batch>) -> HashMap<u64, usize> {
    let mut counts = HashMap::new();
    for batch in batches {
        for sequence in batch.sequences.iter().filter(|s| s.id != u64::MAX) {
            *counts.entry(sequence.id).or_default() += 1;
        }
    }
    counts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn seeking_continues_exactly(
        lengths in prop::collection::vec(1usize..60, 2..12),
        (batch_size, context) in (1usize..5, 1usize..20),
        window in 1usize..9,
        carry_state in any::<bool>(),
        filler in any::<bool>(),
        seed in any::<u64>(),
        steps in 0usize..30,
    ) {
        prop_assume!(lengths.iter().any(|&n| n > 1));
        let options =
            LoaderOptions { window, carry_state, filler, seed, ..LoaderOptions::new(batch_size, context) };
        let mut straight = loader(&lengths, options);
        for _ in 0..steps {
            check(&straight.next_batch().unwrap(), &options);
        }
        let saved = serde_json::to_string(straight.position()).unwrap();
        let position: Position = serde_json::from_str(&saved).unwrap();
        prop_assert_eq!(&position, straight.position());
        let mut resumed = loader(&lengths, options);
        resumed.seek(&position).unwrap();
        for _ in 0..12 {
            let batch = straight.next_batch().unwrap();
            if filler {
                prop_assert_eq!(batch.tokens(), options.batch_tokens);
            }
            prop_assert_eq!(batch, resumed.next_batch().unwrap());
        }
        prop_assert_eq!(straight.position(), resumed.position());
        prop_assert_eq!(straight.padding_rate(), resumed.padding_rate());
    }

    #[test]
    fn every_window_comes_once_an_epoch(
        lengths in prop::collection::vec(2usize..60, 1..12),
        context in 2usize..20,
        window in 1usize..9,
    ) {
        let options = LoaderOptions { window, ..LoaderOptions::new(3, context) };
        let mut loader = loader(&lengths, options);
        let windows: usize = lengths.iter().map(|n| (n - 1).div_ceil(context)).sum();
        let mut batches = Vec::new();
        while loader.position().epoch < 3 {
            batches.push(loader.next_batch().unwrap());
        }
        let counts = counts(&batches);
        prop_assert!(counts.values().all(|&count| count == 1), "{:?}", counts);
        // Epochs 0 to 2 were drawn; only what waits in the buffer may be missing from 0 and 1.
        let done = (0..2 * windows as u64).filter(|id| counts.contains_key(id)).count();
        prop_assert!(done + window >= 2 * windows, "{} of {}", done, 2 * windows);
        let tokens: usize = batches.iter().map(|batch| batch.real_tokens).sum();
        prop_assert_eq!(loader.epochs(), tokens as f64 / loader.epoch_tokens() as f64);
        let expected = 1.0 - tokens as f64 / (batches.len() * options.batch_tokens) as f64;
        prop_assert!((loader.padding_rate() - expected).abs() < 1e-12);
    }

    #[test]
    fn a_carried_slot_reads_consecutive_windows(
        lengths in prop::collection::vec(2usize..200, 1..6),
        (slots, context) in (1usize..5, 1usize..20),
    ) {
        let options = LoaderOptions { carry_state: true, ..LoaderOptions::new(slots, context) };
        let mut loader = loader(&lengths, options);
        // By slot: the sequence that it reads, the position it should reach next, the byte expected there.
        let mut open: HashMap<usize, (u64, u64, i64)> = HashMap::new();
        for _ in 0..60 {
            let batch = loader.next_batch().unwrap();
            check(&batch, &options);
            prop_assert_eq!((batch.sequences.len(), batch.sequences.slots()), (slots, slots));
            for sequence in &batch.sequences {
                let first = i64::from(batch.ids[sequence.start]);
                if sequence.continued {
                    prop_assert_eq!(open.get(&sequence.slot), Some(&(sequence.id, sequence.position, first)));
                } else {
                    prop_assert_eq!(sequence.position, 0);
                }
                let next = sequence.position + sequence.len as u64;
                let target = batch.targets[sequence.start + sequence.len - 1];
                open.insert(sequence.slot, (sequence.id, next, target));
            }
        }
    }
}

#[test]
fn carried_epochs_cover_every_byte() {
    let options = LoaderOptions { carry_state: true, ..LoaderOptions::new(3, 8) };
    let mut loader = loader(&[100, 3, 50, 9], options);
    let mut predicted = HashMap::new();
    while loader.position().epoch < 2 {
        let batch = loader.next_batch().unwrap();
        for sequence in &batch.sequences {
            let count = batch.targets[sequence.tokens()].iter().filter(|&&t| t != IGNORE).count();
            *predicted.entry(sequence.id).or_insert(0) += count;
        }
    }
    // 13 + 1 + 7 + 1 windows in runs of 8: ids 0 to 4 in epoch 0, one target a byte but the documents' first.
    let epoch: usize = (0..5).map(|id| predicted[&id]).sum();
    assert_eq!(epoch, 99 + 2 + 49 + 8);
}

#[test]
fn the_seed_fixes_the_order_and_epochs_differ() {
    let stream = |seed: u64| -> Vec<Batch> {
        let mut loader = loader(&[2001], LoaderOptions { seed, ..LoaderOptions::new(2, 20) });
        (0..100).map(|_| loader.next_batch().unwrap()).collect()
    };
    assert_eq!(stream(1), stream(1));
    assert_ne!(stream(1), stream(2));
    let batches = stream(1);
    let ids = |batches: &[Batch]| batches.iter().map(|b| b.ids.clone()).collect::<Vec<_>>();
    assert_ne!(ids(&batches[..50]), ids(&batches[50..]));
}

#[test]
fn options_out_of_range_are_refused() {
    let documents = documents(&[100]);
    let spans = Split::whole(&documents);
    let good = LoaderOptions::new(2, 8);
    for options in [
        LoaderOptions { context: 0, ..good },
        LoaderOptions { batch_tokens: 7, ..good },
        LoaderOptions { window: 0, ..good },
        LoaderOptions::new(0, 8),
    ] {
        let error = Loader::new(documents.clone(), spans.clone(), options).unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{error}");
    }
    for spans in [vec![], vec![Span { document: 0, bytes: 5..6 }]] {
        let error = Loader::new(documents.clone(), spans, good).unwrap_err();
        assert!(matches!(error, Error::TooSmall { .. }), "{error}");
    }
}

#[test]
fn foreign_and_damaged_positions_are_refused() {
    let options = LoaderOptions { window: 3, ..LoaderOptions::new(2, 8) };
    let mut ours = loader(&[300, 20], options);
    ours.next_batch().unwrap();
    for other in [
        loader(&[301, 20], options),
        loader(&[300, 20], LoaderOptions { seed: 1, ..options }),
        loader(&[300, 20], LoaderOptions { context: 4, ..options }),
    ] {
        assert!(matches!(ours.seek(other.position()), Err(Error::OtherData { .. })));
    }
    let saved = serde_json::to_value(ours.position()).unwrap();
    let damage = |pointer: &str, value: u64| {
        let mut damaged = saved.clone();
        *damaged.pointer_mut(pointer).unwrap() = value.into();
        serde_json::from_value::<Position>(damaged).unwrap()
    };
    for position in [damage("/drawn", 1000), damage("/held/0/run", 99), damage("/held/1/done", 9)] {
        assert!(matches!(ours.seek(&position), Err(Error::BadPosition(_))));
    }
    let mut long = saved.clone();
    let held = long["held"].as_array_mut().unwrap();
    held.extend(vec![held[0].clone(); 5]);
    assert!(matches!(
        ours.seek(&serde_json::from_value(long).unwrap()),
        Err(Error::BadPosition(_))
    ));
    let before = ours.position().clone();
    ours.seek(&before).unwrap();
}

#[test]
fn prefetched_batches_are_the_loaders_with_their_positions() {
    let options = LoaderOptions::new(2, 16);
    let mut plain = loader(&[500, 90, 33], options);
    let mut ahead = Prefetch::loader(plain.clone(), 4).unwrap();
    for _ in 0..50 {
        let (batch, position) = ahead.next_item().unwrap().unwrap();
        assert_eq!(batch, plain.next_batch().unwrap());
        assert_eq!(&position, plain.position());
    }
}

#[test]
fn validation_reads_everything_in_order() {
    let documents = documents(&[50, 1, 17, 200]);
    let spans = Split::whole(&documents);
    let all = Validation::new(documents.clone(), spans.clone(), 16, 40, None).unwrap();
    let batches: Vec<Batch> = all.batches().map(Result::unwrap).collect();
    let predicted: usize = batches.iter().map(|batch| batch.predicted).sum();
    assert_eq!(predicted, 49 + 16 + 199);
    assert_eq!(all.predicted(), predicted as u64);
    let inputs: Vec<u8> = batches.iter().flat_map(|b| &b.ids).map(|&id| id as u8).collect();
    assert_eq!(inputs, all.windows().collect::<Vec<_>>().concat());
    let targets: Vec<u8> = batches
        .iter()
        .flat_map(|batch| &batch.targets)
        .filter(|&&target| target != IGNORE)
        .map(|&target| target as u8)
        .collect();
    let expected: Vec<u8> = all.texts().iter().flat_map(|text| text[1..].to_vec()).collect();
    assert_eq!(targets, expected);
    assert_eq!(all.texts()[2].len(), 200);
    assert!(batches.iter().all(|batch| batch.tokens() <= 40 && !batch.sequences.any_continued()));

    let some = Validation::new(documents.clone(), spans.clone(), 16, 16, Some(70)).unwrap();
    let tokens: usize = some.batches().map(|batch| batch.unwrap().tokens()).sum();
    assert_eq!(tokens, 50 + 16);
    assert_eq!(some.predicted(), 49 + 16);
    let first = Validation::new(documents.clone(), spans.clone(), 16, 16, Some(0)).unwrap();
    assert_eq!((first.batches().count(), first.predicted()), (1, 16));
    assert!(Validation::new(documents.clone(), spans.clone(), 0, 16, None).is_err());
    assert!(Validation::new(documents.clone(), spans, 16, 15, None).is_err());
    assert!(Validation::new(documents, vec![], 16, 16, None).is_err());
}

#[test]
fn a_packer_gives_what_it_was_given_back() {
    let mut packer = Packer::new(10, 4);
    let mut source = [(0, 4), (1, 6), (2, 3), (3, 9)].into_iter();
    assert_eq!(packer.next_pack(|| source.next()), Some(vec![(0, 4), (1, 6)]));
    let mut copy = Packer::new(10, 4);
    copy.restore(packer.buffer().to_vec());
    assert_eq!(packer, copy);
    assert_eq!(packer.next_pack(|| source.next()), Some(vec![(2, 3)]));
    assert_eq!(packer.next_pack(|| source.next()), Some(vec![(3, 9)]));
    assert_eq!(packer.next_pack(|| source.next()), None);
    assert_eq!(padding_rate(22, 3, 10), 1.0 - 22.0 / 30.0);
}
