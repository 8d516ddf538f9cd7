//! Chosen rows on a GPU alone: narrow types, gaps between neighbours, rows that are taken often.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Tensor};

use super::{reference, select_rows};
use crate::testing::{close_tensor, devices, random_on};

#[test]
fn narrow_rows_on_a_gpu() {
    let rows: Vec<usize> = (0..150).map(|k| if k % 2 == 0 { 4 } else { k * 7 % 11 }).collect();
    for device in devices().into_iter().filter(|&device| device != Device::Cpu) {
        let x = random_on(device, DType::BF16, 1, [11, 20]);
        let leaf = x.transpose(0, 1).unwrap().narrow(1, 0, 11).unwrap().requires_grad();
        let rows: Vec<usize> = rows.iter().map(|row| row % 20).collect();
        let y = select_rows(&leaf, &rows).unwrap();
        assert_eq!((y.dtype(), y.device()), (DType::BF16, device));
        let wide = leaf.to_f64_vec().unwrap();
        close_tensor("select_rows", &y, &reference::take_rows(&wide, &rows, 11), 0.0);
        for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F32, 1e-6)] {
            let y = select_rows(&leaf, &rows).unwrap();
            let dy = random_on(device, dtype, 2, [150, 11]);
            let want = reference::scatter_add(&dy.to_f64_vec().unwrap(), &rows, 11, 20);
            let dx = backward(&[(&y, Some(dy))], &[&leaf]).unwrap().remove(0).unwrap();
            assert_eq!(dx.dtype(), dtype);
            close_tensor("dx", &dx, &want, tolerance);
        }
        assert!(select_rows(&Tensor::zeros::<f64>([2, 2]).to(device).unwrap(), &[0]).is_err());
    }
}
