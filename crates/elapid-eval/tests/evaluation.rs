//! Perplexity and divergence on small random models, against plain loops.

use std::ops::ControlFlow;

use elapid_eval::{
    Document, Error, Options, Perplexity, Progress, Reading, kl_divergence, perplexity,
};
use elapid_infer::ModelRunner;
use elapid_models::{Context, LanguageModel, MambaConfig};
use elapid_tensor::{Sequences, Tensor};
use proptest::prelude::*;

const TEXT: &[u8] = b"It was a bright cold day in April, and the clocks were striking thirteen.\n";

fn model(seed: u64) -> LanguageModel {
    LanguageModel::new(&MambaConfig::bytes(24, 2), seed).unwrap()
}

fn silent(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// ln of the probabilities [V] after each of `ids`, by the definition in f64.
fn log_probabilities(model: &LanguageModel, ids: &[u32]) -> Vec<Vec<f64>> {
    let sequences = Sequences::fresh(&[ids.len()]);
    let ids = Tensor::from_slice(ids, [ids.len()]).unwrap();
    let (hidden, _) = model.hidden(&ids, &sequences, None, &mut Context::new()).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let view = logits.row_view::<f32>().unwrap();
    (0..hidden.dim(0))
        .map(|row| {
            let row = &view.row(row)[..model.config().vocab_size];
            let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            row.iter().map(|&logit| f64::from(logit) - total.ln()).collect()
        })
        .collect()
}

fn ids(text: &[u8]) -> Vec<u32> {
    text.iter().map(|&byte| u32::from(byte)).collect()
}

/// Sum of -ln p over every token of `ids` but the first, each predicted from the tokens of its window.
fn nats(model: &LanguageModel, ids: &[u32], reading: Reading) -> f64 {
    (1..ids.len())
        .map(|target| {
            let from = match reading {
                Reading::Carried => 0,
                // The first place of the window that reads the token before the target.
                Reading::Windows { window, stride } => {
                    (0..).map(|k| k * stride).find(|start| start + window >= target).unwrap()
                }
            };
            let after = log_probabilities(model, &ids[from..target]);
            -after.last().unwrap()[ids[target] as usize]
        })
        .sum()
}

fn evaluate(model: &LanguageModel, documents: &[Document<'_>], options: Options) -> Perplexity {
    perplexity(&mut ModelRunner::new(model), documents, &options, &mut silent).unwrap()
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{found} {expected}");
}

#[test]
fn as_a_plain_loop_over_the_tokens() {
    let model = model(1);
    let readings = [
        Reading::Carried,
        Reading::Windows { window: 16, stride: 5 },
        Reading::Windows { window: 16, stride: 16 },
        Reading::Windows { window: 1, stride: 1 },
        Reading::Windows { window: 1000, stride: 7 },
    ];
    for reading in readings {
        let found = evaluate(&model, &[Document::bytes(TEXT)], Options { reading, chunk: 40 });
        let predicted = TEXT.len() as f64 - 1.0;
        let ce = nats(&model, &ids(TEXT), reading) / predicted;
        close(found.cross_entropy, ce);
        close(found.token_perplexity, ce.exp());
        close(found.bits_per_byte.unwrap(), ce / 2f64.ln());
        close(found.word_perplexity.unwrap(), (ce * TEXT.len() as f64 / 14.0).exp());
        assert_eq!((found.documents, found.tokens, found.bytes), (1, 74, 74));
        assert_eq!((found.predicted, found.words), (73, 14));
    }
}

#[test]
fn a_carried_state_is_one_long_call() {
    let model = model(2);
    let text: Vec<u8> = TEXT.iter().copied().cycle().take(1500).collect();
    let tokens = ids(&text);
    let input = Tensor::from_slice(&tokens[..1499], [1499]).unwrap();
    let targets: Vec<i64> = tokens[1..].iter().map(|&id| i64::from(id)).collect();
    let (losses, _) = model.losses(&input, &targets, &Sequences::fresh(&[1499]), None).unwrap();
    let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / 1499.0;
    for chunk in [1, 64, 333, 2048] {
        let options = Options { reading: Reading::Carried, chunk };
        close(evaluate(&model, &[Document::bytes(&text)], options).cross_entropy, mean);
    }
}

#[test]
fn documents_know_nothing_of_each_other_and_may_have_a_first_token() {
    let model = model(3);
    let parts: Vec<&[u8]> = TEXT.split(|&byte| byte == b' ').collect();
    let documents: Vec<Document<'_>> = parts.iter().map(|part| Document::bytes(part)).collect();
    let found = evaluate(&model, &documents, Options::default());
    let expected: f64 = parts.iter().map(|part| nats(&model, &ids(part), Reading::Carried)).sum();
    let predicted: usize = parts.iter().map(|part| part.len() - 1).sum();
    assert_eq!(found.predicted, predicted as u64);
    close(found.cross_entropy, expected / predicted as f64);

    let documents: Vec<Document<'_>> =
        documents.into_iter().map(|document| document.after(Some(10))).collect();
    let found = evaluate(&model, &documents, Options::default());
    let expected: f64 = parts
        .iter()
        .map(|part| nats(&model, &[&[10], &ids(part)[..]].concat(), Reading::Carried))
        .sum();
    let tokens: usize = parts.iter().map(|part| part.len()).sum();
    assert_eq!((found.predicted, found.tokens), (tokens as u64, tokens as u64));
    close(found.cross_entropy, expected / tokens as f64);
}

#[test]
fn divergence_is_that_of_the_definition() {
    let (p, q) = (model(4), model(5));
    let reading = Reading::Windows { window: 20, stride: 20 };
    let found = kl_divergence(
        &mut ModelRunner::new(&p),
        &mut ModelRunner::new(&q),
        &[Document::bytes(TEXT)],
        &Options { reading, chunk: 32 },
        &mut silent,
    )
    .unwrap();
    let (mut all, mut agree, mut squares) = (Vec::new(), 0, 0.0);
    let tokens = ids(TEXT);
    for start in (0..73).step_by(20) {
        let end = (start + 20).min(73);
        let lp = log_probabilities(&p, &tokens[start..end]);
        let lq = log_probabilities(&q, &tokens[start..end]);
        let best = |row: &[f64]| (0..256).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        for (i, (p, q)) in lp.iter().zip(&lq).enumerate() {
            all.push(p.iter().zip(q).map(|(a, b)| a.exp() * (a - b)).sum::<f64>());
            agree += usize::from(best(p) == best(q));
            let token = tokens[start + i + 1] as usize;
            squares += (p[token].exp() - q[token].exp()).powi(2);
        }
    }
    close(found.mean, all.iter().sum::<f64>() / 73.0);
    all.sort_by(f64::total_cmp);
    close(found.median, all[36]);
    close(found.p90, all[65]);
    close(found.p99, all[72]);
    close(found.max, all[72]);
    close(found.top1_agreement, agree as f64 / 73.0);
    close(found.rms_probability_change, (squares / 73.0f64).sqrt());
    let options = Options { reading, chunk: 32 };
    close(
        found.original.cross_entropy,
        evaluate(&p, &[Document::bytes(TEXT)], options).cross_entropy,
    );
    close(found.other.cross_entropy, evaluate(&q, &[Document::bytes(TEXT)], options).cross_entropy);
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let model = model(6);
    let mut runners = (ModelRunner::new(&model), ModelRunner::new(&model));
    let documents = [Document::bytes(TEXT)];
    let found =
        kl_divergence(&mut runners.0, &mut runners.1, &documents, &Options::default(), &mut silent);
    let found = found.unwrap();
    assert_eq!((found.mean, found.max, found.top1_agreement), (0.0, 0.0, 1.0));
    assert_eq!(found.original, found.other);
    let wide = MambaConfig { vocab_size: 300, ..MambaConfig::bytes(24, 2) };
    let wide = LanguageModel::new(&wide, 0).unwrap();
    let error = kl_divergence(
        &mut runners.0,
        &mut ModelRunner::new(&wide),
        &documents,
        &Options::default(),
        &mut silent,
    );
    assert!(error.unwrap_err().to_string().contains("256 and 300 tokens"));
}

#[test]
fn damage_is_named_and_work_can_be_stopped() {
    let mut broken = model(7);
    broken
        .visit(&mut |parameter| {
            if parameter.name == "backbone.norm_f.weight" {
                *parameter.tensor = Tensor::filled(f32::NAN, [24]);
            }
            Ok(())
        })
        .unwrap();
    let documents = [Document::bytes(b"a"), Document::bytes(TEXT)];
    let options = Options::default();
    let error = perplexity(&mut ModelRunner::new(&broken), &documents, &options, &mut silent);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("cross-entropy of token 1 of document 1 is NaN"), "{error}");

    let model = model(7);
    let mut seen = Vec::new();
    let options = Options { chunk: 10, ..options };
    let stopped =
        perplexity(&mut ModelRunner::new(&model), &documents, &options, &mut |progress| {
            seen.push(progress.done);
            assert_eq!(progress.all, 73);
            if progress.done >= 30 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(seen, [10, 20, 30]);
}

#[test]
fn a_model_of_zeros_knows_nothing() {
    let zeros = LanguageModel::empty(&MambaConfig::bytes(24, 2)).unwrap();
    let found = evaluate(&zeros, &[Document::bytes(TEXT)], Options::default());
    close(found.cross_entropy, 256f64.ln());
    close(found.bits_per_byte.unwrap(), 8.0);
    close(found.word_perplexity.unwrap(), 2f64.powf(8.0 * 74.0 / 14.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn chunks_do_not_matter(
        lengths in prop::collection::vec(0usize..60, 1..5),
        window in 1usize..40,
        stride in 1usize..40,
        chunk in 1usize..50,
    ) {
        let model = model(8);
        let texts: Vec<Vec<u8>> =
            lengths.iter().map(|&len| TEXT.iter().copied().cycle().take(len).collect()).collect();
        let documents: Vec<Document<'_>> = texts.iter().map(|text| Document::bytes(text)).collect();
        if lengths.iter().all(|&len| len < 2) {
            return Ok(());
        }
        let reading = Reading::Windows { window, stride: stride.min(window) };
        let whole = evaluate(&model, &documents, Options { reading, chunk: 4096 });
        let parts = evaluate(&model, &documents, Options { reading, chunk });
        prop_assert!((whole.cross_entropy - parts.cross_entropy).abs() < 1e-5);
        prop_assert_eq!(whole.predicted, parts.predicted);
    }
}
