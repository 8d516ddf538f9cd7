//! Bytes of a file without copying them: a range of a memory map that is shared by all who hold a part of it.
//! What a file does not hold in the form that is wanted (a transposed tensor, 64-bit floats, a transformed
//! one) is made when somebody first looks at it.

use std::fmt;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::{Arc, LazyLock};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use crate::tensor_file::open_regular;
use crate::{Error, Result};

type Make = Box<dyn FnOnce() -> Vec<u8> + Send>;

#[derive(Clone)]
enum Owner {
    Map(Arc<Mmap>),
    Buffer(Arc<Vec<u8>>),
    Computed(Arc<LazyLock<Vec<u8>, Make>>),
}

/// Bytes that are cheap to clone: a part of a memory map, or of a buffer.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// Maps a whole file. Folders, pipes and devices are refused.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] if it is no regular file.
    pub fn map(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        if file.metadata().map_err(Error::io("read", path))?.len() == 0 {
            return Ok(Self::from(Vec::new()));
        }
        // SAFETY: the mapping is read-only, and every writer of this program replaces files by renaming,
        // so the mapped file does not change; that others do not cut it meanwhile is a condition of use
        // that all memory-mapping readers share.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let range = 0..map.len();
        Ok(Self { owner: Owner::Map(Arc::new(map)), range })
    }

    /// `len` bytes that `make` gives when somebody first looks at them.
    pub fn computed(len: usize, make: impl FnOnce() -> Vec<u8> + Send + 'static) -> Self {
        let make: Make = Box::new(move || {
            let bytes = make();
            assert_eq!(bytes.len(), len, "computed bytes have the length that was promised");
            bytes
        });
        Self { owner: Owner::Computed(Arc::new(LazyLock::new(make))), range: 0..len }
    }

    /// A part; none if it does not lie inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (start <= end && end <= self.range.end)
            .then(|| Self { owner: self.owner.clone(), range: start..end })
    }

    /// Number of bytes, known without making them.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// True if these bytes are a file's own, not a buffer.
    pub fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Map(_))
    }

    /// Tells the system that nobody will look at these bytes soon: pages of a file that lie inside them leave memory,
    /// and come back from the file if somebody does. Does nothing to a buffer.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Owner::Map(map) = &self.owner {
            /// Of whole pages, so that neighbours stay; where pages are larger, those come back too.
            const PAGE: usize = 4096;
            let start = self.range.start.next_multiple_of(PAGE);
            let end = self.range.end / PAGE * PAGE;
            if start < end {
                // SAFETY: the pages are a file's, mapped read-only, so they come back as they were.
                let advised = unsafe {
                    map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
                };
                // Only memory is at stake.
                advised.unwrap_or_default();
            }
        }
    }

    /// True if both are the same place of the same memory.
    pub fn is_same_place(&self, other: &Self) -> bool {
        let same = match (&self.owner, &other.owner) {
            (Owner::Map(a), Owner::Map(b)) => Arc::ptr_eq(a, b),
            (Owner::Buffer(a), Owner::Buffer(b)) => Arc::ptr_eq(a, b),
            (Owner::Computed(a), Owner::Computed(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        same && self.range == other.range
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Owner::Buffer(Arc::new(bytes)), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Map(map) => map,
            Owner::Buffer(buffer) => buffer,
            Owner::Computed(made) => made,
        };
        &all[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = match self.owner {
            Owner::Map(_) => "mapped",
            Owner::Buffer(_) => "owned",
            Owner::Computed(_) => "computed",
        };
        write!(f, "Bytes({owner} {:?})", self.range)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn parts_of_parts() {
        let all = Bytes::from((0..10).collect::<Vec<u8>>());
        let part = all.slice(2..8).unwrap();
        assert_eq!(&*part.slice(1..3).unwrap(), &[3, 4]);
        assert!(part.slice(0..7).is_none() && part.slice(usize::MAX..usize::MAX).is_none());
        assert!(part.is_same_place(&all.slice(2..8).unwrap()) && !part.is_same_place(&all));
    }

    #[test]
    fn computed_once_and_only_when_looked_at() {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let bytes = Bytes::computed(3, || {
            CALLS.fetch_add(1, Ordering::Relaxed);
            vec![1, 2, 3]
        });
        let tail = bytes.slice(1..3).unwrap();
        assert_eq!((bytes.len(), CALLS.load(Ordering::Relaxed)), (3, 0));
        assert_eq!((&*tail, &*bytes), (&[2u8, 3][..], &[1u8, 2, 3][..]));
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn released_bytes_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let all = Bytes::map(&path).unwrap();
        for range in [0..100_000, 5000..90_000, 10..20, 4095..8193, 7..7] {
            let part = all.slice(range.clone()).unwrap();
            assert!(*part == content[range.clone()]);
            part.release();
            assert!(*part == content[range] && *all == content[..]);
        }
        Bytes::from(content).release();
    }

    #[test]
    fn empty_files_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert!(Bytes::map(&path).unwrap().is_empty());
        assert!(Bytes::map(folder.path()).unwrap_err().to_string().contains("folder"));
    }
}
