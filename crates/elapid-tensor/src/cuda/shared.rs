//! Memory of the host that kernels write to, so that results arrive without anybody waiting for the whole GPU.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::error::Result;
use super::gpu::{Driver, Gpu};

/// An owned run of elements in the host's memory, at the same address for kernels.
#[derive(Debug)]
pub struct SharedBuffer<T> {
    gpu: Gpu,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl Gpu {
    /// `len` zeros in memory of the host that kernels of this GPU can write to.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn shared<T: Pod>(&self, len: usize) -> Result<SharedBuffer<T>> {
        let bytes = (len * size_of::<T>()).max(1);
        let _turn = self.turn();
        let address = match self.driver() {
            Driver::Card(card) => card.allocate_on_host(bytes)?,
            Driver::Host => self.allocate(bytes)?,
        };
        // SAFETY: just allocated with as many bytes.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(SharedBuffer { gpu: self.clone(), address, len, element: PhantomData })
    }
}

impl<T: Pod> SharedBuffer<T> {
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

    /// Element `index` as it is now. The caller has waited for the kernel that writes it.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.len);
        // SAFETY: within the buffer, of a type that any bytes are a value of; a card may write at the same time.
        unsafe { (self.address as *const T).add(index).read_volatile() }
    }
}

impl<T> Drop for SharedBuffer<T> {
    fn drop(&mut self) {
        let bytes = (self.len * size_of::<T>()).max(1);
        // Launches may still write. Waiting for them would spoil what another thread records; dropped by a thread that
        // records, the memory stays with the launches that were written down. A failure has nobody to tell.
        let turn = self.gpu.turn();
        let _ = turn.outside("cuMemFreeHost", &self.gpu).and_then(|()| match self.gpu.driver() {
            Driver::Card(card) => {
                card.synchronize()?;
                card.release_on_host(self.address)
            }
            Driver::Host => self.gpu.release(self.address, bytes),
        });
    }
}
