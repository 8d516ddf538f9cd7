//! The fused loss against its f64 definition, finite differences and PyTorch's cross entropy.

use elapid_tensor::autograd::{backward, no_grad};
use elapid_tensor::{DType, Tensor};
use proptest::prelude::*;
use safetensors::SafeTensors;

use super::reference::Reference;
use super::*;
use crate::elementwise::scale;
use crate::testing::{check_gradient, close, close_tensor, on_threads, random_tensor, same_bits};

fn targets_of(values: &[i64]) -> Tensor {
    Tensor::from_slice(values, [values.len()]).unwrap()
}

/// `[rows, width]` values times `spread`, as a view of wider rows.
fn view(seed: u64, rows: usize, width: usize, spread: f64) -> Tensor {
    let wide = scale(&random_tensor(seed, [rows, width + 5]), spread).unwrap();
    wide.narrow(1, 3, width).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn losses_and_gradients(
        picks in proptest::collection::vec((0u64..1000, any::<bool>()), 1..12),
        width in 1usize..9, vocab in 1usize..24, padding in 0usize..4, seed in 0u64..1000,
    ) {
        let targets: Vec<i64> = picks
            .iter()
            .map(|&(pick, scored)| if scored { (pick % vocab as u64) as i64 } else { IGNORED })
            .collect();
        let x = view(seed, targets.len(), width, 2.0).requires_grad();
        let weight = view(seed + 1, vocab + padding, width, 2.0).requires_grad();
        let (wide_x, wide_weight) = (x.to_f64_vec().unwrap(), weight.to_f64_vec().unwrap());
        let reference = Reference {
            x: &wide_x,
            weight: &wide_weight,
            targets: &targets,
            width,
            classes: vocab,
        };
        let per_token = reference.per_token();
        let (dx, dweight) = reference.gradients();
        check_gradient("dx", &dx, &wide_x, |x| {
            Reference { x, ..reference }.per_token().iter().sum()
        });
        check_gradient("dweight", &dweight, &wide_weight, |weight| {
            Reference { weight, ..reference }.per_token().iter().sum()
        });

        let target = targets_of(&targets);
        let got = linear_cross_entropy_per_token(&x, &weight, &target, vocab).unwrap();
        close_tensor("per token", &got, &per_token, 1e-6);
        let scored = targets.iter().filter(|&&target| target != IGNORED).count().max(1) as f64;
        for (reduction, factor) in [(Reduction::Sum, 1.0), (Reduction::Mean, 1.0 / scored)] {
            let loss = linear_cross_entropy(&x, &weight, &target, vocab, reduction).unwrap();
            close_tensor("loss", &loss, &[per_token.iter().sum::<f64>() * factor], 1e-6);
            let alone = no_grad(|| linear_cross_entropy(&x, &weight, &target, vocab, reduction));
            same_bits("without recording", &alone.unwrap(), &loss);
            let incoming = Tensor::scalar(-1.5f32);
            let grads = backward(&[(&loss, Some(incoming))], &[&x, &weight]).unwrap();
            let times = |values: &[f64]| values.iter().map(|v| v * -1.5 * factor).collect::<Vec<_>>();
            close_tensor("dx", grads[0].as_ref().unwrap(), &times(&dx), 2e-6);
            close_tensor("dweight", grads[1].as_ref().unwrap(), &times(&dweight), 2e-6);
        }
    }
}

/// Several chunks, with ignored tokens in some of them only.
fn large() -> (Tensor, Tensor, Vec<i64>) {
    let (tokens, width, vocab) = (700, 24, 4100);
    let mut targets: Vec<i64> = (0..tokens as i64).map(|t| t * 37 % 4097).collect();
    for t in (300..480).step_by(7) {
        targets[t] = IGNORED;
    }
    (view(1, tokens, width, 2.0), view(2, vocab, width, 2.0), targets)
}

#[test]
fn chunks_do_not_show() {
    let (x, weight, targets) = large();
    let (x, weight) = (x.requires_grad(), weight.requires_grad());
    let (wide_x, wide_weight) = (x.to_f64_vec().unwrap(), weight.to_f64_vec().unwrap());
    let reference =
        Reference { x: &wide_x, weight: &wide_weight, targets: &targets, width: 24, classes: 4097 };
    let target = targets_of(&targets);
    let loss = linear_cross_entropy(&x, &weight, &target, 4097, Reduction::Sum).unwrap();
    let want: f64 = reference.per_token().iter().sum();
    assert!((f64::from(loss.item::<f32>().unwrap()) / want - 1.0).abs() < 1e-6);
    let grads = backward(&[(&loss, None)], &[&x, &weight]).unwrap();
    let (dx, dweight) = reference.gradients();
    close_tensor("dx", grads[0].as_ref().unwrap(), &dx, 2e-6);
    close_tensor("dweight", grads[1].as_ref().unwrap(), &dweight, 2e-6);
}

#[test]
fn a_token_alone_has_the_loss_of_the_batch() {
    let (x, weight, targets) = large();
    let losses = linear_cross_entropy_per_token(&x, &weight, &targets_of(&targets), 4097).unwrap();
    for (first, count) in [(0, 1), (299, 1), (301, 1), (470, 20), (699, 1), (0, 130)] {
        let alone = linear_cross_entropy_per_token(
            &x.narrow(0, first, count).unwrap(),
            &weight,
            &targets_of(&targets[first..first + count]),
            4097,
        )
        .unwrap();
        same_bits("losses", &alone, &losses.narrow(0, first, count).unwrap());
    }
}

#[test]
fn nothing_depends_on_the_number_of_threads() {
    let (x, weight, targets) = large();
    let (x, weight) = (x.requires_grad(), weight.requires_grad());
    let run = |threads| {
        on_threads(threads, || {
            let targets = targets_of(&targets);
            let loss = linear_cross_entropy(&x, &weight, &targets, 4097, Reduction::Mean).unwrap();
            let grads = backward(&[(&loss, None)], &[&x, &weight]).unwrap();
            [Some(loss.detach()), grads[0].clone(), grads[1].clone()].map(Option::unwrap)
        })
    };
    for (one, three) in run(1).iter().zip(&run(3)) {
        same_bits("threads", one, three);
    }
}

#[test]
fn an_ignored_token_reaches_nothing_and_a_bad_one_does_not_hide() {
    let (x, weight, targets) = large();
    let run = |x: &Tensor| {
        let (x, weight) = (x.requires_grad(), weight.requires_grad());
        let target = targets_of(&targets);
        let loss = linear_cross_entropy(&x, &weight, &target, 4097, Reduction::Mean).unwrap();
        let grads = backward(&[(&loss, None)], &[&x, &weight]).unwrap();
        [Some(loss.detach()), grads[0].clone(), grads[1].clone()].map(Option::unwrap)
    };
    let poisoned = |token: usize| {
        let mut values = x.to_vec::<f32>().unwrap();
        values[token * 24 + 5] = f32::NAN;
        Tensor::from_slice(&values, [700, 24]).unwrap()
    };
    for (got, want) in run(&poisoned(300)).iter().zip(&run(&x)) {
        same_bits("ignored", got, want);
    }
    assert!(run(&poisoned(301))[0].item::<f32>().unwrap().is_nan());
}

#[test]
fn only_wanted_gradients_are_made_and_an_unscored_batch_is_zero() {
    let (x, weight, targets) = large();
    let target = targets_of(&targets);
    let leaf = x.requires_grad();
    let loss = linear_cross_entropy(&leaf, &weight, &target, 4097, Reduction::Mean).unwrap();
    assert!(backward(&[(&loss, None)], &[&leaf]).unwrap()[0].is_some());

    let unscored = targets_of(&[IGNORED; 700]);
    let weight = weight.requires_grad();
    let loss = linear_cross_entropy(&leaf, &weight, &unscored, 4097, Reduction::Mean).unwrap();
    assert_eq!(loss.item::<f32>().unwrap(), 0.0);
    for grad in backward(&[(&loss, None)], &[&leaf, &weight]).unwrap() {
        assert!(grad.unwrap().to_vec::<f32>().unwrap().iter().all(|&value| value == 0.0));
    }
}

#[test]
fn wrong_operands_are_named() {
    let (x, weight) = (random_tensor(1, [3, 4]), random_tensor(2, [7, 4]));
    let run = |x: &Tensor, weight: &Tensor, targets: &[i64], real| {
        let targets = targets_of(targets);
        linear_cross_entropy(x, weight, &targets, real, Reduction::Mean).map_err(|e| e.to_string())
    };
    assert!(run(&x, &weight, &[0, 4, IGNORED], 5).is_ok());
    let error = run(&x, &weight, &[0, 5, 1], 5).unwrap_err();
    assert!(error.contains("token 1 is 5") && error.contains("0 to 4"), "{error}");
    assert!(run(&x, &weight, &[0, 1, -1], 5).unwrap_err().contains("token 2 is -1"));
    assert!(run(&x, &weight, &[0, 1], 5).unwrap_err().contains("[2]"));
    assert!(run(&x, &weight, &[0, 1, 2], 8).unwrap_err().contains("V = 7"));
    assert!(run(&x, &weight, &[0, 1, 2], 0).is_err());
    assert!(run(&x, &random_tensor(2, [7, 5]), &[0, 1, 2], 5).unwrap_err().contains("[7, 4]"));
    let empty = |rows| Tensor::zeros::<f32>([rows, 0]);
    assert!(run(&empty(3), &empty(7), &[0, 1, 2], 5).unwrap_err().contains("at least 1"));
    let targets = targets_of(&[0, 1, 2]).cast(DType::U32).unwrap();
    assert!(linear_cross_entropy(&x, &weight, &targets, 5, Reduction::Mean).is_err());
    let none = run(&Tensor::zeros::<f32>([0, 4]), &weight, &[], 5).unwrap();
    assert_eq!(none.item::<f32>().unwrap(), 0.0);
}

/// With the unit matrix as weight, the logits are `x` itself.
#[test]
fn golden_cross_entropy() {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/ops/cross_entropy.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let cases = &header.metadata().as_ref().unwrap()["cases"];
    let cases: serde_json::Value = serde_json::from_str(cases).unwrap();
    let cases = cases.as_object().unwrap();
    assert_eq!(cases.len(), 6);
    for (case, parameters) in cases {
        let read = |name: &str| -> Vec<f64> {
            let tensor = file.tensor(&format!("{case}.{name}")).unwrap();
            let data = tensor.data();
            match tensor.dtype() {
                safetensors::Dtype::F64 => {
                    data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
                }
                safetensors::Dtype::F32 => data
                    .chunks(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                    .collect(),
                safetensors::Dtype::I64 => data
                    .chunks(8)
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
                    .collect(),
                other => panic!("{case}.{name} is {other:?}"),
            }
        };
        let (tokens, vocab) = {
            let shape = file.tensor(&format!("{case}.logits")).unwrap().shape().to_vec();
            (shape[0], shape[1])
        };
        let real = parameters["real"].as_u64().map_or(vocab, |real| real as usize);
        let logits = read("logits");
        let narrow: Vec<f32> = logits.iter().map(|&x| x as f32).collect();
        let x = Tensor::from_slice(&narrow, [tokens, vocab]).unwrap().requires_grad();
        let mut unit = vec![0f32; vocab * vocab];
        unit.iter_mut().step_by(vocab + 1).for_each(|one| *one = 1.0);
        let weight = Tensor::from_slice(&unit, [vocab, vocab]).unwrap().requires_grad();
        let targets: Vec<i64> = read("targets").iter().map(|&target| target as i64).collect();
        let targets = targets_of(&targets);

        let per_token = linear_cross_entropy_per_token(&x, &weight, &targets, real).unwrap();
        close_tensor(case, &per_token, &read("loss_per_token"), 1e-6);
        let sum = linear_cross_entropy(&x, &weight, &targets, real, Reduction::Sum).unwrap();
        close_tensor(case, &sum, &read("loss_sum"), 1e-6);
        let mean = linear_cross_entropy(&x, &weight, &targets, real, Reduction::Mean).unwrap();
        close_tensor(case, &mean, &read("loss_mean"), 1e-6);
        let grads = backward(&[(&mean, None)], &[&x, &weight]).unwrap();
        let dlogits = read("dlogits");
        close_tensor(case, grads[0].as_ref().unwrap(), &dlogits, 1e-7);
        let mut dweight = vec![0.0; vocab * vocab];
        for (dlogits, logits) in dlogits.chunks(vocab).zip(logits.chunks(vocab)) {
            for (dlogit, row) in dlogits.iter().zip(dweight.chunks_mut(vocab)) {
                row.iter_mut().zip(logits).for_each(|(sum, x)| *sum += dlogit * x);
            }
        }
        close(case, &grads[1].as_ref().unwrap().to_f64_vec().unwrap(), &dweight, 1e-6);
    }
}
