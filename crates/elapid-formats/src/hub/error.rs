//! What can go wrong with the hub: what was asked for, and what it said.

use std::path::PathBuf;

/// What can go wrong with the hub.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HubError {
    /// Neither the home folder nor a variable says where the cache is.
    #[error("there is no place for downloads: set HF_HOME or HF_HUB_CACHE to a folder")]
    NoCache,
    /// The endpoint cannot be used.
    #[error("the hub's address {endpoint:?} (HF_ENDPOINT) cannot be used: {message}")]
    Endpoint {
        /// The address.
        endpoint: String,
        /// Why not.
        message: String,
    },
    /// There is no such repository, or it does not show itself.
    #[error(
        "the Hugging Face hub has no model {repository}, or it is private{}",
        if *with_token { " and your token does not open it" } else { ": for a private one set HF_TOKEN" }
    )]
    NoRepository {
        /// Its name.
        repository: String,
        /// Whether a token was shown.
        with_token: bool,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repository} has no revision {revision:?} (a branch, tag or commit)")]
    NoRevision {
        /// The repository.
        repository: String,
        /// What was asked for.
        revision: String,
    },
    /// The repository has no such file.
    #[error("{repository} has no file {file:?}; it has: {}", some_of(files))]
    NoFile {
        /// The repository.
        repository: String,
        /// What was asked for.
        file: String,
        /// What there is.
        files: Vec<String>,
    },
    /// The repository has no weights that are read here.
    #[error(
        "{repository} has no weights that can be read (model.safetensors, pytorch_model.bin, either in shards \
         with an index, or one .gguf file); it has: {}",
        some_of(files)
    )]
    NoWeights {
        /// The repository.
        repository: String,
        /// What there is.
        files: Vec<String>,
    },
    /// The repository has several models.
    #[error(
        "{repository} has several .gguf files, choose one with {repository}/FILE: {}",
        some_of(files)
    )]
    Several {
        /// The repository.
        repository: String,
        /// Its models.
        files: Vec<String>,
    },
    /// The repository's owner wants to be asked first.
    #[error("{repository} is open to those whom its owner lets in{}: {message}", token_hint(*with_token))]
    Gated {
        /// The repository.
        repository: String,
        /// Whether a token was shown.
        with_token: bool,
        /// What the hub said.
        message: String,
    },
    /// The token is refused.
    #[error("the hub refuses access to {repository}{}: {message}", token_hint(*with_token))]
    Unauthorised {
        /// The repository.
        repository: String,
        /// Whether a token was shown.
        with_token: bool,
        /// What the hub said.
        message: String,
    },
    /// The hub answered with a failure of its own.
    #[error("the hub answered {status} to {url}: {message}")]
    Status {
        /// The status number.
        status: u16,
        /// What was asked.
        url: String,
        /// What it said.
        message: String,
    },
    /// Nobody could be reached, or the connection broke.
    #[error("cannot reach {url}: {message} (--offline uses only what was downloaded before)")]
    Network {
        /// What was asked.
        url: String,
        /// The system's reason.
        message: String,
    },
    /// It is not in the cache and the network may not be asked.
    #[error(
        "{what} is not completely in {}, and the network may not be asked (--offline or HF_HUB_OFFLINE)",
        cache.display()
    )]
    Offline {
        /// What was asked for.
        what: String,
        /// The cache.
        cache: PathBuf,
    },
    /// An answer is not what the hub's protocol says.
    #[error("the answer to {url} is not the hub's: {message}")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        message: String,
    },
    /// What arrived is not what was announced. It was removed.
    #[error("{file}: {what}: expected {expected}, received {found}; it was removed, try again")]
    Damaged {
        /// The file.
        file: String,
        /// What differs.
        what: &'static str,
        /// What the hub announced.
        expected: String,
        /// What arrived.
        found: String,
    },
}

/// The first of a list that may be long.
fn some_of(files: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut text = files.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if files.len() > SHOWN {
        text += &format!(" and {} more", files.len() - SHOWN);
    }
    if files.is_empty() { "nothing".into() } else { text }
}

fn token_hint(with_token: bool) -> &'static str {
    if with_token { ", and your token does not open it" } else { " (no token found: set HF_TOKEN)" }
}
