//! The golden Mamba-1 model: the loss that transformers computes is the cross-entropy found here.

use std::ops::ControlFlow;
use std::path::Path;

use elapid_eval::{Document, Options, Reading, perplexity};
use elapid_formats::{TensorFile, hf};
use elapid_infer::ModelRunner;

#[test]
fn the_loss_of_the_golden_batch() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../elapid-formats/tests/fixtures/golden/mamba1");
    let model = hf::load_model(&folder.join("hf")).unwrap();
    let expected = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
    let values = |name: &str| expected.tensor(name).unwrap().to_f64_vec().unwrap();
    let (ids, labels) = (values("batch.input_ids"), values("batch.labels"));
    // Rows of 24 tokens; the loss leaves out ignored labels, so stretches without one are documents that are
    // predicted after what is before them.
    let ids: Vec<Vec<u32>> =
        ids.chunks(24).map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    let (mut nats, mut scored) = (0.0, 0u64);
    let mean = |ids: &[u32]| {
        let options = Options { reading: Reading::Carried, chunk: 7 };
        let documents = [Document::ids(ids, b"")];
        let go_on = &mut |_| ControlFlow::Continue(());
        let found = perplexity(&mut ModelRunner::new(&model), &documents, &options, go_on).unwrap();
        found.cross_entropy * found.predicted as f64
    };
    for (row, labels) in ids.iter().zip(labels.chunks(24)) {
        for target in 1..24 {
            if labels[target] >= 0.0 {
                assert_eq!(labels[target] as u32, row[target]);
                let before = if target > 1 { mean(&row[..target]) } else { 0.0 };
                nats += mean(&row[..=target]) - before;
                scored += 1;
            }
        }
    }
    let loss = values("batch.loss")[0];
    assert!((nats / scored as f64 - loss).abs() <= 1e-5, "{} {loss}", nats / scored as f64);
}
