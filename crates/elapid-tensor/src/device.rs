//! Where a tensor lives and where an operation runs.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A place for tensors. Operations match on it and refuse, by name, a device that they lack.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// The host: every operation has an implementation here.
    #[default]
    Cpu,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// Parses `cpu`; `auto` picks the best device there is.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "cpu" | "auto" => Ok(Device::Cpu),
            other => Err(Error::UnknownDevice(other.to_owned())),
        }
    }
}
