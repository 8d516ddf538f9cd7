//! Device memory: blocks that return to their GPU and are used again in the order of its stream.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

use super::error::{GpuError, Result};
use super::gpu::{Driver, Gpu};

/// Bytes of a GPU's memory that this program holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// In buffers that are in use now.
    pub in_use: usize,
    /// The largest `in_use` so far, or since [`Gpu::reset_peak`].
    pub peak: usize,
    /// In blocks that wait to be used again.
    pub cached: usize,
}

/// Blocks that wait, by the pool that they belong to and their size. Pool 0 is everybody's; each graph has its own,
/// as its launches hold the addresses of its blocks.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: BTreeMap<(u64, usize), Vec<u64>>,
    pub(super) usage: Usage,
}

impl Pool {
    /// Takes out what waits in one pool, with its sizes.
    fn take(&mut self, own: u64) -> Vec<(usize, Vec<u64>)> {
        let keys: Vec<(u64, usize)> =
            self.free.range((own, 0)..=(own, usize::MAX)).map(|(key, _)| *key).collect();
        keys.into_iter().filter_map(|key| Some((key.1, self.free.remove(&key)?))).collect()
    }
}

/// The size that `bytes` are rounded up to: eight sizes to a power of two, so at most an eighth is wasted.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(512);
    bytes.max(1).next_multiple_of(step)
}

/// Bytes in the memory of a GPU that go back to it when dropped. As all work of a GPU is in one order, memory can be
/// used again by later calls while earlier ones are still running.
#[derive(Debug)]
pub(crate) struct DeviceBlock {
    gpu: Gpu,
    pool: u64,
    address: u64,
    capacity: usize,
    bytes: usize,
}

/// An owned run of elements in the memory of a GPU; it goes back to its GPU when dropped.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    block: DeviceBlock,
    len: usize,
    element: PhantomData<T>,
}

/// A run of elements in the memory of a GPU, borrowed: what launches are given.
#[derive(Debug)]
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    element: PhantomData<&'a T>,
}

// Not derived: that would ask for T: Copy, and the elements are only referred to.
impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for DeviceSlice<'_, T> {}

impl<T> DeviceSlice<'_, T> {
    /// Address of the first element, for arguments of kernels.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements `start..start + len`, as far as they are there.
    pub fn range(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len);
        Self {
            address: self.address + (start * size_of::<T>()) as u64,
            len: len.min(self.len - start),
            element: PhantomData,
        }
    }
}

impl<'a, T: Pod> From<&'a DeviceBuffer<T>> for DeviceSlice<'a, T> {
    fn from(buffer: &'a DeviceBuffer<T>) -> Self {
        buffer.slice()
    }
}

impl DeviceBlock {
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The elements from byte `first` on. The caller says that they are of type T.
    pub(crate) fn slice<T: Pod>(&self, first: usize) -> DeviceSlice<'_, T> {
        DeviceSlice {
            address: self.address + first as u64,
            len: self.bytes.saturating_sub(first) / size_of::<T>(),
            element: PhantomData,
        }
    }

    /// Bytes from `first` on, after all work before this call.
    pub(crate) fn read_into(&self, first: usize, to: &mut [u8]) -> Result<()> {
        debug_assert!(first + to.len() <= self.bytes);
        // SAFETY: the block holds as many bytes.
        unsafe { self.gpu.copy_out(self.address + first as u64, to) }
    }
}

impl Gpu {
    /// `len` elements of arbitrary value, for callers that overwrite all of them.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], after waiting memory has been given back to the driver.
    pub fn scratch<T: Pod>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        let block = self.scratch_block(len * size_of::<T>())?;
        Ok(DeviceBuffer { block, len, element: PhantomData })
    }

    pub(crate) fn scratch_block(&self, bytes: usize) -> Result<DeviceBlock> {
        // The emulated device gives exactly what is asked for, so that a sanitizer sees every stray access.
        let capacity = if self.is_emulated() { bytes.max(1) } else { size_class(bytes) };
        let own = self.recording_pool();
        let mut pool = self.pool();
        let recycled = pool.free.get_mut(&(own, capacity)).and_then(Vec::pop);
        let address = match recycled {
            Some(address) => {
                pool.usage.cached -= capacity;
                address
            }
            None => match self.allocate(capacity) {
                Ok(address) => address,
                Err(error) if own != 0 => return Err(self.out_of_memory(bytes, error)),
                Err(_) => {
                    drop(pool);
                    self.trim()?;
                    pool = self.pool();
                    self.allocate(capacity).map_err(|error| self.out_of_memory(bytes, error))?
                }
            },
        };
        pool.usage.in_use += capacity;
        pool.usage.peak = pool.usage.peak.max(pool.usage.in_use);
        drop(pool);
        Ok(DeviceBlock { gpu: self.clone(), pool: own, address, capacity, bytes })
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// As [`Gpu::scratch`].
    pub fn zeros<T: Pod + Zeroable>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        let block = self.zeroed(len * size_of::<T>())?;
        Ok(DeviceBuffer { block, len, element: PhantomData })
    }

    pub(crate) fn zeroed(&self, bytes: usize) -> Result<DeviceBlock> {
        let block = self.scratch_block(bytes)?;
        // SAFETY: the block is that long and nobody else has it.
        unsafe { self.fill_zero(block.address, bytes)? };
        Ok(block)
    }

    /// A copy of `values`. The values are read before the call returns.
    ///
    /// # Errors
    /// As [`Gpu::scratch`].
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<DeviceBuffer<T>> {
        let mut buffer = self.scratch::<T>(values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// Memory held by this program.
    pub fn usage(&self) -> Usage {
        self.pool().usage
    }

    /// Starts [`Usage::peak`] anew, from what is in use now.
    pub fn reset_peak(&self) {
        let mut pool = self.pool();
        pool.usage.peak = pool.usage.in_use;
    }

    /// Gives waiting blocks back to the driver.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn trim(&self) -> Result<()> {
        // Freeing waits for the card, which would spoil what another thread records. The turn comes before the pool, which
        // that thread needs, too.
        let turn = self.turn();
        self.wait(&turn)?;
        let mut pool = self.pool();
        for (capacity, addresses) in pool.take(0) {
            for address in addresses {
                pool.usage.cached -= capacity;
                self.release(address, capacity)?;
            }
        }
        Ok(())
    }

    /// Gives the waiting blocks of a graph that is gone to everybody.
    pub(super) fn dissolve_pool(&self, own: u64) {
        let mut pool = self.pool();
        for (capacity, mut addresses) in pool.take(own) {
            if self.is_emulated() {
                pool.usage.cached -= capacity * addresses.len();
                for address in addresses {
                    // A failure to free has nobody to tell; the memory is lost with the program.
                    let _ = self.release(address, capacity);
                }
                continue;
            }
            pool.free.entry((0, capacity)).or_default().append(&mut addresses);
        }
    }

    fn out_of_memory(&self, asked: usize, error: GpuError) -> GpuError {
        match self.driver() {
            Driver::Card(card) => match card.memory() {
                Ok((free, total)) => {
                    GpuError::OutOfMemory { device: self.to_string(), asked, free, total }
                }
                Err(_) => error,
            },
            Driver::Host => error,
        }
    }
}

impl<T: Pod> DeviceBuffer<T> {
    /// Address of the first element, for arguments of kernels.
    pub fn address(&self) -> u64 {
        self.block.address
    }

    /// All elements, borrowed.
    pub fn slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { address: self.block.address, len: self.len, element: PhantomData }
    }

    pub(crate) fn into_block(self) -> DeviceBlock {
        self.block
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The GPU whose memory it is.
    pub fn gpu(&self) -> &Gpu {
        &self.block.gpu
    }

    /// Overwrites all elements.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn write(&mut self, values: &[T]) -> Result<()> {
        assert_eq!(values.len(), self.len);
        // SAFETY: the block holds as many bytes, and nobody else has it.
        unsafe { self.gpu().copy_in(self.address(), bytemuck::cast_slice(values)) }
    }

    /// Overwrites the first `values.len()` elements.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn write_first(&mut self, values: &[T]) -> Result<()> {
        assert!(values.len() <= self.len);
        // SAFETY: the block holds as many bytes, and nobody else has it.
        unsafe { self.gpu().copy_in(self.address(), bytemuck::cast_slice(values)) }
    }

    /// Overwrites the elements from `start` on.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn write_at(&mut self, start: usize, values: &[T]) -> Result<()> {
        assert!(start <= self.len && values.len() <= self.len - start);
        let address = self.address() + (start * size_of::<T>()) as u64;
        // SAFETY: the block holds as many bytes from there on, and nobody else has it.
        unsafe { self.gpu().copy_in(address, bytemuck::cast_slice(values)) }
    }

    /// The first `to.len()` elements, after all work before this call.
    ///
    /// # Errors
    /// If the driver refuses, or earlier work failed.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn read_first(&self, to: &mut [T]) -> Result<()> {
        assert!(to.len() <= self.len);
        self.block.read_into(0, bytemuck::cast_slice_mut::<T, u8>(to))
    }

    /// A copy in the same GPU's memory.
    ///
    /// # Errors
    /// As [`Gpu::scratch`].
    pub fn duplicate(&self) -> Result<Self> {
        self.slice().duplicate(self.gpu())
    }

    /// The elements, after all work before this call.
    ///
    /// # Errors
    /// If the driver refuses, or earlier work failed.
    pub fn read(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len];
        self.block.read_into(0, bytemuck::cast_slice_mut::<T, u8>(&mut values))?;
        Ok(values)
    }
}

impl<T: Pod> DeviceSlice<'_, T> {
    /// A copy in the same GPU's memory.
    ///
    /// # Errors
    /// As [`Gpu::scratch`].
    pub fn duplicate(&self, gpu: &Gpu) -> Result<DeviceBuffer<T>> {
        let copy = gpu.scratch::<T>(self.len)?;
        let bytes = self.len * size_of::<T>();
        // SAFETY: both blocks hold as many bytes, and the copy is nobody else's.
        unsafe { gpu.copy_within(copy.address(), self.address, bytes)? };
        Ok(copy)
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        let mut pool = self.gpu.pool();
        pool.usage.in_use -= self.capacity;
        // A graph's launches go on writing to the blocks of its pool.
        if self.gpu.is_emulated() && self.pool == 0 {
            drop(pool);
            // A failure to free has nobody to tell; the memory is lost with the program.
            let _ = self.gpu.release(self.address, self.capacity);
            return;
        }
        pool.usage.cached += self.capacity;
        pool.free.entry((self.pool, self.capacity)).or_default().push(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in (1..1 << 22).step_by(997) {
            let class = size_class(bytes);
            assert!(class >= bytes && class - bytes <= (bytes / 8).max(512), "{bytes} -> {class}");
        }
    }
}
