//! Models from the Hugging Face hub, kept in the cache that its other clients use.
//!
//! The crate `hf-hub` knows the hub's addresses and where things lie in the cache (`blobs`, `snapshots`,
//! `refs`); its blocking client is the last one without an asynchronous runtime. The transfer itself is here
//! ([`transfer`]), because that client neither checks what it has got nor goes on from where another process
//! stopped, knows no offline mode, and says of every refusal only its number.
//!
//! A file is downloaded to `blobs/ETAG.incomplete` under a lock, checked for its size and hash (the hub's
//! `ETAG` is one), renamed, and linked into the snapshot of its commit. Whatever breaks off is gone on with.

mod client;
mod error;
mod reference;
mod select;
mod store;
mod transfer;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use client::Client;
pub use error::HubError;
pub use reference::Reference;
use select::{Names, Weights};
use store::Store;

use crate::Result;

/// The branch that is meant where none is named.
pub const MAIN: &str = "main";

/// Hears how a download goes on. Files come one after the other.
pub trait Progress {
    /// A file of `size` bytes begins; `have` of them are there from an earlier time.
    fn file(&mut self, name: &str, size: u64, have: u64) {
        let _ = (name, size, have);
    }
    /// So many bytes are there now.
    fn at(&mut self, bytes: u64) {
        let _ = bytes;
    }
    /// The file is complete and in order.
    fn done(&mut self) {}
    /// Something worth knowing: a connection that broke, a wait.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
}

/// For those who do not want to hear.
impl Progress for () {}

/// What to take of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// Configuration, weights, tokenizer.
    Model,
    /// The tokenizer alone.
    Tokenizer,
    /// One file, such as one of several `.gguf`.
    File(&'a str),
}

/// What was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// What `--model` takes: the snapshot's folder, or a single file.
    pub model: PathBuf,
    /// The commit.
    pub commit: String,
    /// The files, in the order in which they were wanted.
    pub files: Vec<PulledFile>,
}

/// One file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledFile {
    /// Its name in the repository.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// How many of them came over the network this time.
    pub received: u64,
}

/// Where the hub is, who asks, and where the cache is.
#[derive(Debug, Clone)]
pub struct Hub {
    cache: PathBuf,
    endpoint: Option<String>,
    token: Option<String>,
    offline: bool,
    retries: u32,
    wait: Duration,
}

impl Hub {
    /// As the environment says: the cache from `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub` or
    /// `XDG_CACHE_HOME/huggingface/hub`, else `.cache/huggingface/hub` in the home folder; the token from
    /// `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the file `HF_TOKEN_PATH` or `HF_HOME/token`; `HF_ENDPOINT`;
    /// `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// If there is no place for a cache, or the endpoint is no address.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(&|name| env::var_os(name), env::home_dir())
    }

    fn from_variables(
        variable: &dyn Fn(&str) -> Option<OsString>,
        user: Option<PathBuf>,
    ) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| {
            let value = set(name)?.to_string_lossy().trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        let home = set("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(Path::new(&set("XDG_CACHE_HOME")?).join("huggingface")))
            .or_else(|| Some(user?.join(".cache").join("huggingface")));
        let cache = set("HF_HUB_CACHE")
            .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
            .map(PathBuf::from)
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or(HubError::NoCache)?;
        let token_file = set("HF_TOKEN_PATH").map(PathBuf::from);
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let path = token_file.or_else(|| Some(home?.join("token")))?;
            let token = std::fs::read_to_string(path).ok()?.trim().to_owned();
            (!token.is_empty()).then_some(token)
        });
        let on = |value: String| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase());
        Ok(Self {
            cache,
            endpoint: text("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
            token,
            offline: text("HF_HUB_OFFLINE").is_some_and(on),
            retries: 5,
            wait: Duration::from_millis(500),
        })
    }

    /// Another place for the cache.
    pub fn with_cache(self, cache: impl Into<PathBuf>) -> Self {
        Self { cache: cache.into(), ..self }
    }

    /// Another address of the hub.
    pub fn with_endpoint(self, endpoint: &str) -> Self {
        Self { endpoint: Some(endpoint.trim_end_matches('/').to_owned()), ..self }
    }

    /// Another token, or none.
    pub fn with_token(self, token: Option<String>) -> Self {
        Self { token, ..self }
    }

    /// Never asks the network.
    pub fn offline(self, offline: bool) -> Self {
        Self { offline: offline || self.offline, ..self }
    }

    /// How often a broken transfer is tried again without any progress, and how long to wait before the
    /// first time (twice as long before each one after it).
    pub fn with_retries(self, retries: u32, wait: Duration) -> Self {
        Self { retries, wait, ..self }
    }

    /// True if the network may not be asked.
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// What is wanted of a model, if all of it is in the cache; never asks the network.
    pub fn cached(&self, reference: &Reference, wanted: Wanted<'_>) -> Option<PathBuf> {
        let store = Store::new(&self.cache, reference);
        let commit = store.commit()?;
        store.complete(&commit, meant(reference, wanted)).map(|found| found.model)
    }

    /// Brings the files of a model into the cache, those that are not there yet, and says where they are.
    /// Offline, what is there must do.
    ///
    /// # Errors
    /// [`HubError`] if the hub refuses, cannot be reached, or sends something else than it says; an io error
    /// if the cache cannot be written.
    pub fn pull(
        &self,
        reference: &Reference,
        wanted: Wanted<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Pulled> {
        let store = Store::new(&self.cache, reference);
        let wanted = meant(reference, wanted);
        if self.offline {
            let found = store.commit().and_then(|commit| store.complete(&commit, wanted));
            return Ok(found.ok_or_else(|| HubError::Offline {
                what: reference.to_string(),
                cache: self.cache.clone(),
            })?);
        }
        let client = Client::new(self, reference)?;
        let listing = client.listing()?;
        let commit = listing.commit.clone();
        let names = Names::new(reference, &listing.files);
        let (mut files, index) = match wanted {
            Wanted::File(file) => (vec![names.file(file)?], None),
            Wanted::Tokenizer => (names.tokenizer()?, None),
            Wanted::Model => match names.weights()? {
                Weights::One(file) => (names.beside(&file), None),
                Weights::Shards(index) => (names.beside(&index), Some(index)),
            },
        };
        let mut pulled = Vec::new();
        for name in &files {
            pulled.push(store.fetch(&client, &commit, name, progress)?);
        }
        if let Some(index) = &index {
            let shards = select::shards(&store.place(&commit, index))?;
            for name in &shards {
                pulled.push(store.fetch(&client, &commit, &names.file(name)?, progress)?);
            }
            files.extend(shards);
        }
        store.remember(&commit)?;
        let model = match files.as_slice() {
            [file] => store.place(&commit, file),
            _ => store.snapshot(&commit),
        };
        Ok(Pulled { model, commit, files: pulled })
    }
}

/// A reference to a file means that file.
fn meant<'a>(reference: &'a Reference, wanted: Wanted<'a>) -> Wanted<'a> {
    match (&reference.file, wanted) {
        (Some(file), Wanted::Model) => Wanted::File(file),
        (_, wanted) => wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        let find = |name: &str| variables.get(name).map(OsString::from);
        Hub::from_variables(&find, Some("/home/me".into())).unwrap()
    }

    #[test]
    fn the_cache_is_where_the_other_clients_have_it() {
        let cache = |variables: &[(&str, &str)]| hub(variables).cache;
        assert_eq!(cache(&[]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        let home = [("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")];
        assert_eq!(cache(&home), Path::new("/h/hub"));
        let old = [("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")];
        assert_eq!(cache(&old), Path::new("/old"));
        let new = [("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")];
        assert_eq!(cache(&new), Path::new("/new"));
        assert!(Hub::from_variables(&|_| None, None).is_err());
    }

    #[test]
    fn the_token_is_where_the_other_clients_have_it() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let own = folder.path().join("own").display().to_string();
        std::fs::write(folder.path().join("token"), " from-home\n").unwrap();
        std::fs::write(&own, "from-own").unwrap();
        let token = |variables: &[(&str, &str)]| {
            hub(&[&[("HF_HOME", home)], variables].concat()).token.unwrap()
        };
        assert_eq!(token(&[]), "from-home");
        assert_eq!(token(&[("HF_TOKEN_PATH", &own)]), "from-own");
        assert_eq!(token(&[("HF_TOKEN_PATH", &own), ("HF_TOKEN", "direct")]), "direct");
        assert_eq!(token(&[("HUGGING_FACE_HUB_TOKEN", "old")]), "old");
        assert_eq!(hub(&[("HF_HOME", "/none")]).token, None);
    }

    #[test]
    fn offline_is_a_word_or_a_number() {
        for (value, expected) in [("1", true), ("TRUE", true), ("0", false), ("", false)] {
            assert_eq!(hub(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value:?}");
        }
        assert!(hub(&[]).offline(true).is_offline());
    }
}
