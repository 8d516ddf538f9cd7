//! The cache on disk: `models--OWNER--NAME/blobs` has the files by their hash, `snapshots/COMMIT` links to
//! them by name, `refs/REVISION` says which commit a branch or tag was, `.locks` beside has one lock a file.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::client::{Client, is_hash};
use super::select::{self, Names, Weights};
use super::{Progress, Pulled, PulledFile, Reference, Wanted, transfer};
use crate::{Error, Result, atomic};

/// One repository's part of the cache.
pub(super) struct Store<'a> {
    reference: &'a Reference,
    repo: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl<'a> Store<'a> {
    pub(super) fn new(cache: &Path, reference: &'a Reference) -> Self {
        let repo = Repo::with_revision(
            reference.repository.clone(),
            RepoType::Model,
            reference.revision.clone(),
        );
        let name = repo.folder_name();
        Self {
            reference,
            folder: cache.join(&name),
            locks: cache.join(".locks").join(name),
            repo: Cache::new(cache.to_path_buf()).repo(repo),
        }
    }

    /// The commit that the revision was when it was last asked for; a commit is itself.
    pub(super) fn commit(&self) -> Option<String> {
        let revision = &self.reference.revision;
        if is_hash(revision, 40) {
            return Some(revision.clone());
        }
        let mut text = String::new();
        let file = File::open(self.folder.join("refs").join(revision)).ok()?;
        file.take(64).read_to_string(&mut text).ok()?;
        let commit = text.trim();
        is_hash(commit, 40).then(|| commit.to_owned())
    }

    /// Notes which commit the revision is.
    pub(super) fn remember(&self, commit: &str) -> Result<()> {
        if is_hash(&self.reference.revision, 40) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(&self.reference.revision);
        let parent = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        atomic::write_file(&path, |out| out.write_all(commit.as_bytes()))
    }

    /// The folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    /// A file of a commit.
    pub(super) fn place(&self, commit: &str, file: &str) -> PathBuf {
        file.split('/').fold(self.snapshot(commit), |path, part| path.join(part))
    }

    /// What is in the cache, if all that is wanted is there.
    pub(super) fn complete(&self, commit: &str, wanted: Wanted<'_>) -> Option<Pulled> {
        let snapshot = self.snapshot(commit);
        let there = files_in(&snapshot);
        let names = Names::new(self.reference, &there);
        let files = match wanted {
            Wanted::File(file) => vec![names.file(file).ok()?],
            Wanted::Tokenizer => names.tokenizer().ok()?,
            Wanted::Model => match names.weights().ok()? {
                Weights::One(file) => names.beside(&file),
                Weights::Shards(index) => {
                    let shards = select::shards(&self.place(commit, &index)).ok()?;
                    let all = shards.iter().all(|shard| there.contains(shard));
                    all.then(|| names.beside(&index).into_iter().chain(shards).collect())?
                }
            },
        };
        // A model in a folder has its configuration; one in a file has it inside.
        let single = files.len() == 1;
        if wanted == Wanted::Model && !single && !files.iter().any(|file| file == "config.json") {
            return None;
        }
        let model = if single { self.place(commit, &files[0]) } else { snapshot };
        if wanted == Wanted::Model && single && !files[0].ends_with(".gguf") {
            return None;
        }
        let pulled = files.into_iter().map(|name| {
            let path = self.place(commit, &name);
            let bytes = fs::metadata(&path).ok()?.len();
            Some(PulledFile { name, path, bytes, received: 0 })
        });
        Some(Pulled { model, commit: commit.into(), files: pulled.collect::<Option<_>>()? })
    }

    /// Brings a file of a commit into the cache, unless it is there.
    pub(super) fn fetch(
        &self,
        client: &Client,
        commit: &str,
        name: &str,
        progress: &mut dyn Progress,
    ) -> Result<PulledFile> {
        let path = self.place(commit, name);
        // A commit's files never change.
        if let Ok(metadata) = fs::metadata(&path)
            && metadata.is_file()
        {
            let bytes = metadata.len();
            return Ok(PulledFile { name: name.into(), path, bytes, received: 0 });
        }
        let url = client.url(commit, name)?;
        let metadata = client.metadata(&url)?;
        let blob = self.repo.blob_path(&metadata.etag);
        for folder in [blob.parent(), Some(self.locks.as_path()), path.parent()] {
            let folder = folder.unwrap_or(&self.folder);
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        let lock = self.lock(&metadata.etag, name, progress)?;
        // Another process may have been faster.
        let there = fs::metadata(&blob).is_ok_and(|blob| blob.len() == metadata.size);
        let received = match there {
            true => 0,
            false => transfer::download(client, &url, name, &metadata, &blob, progress)?,
        };
        link(&blob, &path, name).map_err(Error::io("create", &path))?;
        drop(lock);
        Ok(PulledFile { name: name.into(), path, bytes: metadata.size, received })
    }

    /// Waits until no other process downloads the same file. The system gives the lock back with the process.
    fn lock(&self, etag: &str, name: &str, progress: &mut dyn Progress) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(Error::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                progress.note(&format!("waiting for another process that downloads {name}"));
                file.lock().map_err(Error::io("lock", &path))?;
            }
            // A file system without locks.
            Err(fs::TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(fs::TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
        Ok(file)
    }
}

/// The files of a snapshot, folders in it included, by their names in the repository.
fn files_in(snapshot: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![(snapshot.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}"))
            else {
                continue;
            };
            // Through the link: one to a blob that is gone is no file.
            match fs::metadata(entry.path()) {
                Ok(metadata) if metadata.is_file() => found.push(name),
                Ok(metadata) if metadata.is_dir() && prefix.is_empty() => {
                    folders.push((entry.path(), format!("{name}/")));
                }
                _ => {}
            }
        }
    }
    found.sort_unstable();
    found
}

/// A relative link, so that the cache can be moved; where links are not to be had, a second name or a copy.
fn link(blob: &Path, path: &Path, name: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        // It leads to nothing, or the file would have been taken as it is.
        Ok(metadata) if metadata.is_symlink() => fs::remove_file(path)?,
        _ => {}
    }
    let depth = name.matches('/').count();
    let mut target = PathBuf::from("../../");
    target.extend((0..depth).map(|_| ".."));
    target.push("blobs");
    target.extend(blob.file_name());
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&target, path);
    #[cfg(windows)]
    let linked = std::os::windows::fs::symlink_file(&target, path);
    #[cfg(not(any(unix, windows)))]
    let linked = Err::<(), _>(io::Error::from(io::ErrorKind::Unsupported));
    linked.or_else(|_| fs::hard_link(blob, path)).or_else(|_| fs::copy(blob, path).map(|_| ()))
}
