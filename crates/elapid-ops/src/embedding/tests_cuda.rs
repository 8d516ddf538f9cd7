//! The embedding's kernels, emulated and on the card, against plain loops.

use elapid_tensor::bf16;

use super::cuda::{TokenIds, backward, forward};
use crate::gpu::{GpuElement, Rows};
use crate::testing::{close, from_element, gpus, random, to_element};

fn check<T: GpuElement>(tokens: usize, width: usize) {
    let classes = 11;
    // Id 3 is every second token, so that it has several pieces.
    let ids: Vec<u32> =
        (0..tokens as u32).map(|t| if t % 2 == 0 { 3 } else { t * 7 % 11 }).collect();
    let table = random(1, classes * width);
    let dy: Vec<T> = to_element(&random(2, tokens * width));
    let mut grad = vec![0.0; classes * width];
    for (t, &id) in ids.iter().enumerate() {
        for c in 0..width {
            grad[id as usize * width + c] += dy[t * width + c].to_f64();
        }
    }
    for gpu in gpus() {
        let on_card = TokenIds::upload(&gpu, &ids, classes).unwrap();
        let (table_on_card, dy) = (gpu.upload(&table).unwrap(), gpu.upload(&dy).unwrap());
        let out =
            forward::<T>(&gpu, table_on_card.slice(), &on_card, width).unwrap().read().unwrap();
        let rounded: Vec<T> = to_element(&table);
        for (t, &id) in ids.iter().enumerate() {
            let row = &rounded[id as usize * width..][..width];
            assert_eq!(from_element(&out[t * width..][..width]), from_element(row));
        }
        let found = backward(&gpu, &on_card, Rows::new(&dy, width), width).unwrap();
        close("dtable", &from_element(&found.read().unwrap()), &grad, 1e-5);
        assert!(TokenIds::upload(&gpu, &[0, 11], classes).is_err());
    }
}

#[test]
fn kernels_match_plain_loops() {
    check::<f32>(200, 24);
    check::<f32>(7, 5);
    check::<bf16>(150, 520);
    check::<f32>(0, 4);
}
