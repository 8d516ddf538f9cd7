//! Files and folders that appear whole or not at all.
//!
//! New content is written beside its target under a hidden name, synchronised to the disk and renamed over
//! the target; a full disk or a killed process therefore leaves the old content as it was. A process that
//! was killed leaves its hidden file or folder behind; the next writer of the same place removes it. What
//! tells a leftover from the work of a live process is a file lock, which the system releases with the
//! process: on the hidden file itself, or on a file beside the hidden folder.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

const WRITING: &str = "tmp";
const REPLACED: &str = "old";
const LOCK: &str = "lock";

/// Writes a file through `write`, which sees a buffered writer. An existing file is replaced; a symbolic
/// link is followed; a device or pipe is written directly.
///
/// # Errors
/// [`Error::Io`] with the path; the old file is then untouched and nothing is left beside it.
pub fn write_file<R>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<R>,
) -> Result<R> {
    let target = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => {
            fs::canonicalize(path).map_err(Error::io("follow", path))?
        }
        _ => path.to_path_buf(),
    };
    match fs::metadata(&target) {
        Ok(metadata) if metadata.is_dir() => {
            return Err(Error::format(path, "expected a file to write, found a folder"));
        }
        Ok(metadata) if !metadata.is_file() => {
            let mut device =
                OpenOptions::new().write(true).open(&target).map_err(Error::io("open", path))?;
            return write(&mut device).map_err(Error::io("write", path));
        }
        _ => {}
    }
    let parent = parent_of(&target);
    let name = name_of(&target)?;
    for leftover in hidden_siblings(parent, Some(name), WRITING) {
        if leftover.is_file() && is_abandoned(&leftover) {
            // Failing to clean up never fails a save.
            let _ = fs::remove_file(&leftover);
        }
    }
    let (hidden, file) = create_locked(parent, name, WRITING).map_err(Error::io("write", path))?;
    let temporary = Temporary(hidden);
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let result = write(&mut writer).map_err(Error::io("write", path))?;
    let file = writer.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("write", path))?;
    // Elsewhere than on Unix an open file may not be renamed.
    let locked = cfg!(unix).then_some(file);
    fs::rename(&temporary.0, &target).map_err(Error::io("replace", path))?;
    drop(locked);
    sync_folder(parent);
    Ok(result)
}

/// Writes a folder: `fill` puts files into a new hidden folder, which then takes the place of `path`.
/// Its parent is created if there is none.
///
/// # Errors
/// Those of `fill`, or [`Error::Io`]; the old folder is then in place.
pub fn write_folder<R>(path: &Path, fill: impl FnOnce(&Path) -> Result<R>) -> Result<R> {
    let parent = parent_of(path);
    let name = name_of(path)?;
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    clean_leftovers(parent);

    let (lock, locked) = create_locked(parent, name, LOCK).map_err(Error::io("write", path))?;
    let lock = Temporary(lock);
    // Declared after its lock, so that it is gone before the lock is.
    let temporary = Temporary(lock.0.with_extension(WRITING));
    fs::create_dir(&temporary.0).map_err(Error::io("create", path))?;
    let result = fill(&temporary.0)?;
    sync_folder(&temporary.0);
    if path.exists() {
        let old = lock.0.with_extension(REPLACED);
        fs::rename(path, &old).map_err(Error::io("replace", path))?;
        if let Err(error) = fs::rename(&temporary.0, path) {
            let _ = fs::rename(&old, path);
            return Err(Error::io("replace", path)(error));
        }
        sync_folder(parent);
        let _ = fs::remove_dir_all(&old);
    } else {
        fs::rename(&temporary.0, path).map_err(Error::io("write", path))?;
    }
    sync_folder(parent);
    drop(locked);
    Ok(result)
}

/// Removes a folder so that it is never seen half removed.
///
/// # Errors
/// If it cannot be moved out of the way.
pub fn remove_folder(path: &Path) -> Result<()> {
    let parent = parent_of(path);
    let hidden = Temporary(hidden_name(parent, name_of(path)?, WRITING));
    fs::rename(path, &hidden.0).map_err(Error::io("remove", path))
}

/// Removes what killed writers of folders in `parent` have left, and puts a folder back that one of them
/// had already moved away but not replaced. What live writers are at is left alone.
pub fn clean_leftovers(parent: &Path) {
    for old in hidden_siblings(parent, None, REPLACED) {
        let Some(name) = old.file_name().and_then(original_name) else { continue };
        let target = parent.join(name);
        if !is_abandoned(&old.with_extension(LOCK)) {
            continue;
        }
        if target.exists() {
            let _ = fs::remove_dir_all(&old);
        } else {
            let _ = fs::rename(&old, &target);
        }
    }
    for leftover in hidden_siblings(parent, None, WRITING) {
        if leftover.is_dir() && is_abandoned(&leftover.with_extension(LOCK)) {
            let _ = fs::remove_dir_all(&leftover);
        }
    }
    for lock in hidden_siblings(parent, None, LOCK) {
        if is_abandoned(&lock) {
            let _ = fs::remove_file(&lock);
        }
    }
}

/// True if no live process holds this file, be it there or not. Where there are no locks nothing is known
/// to be abandoned.
fn is_abandoned(lock: &Path) -> bool {
    match File::open(lock) {
        Ok(file) => file.try_lock().is_ok(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// A new hidden file, locked.
fn create_locked(parent: &Path, name: &OsStr, suffix: &str) -> io::Result<(PathBuf, File)> {
    loop {
        let path = hidden_name(parent, name, suffix);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        // Between its creation and its lock another process may take the file for a leftover.
        let taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        if !taken && path.exists() {
            return Ok((path, file));
        }
    }
}

/// A hidden file or folder that goes away unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        match fs::symlink_metadata(&self.0) {
            Ok(metadata) if metadata.is_dir() => drop(fs::remove_dir_all(&self.0)),
            Ok(_) => drop(fs::remove_file(&self.0)),
            Err(_) => {}
        }
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn name_of(path: &Path) -> Result<&OsStr> {
    path.file_name().ok_or_else(|| Error::format(path, "has no file name"))
}

/// `.{name}.{process}-{number}.{suffix}`, new for every call.
fn hidden_name(parent: &Path, name: &OsStr, suffix: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // Several containers may have the same process number; the clock keeps their names apart.
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| u64::from(time.subsec_nanos()));
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}-{number}-{clock}.{suffix}", std::process::id()));
    parent.join(hidden)
}

/// The name that a hidden name was made from.
fn original_name(hidden: &OsStr) -> Option<String> {
    let hidden = Path::new(hidden.to_str()?.strip_prefix('.')?);
    let (name, numbers) = hidden.file_stem()?.to_str()?.rsplit_once('.')?;
    let ours = numbers.split('-').count() == 3
        && numbers.split('-').all(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    (ours && !name.is_empty()).then(|| name.to_owned())
}

/// Hidden entries of `parent` with that suffix, made for `name` or for any name.
fn hidden_siblings(parent: &Path, name: Option<&OsStr>, suffix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension().is_some_and(|extension| extension == suffix)
                && path
                    .file_name()
                    .and_then(original_name)
                    .is_some_and(|own| name.is_none_or(|name| name == own.as_str()))
        })
        .collect()
}

/// Makes a rename durable. Folders cannot be opened everywhere, and not every file system supports it.
fn sync_folder(path: &Path) {
    if cfg!(unix)
        && let Ok(folder) = File::open(path)
    {
        let _ = folder.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Fails as a full disk does, after so many bytes.
    struct Full<'a>(&'a mut dyn Write, usize);

    impl Write for Full<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.1 == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let written = self.0.write(&bytes[..bytes.len().min(self.1)])?;
            self.1 -= written;
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_file(&path, |out| out.write_all(b"old")).unwrap();
        for room in [0, 1, 1000] {
            let error = write_file(&path, |out| Full(out, room).write_all(&[7; 4096])).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert_eq!(fs::read(&path).unwrap(), b"old");
            assert_eq!(names(folder.path()), ["file"]);
        }
        write_file(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn leftovers_go_but_a_live_writer_keeps_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let dead = folder.path().join(".file.999999-0-0.tmp");
        let other = folder.path().join(".file.notes.tmp");
        fs::write(&dead, b"half").unwrap();
        fs::write(&other, b"mine").unwrap();
        write_file(&path, |out| {
            assert!(!dead.exists());
            out.write_all(b"outer ")?;
            // A second writer of the same file must not take the first one's work for a leftover.
            write_file(&path, |inner| inner.write_all(b"inner")).unwrap();
            out.write_all(b"wins")
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"outer wins");
        assert_eq!(names(folder.path()), [".file.notes.tmp", "file"]);
    }

    #[test]
    fn folders_are_replaced_whole_and_leftovers_cleaned() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("step-1");
        let put = |text: &'static str| {
            move |inside: &Path| write_file(&inside.join("a"), |out| out.write_all(text.as_bytes()))
        };
        write_folder(&path, put("one")).unwrap();
        let failed: Result<()> = write_folder(&path, |inside| {
            put("two")(inside)?;
            Err(Error::format(inside, "no room"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(path.join("a")).unwrap(), b"one");
        assert_eq!(names(folder.path()), ["step-1"]);

        // A live writer's folder is left alone.
        write_folder(&path, |inside| {
            clean_leftovers(folder.path());
            assert_eq!(names(folder.path()).len(), 3);
            put("one")(inside)
        })
        .unwrap();
        assert_eq!(names(folder.path()), ["step-1"]);

        // Killed while filling, and killed between the two renames.
        fs::create_dir(folder.path().join(".step-2.1-2-3.tmp")).unwrap();
        fs::rename(&path, folder.path().join(".step-1.1-2-3.old")).unwrap();
        clean_leftovers(folder.path());
        assert_eq!(names(folder.path()), ["step-1"]);
        assert_eq!(fs::read(path.join("a")).unwrap(), b"one");

        write_folder(&path, put("two")).unwrap();
        assert_eq!(fs::read(path.join("a")).unwrap(), b"two");
        remove_folder(&path).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_written() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::write(&target, b"old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_file(&link, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        write_file(Path::new("/dev/null"), |out| out.write_all(b"gone")).unwrap();
        assert!(write_file(folder.path(), |out| out.write_all(b"no")).is_err());
    }
}
