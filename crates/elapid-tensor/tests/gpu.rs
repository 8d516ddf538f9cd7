//! Tensors on the emulated GPU and, where there is one, on the card: the same results as on the host.

use elapid_tensor::autograd::{accumulate, backward};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Tensor, bf16};

fn devices() -> Vec<Device> {
    [("emulation", Gpu::emulated()), ("card", Gpu::open(0))]
        .into_iter()
        .filter_map(|(what, gpu)| {
            let gpu = gpu.inspect_err(|error| eprintln!("SKIPPED: tensors on the {what}: {error}"));
            Some(Device::Cuda(gpu.ok()?.id()))
        })
        .collect()
}

fn counting(shape: &[usize]) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32 - 7.5).collect();
    Tensor::from_slice(&values, shape).unwrap()
}

#[test]
fn values_move_there_and_back() {
    for device in devices() {
        let x = counting(&[5, 7]);
        let there = x.to(device).unwrap();
        assert_eq!(there.device(), device);
        assert_eq!(there.to_vec::<f32>().unwrap(), x.to_vec::<f32>().unwrap());
        let bytes = Tensor::from_slice(&[1u8, 2, 3], [3]).unwrap();
        assert_eq!(bytes.to(device).unwrap().to_vec::<u8>().unwrap(), [1, 2, 3]);
        assert!(there.data::<f32>().unwrap_err().to_string().contains("expected cpu"));
        assert!(Tensor::concat(&[&there, &x], 0).unwrap_err().to_string().contains("tensor 1"));
        let zeros = Tensor::zeros_on(device, DType::BF16, [3]).unwrap();
        assert_eq!(zeros.to_f64_vec().unwrap(), [0.0; 3]);
    }
}

#[test]
fn many_tensors_come_to_the_host_together() {
    for device in devices() {
        let there = |tensor: Tensor| tensor.to(device).unwrap();
        let x = counting(&[5, 7]);
        let halves = x.cast(DType::BF16).unwrap();
        let bytes = Tensor::from_slice(&[1u8, 2, 3], [3]).unwrap();
        let none = Tensor::from_slice::<f32>(&[], [0, 4]).unwrap();
        let own = [x.clone(), halves.clone(), none, bytes, x.transpose(0, 1).unwrap(), x.clone()];
        let mut sent: Vec<Tensor> = own[..4].iter().cloned().map(there).collect();
        sent.extend([there(x.clone()).transpose(0, 1).unwrap(), x.clone()]);
        let fetched = Tensor::all_to_host(&sent).unwrap();
        assert_eq!(fetched.len(), own.len());
        for (fetched, own) in fetched.iter().zip(&own) {
            assert_eq!(fetched.device(), Device::Cpu);
            assert_eq!((fetched.shape(), fetched.dtype()), (own.shape(), own.dtype()));
            assert_eq!(fetched.to_f64_vec().unwrap(), own.to_f64_vec().unwrap());
        }
        assert_eq!(fetched[1].data::<bf16>().unwrap(), halves.data::<bf16>().unwrap());
        assert!(Tensor::all_to_host(&[]).unwrap().is_empty());
    }
}

#[test]
fn views_are_copied_like_on_the_host() {
    for device in devices() {
        type View = fn(&Tensor) -> Tensor;
        let views: [(&str, View); 6] = [
            ("transpose", |x| x.transpose(0, 2).unwrap()),
            ("inner transpose", |x| x.transpose(1, 2).unwrap()),
            ("narrow", |x| x.narrow(2, 3, 4).unwrap()),
            ("rows", |x| x.narrow(1, 1, 2).unwrap()),
            ("aligned rows", |x| x.narrow(2, 4, 8).unwrap()),
            ("both", |x| x.narrow(2, 1, 5).unwrap().transpose(0, 1).unwrap()),
        ];
        for shape in [[3, 4, 12], [2, 3, 16]] {
            let x = counting(&shape);
            let there = x.to(device).unwrap();
            for (name, view) in views {
                let (own, other) = (view(&x), view(&there));
                let copied = other.contiguous().unwrap();
                assert!(copied.is_contiguous());
                assert_eq!(
                    copied.to_vec::<f32>().unwrap(),
                    own.to_vec::<f32>().unwrap(),
                    "{name} on {device}"
                );
                let narrow = other.cast(DType::BF16).unwrap();
                let expected = own.cast(DType::BF16).unwrap();
                assert_eq!(narrow.to_vec::<bf16>().unwrap(), expected.to_vec::<bf16>().unwrap());
                let wide = narrow.cast(DType::F32).unwrap();
                assert_eq!(wide.to_f64_vec().unwrap(), expected.to_f64_vec().unwrap());
            }
            for axis in 0..3 {
                let join = |x: &Tensor| {
                    Tensor::concat(&[&x.narrow(axis, 1, 1).unwrap(), x], axis).unwrap()
                };
                assert_eq!(
                    join(&there).to_vec::<f32>().unwrap(),
                    join(&x).to_vec::<f32>().unwrap()
                );
            }
        }
    }
}

#[test]
fn gradients_flow_through_views_and_moves() {
    for device in devices() {
        let gradient = |device: Device| {
            let x = counting(&[4, 6]).requires_grad();
            let there = x.to(device).unwrap();
            let parts = there.split(1, &[2, 4]).unwrap();
            let again = there.narrow(1, 1, 2).unwrap().transpose(0, 1).unwrap();
            let narrow = parts[1].cast(DType::BF16).unwrap().cast(DType::F32).unwrap();
            let give = |shape: &[usize]| Some(counting(shape).to(device).unwrap());
            let roots = [(&again, give(&[2, 4])), (&narrow, give(&[4, 4]))];
            let found = backward(&roots, &[&x]).unwrap().swap_remove(0).unwrap();
            assert_eq!(found.device(), Device::Cpu);
            found.to_vec::<f32>().unwrap()
        };
        assert_eq!(gradient(device), gradient(Device::Cpu));
    }
}

#[test]
fn sums_in_place_leave_other_owners_alone() {
    for device in devices() {
        for len in [1usize, 6, 4099] {
            let mut sum = counting(&[len]).to(device).unwrap();
            let other = sum.clone();
            accumulate(&mut sum, &other).unwrap();
            let once = counting(&[len]).to_f64_vec().unwrap();
            let twice: Vec<f64> = once.iter().map(|v| 2.0 * v).collect();
            assert_eq!(sum.to_f64_vec().unwrap(), twice);
            assert_eq!(other.to_f64_vec().unwrap(), once);
            let mut narrow = sum.cast(DType::BF16).unwrap();
            let term = narrow.clone();
            accumulate(&mut narrow, &term).unwrap();
            assert_eq!(narrow.dtype(), DType::BF16);
        }
    }
}

#[test]
fn names_of_devices_are_read() {
    for name in ["cpu", "cuda:0", "cuda:3", "cuda:emulated"] {
        assert_eq!(name.parse::<Device>().unwrap().to_string(), name);
    }
    assert_eq!("cuda".parse::<Device>().unwrap().to_string(), "cuda:0");
    for name in ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:99999999"] {
        assert!(name.parse::<Device>().unwrap_err().to_string().contains(name), "{name}");
    }
}
