//! Zip archives as PyTorch and NumPy write them: entries stored one after the other, so that a tensor can be
//! used where it is mapped; also those of 4 GiB and more (zip64), and compressed entries within a bound.

mod read;
mod write;

pub(crate) use read::Archive;
pub(crate) use write::Writer;

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
/// In a field of 32 bits: the value is in the zip64 extra field.
const ELSEWHERE: u32 = u32::MAX;
