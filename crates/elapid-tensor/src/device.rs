//! Where a tensor lives and where an operation runs.

use std::fmt;
use std::str::FromStr;

use crate::Error;
use crate::cuda::libraries::libraries;
use crate::cuda::{Gpu, GpuError, GpuId};

/// A place for tensors. Operations match on it and refuse, by name, a device that they lack.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// The host: every operation has an implementation here.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda(GpuId),
}

impl Device {
    /// The GPU, opened if need be; none for the host.
    ///
    /// # Errors
    /// If the GPU cannot be used.
    pub fn gpu(self) -> Result<Option<Gpu>, Error> {
        match self {
            Device::Cpu => Ok(None),
            Device::Cuda(id) => Ok(Some(id.gpu()?)),
        }
    }

    /// The first card that can be used, or else the host and the reason.
    pub fn best() -> (Self, Option<Error>) {
        let usable = || {
            let gpu = Gpu::open(0)?;
            libraries().nvrtc.check()?;
            libraries().cublaslt.check()?;
            Ok::<Gpu, GpuError>(gpu)
        };
        match usable() {
            Ok(gpu) => (Device::Cuda(gpu.id()), None),
            Err(error) => (Device::Cpu, Some(error.into())),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(id) => id.fmt(f),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// Parses `cpu`, `cuda` (the first card), `cuda:N` and `cuda:emulated` (the GPU kernels on the host, for tests);
    /// `auto` is [`Device::best`].
    fn from_str(text: &str) -> Result<Self, Error> {
        let unknown = || Error::UnknownDevice(text.to_owned());
        match text {
            "cpu" => Ok(Device::Cpu),
            "auto" => Ok(Device::best().0),
            "cuda" => Ok(Device::Cuda(GpuId::Card(0))),
            "cuda:emulated" => Ok(Device::Cuda(GpuId::Emulated)),
            other => {
                let number = other.strip_prefix("cuda:").ok_or_else(unknown)?;
                Ok(Device::Cuda(GpuId::Card(number.parse().map_err(|_| unknown())?)))
            }
        }
    }
}
