//! The hub's protocol: what a repository holds, what a file is, and what a refusal means.

use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use super::reference::is_file;
use super::{Hub, HubError, Reference};
use crate::Result;

/// A list of files is some kilobytes; one of a repository with thousands of them a few megabytes.
const LARGEST_ANSWER: u64 = 64 << 20;
const MOST_REDIRECTS: usize = 8;

/// What a repository holds at a revision.
#[derive(Debug)]
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<String>,
}

/// What the hub says of a file before sending it.
#[derive(Debug, Clone)]
pub(super) struct Metadata {
    /// A SHA-256 of large files, git's SHA-1 of others: its name in the cache.
    pub etag: String,
    pub size: u64,
}

/// Asks the hub about one repository.
pub(super) struct Client {
    agent: Agent,
    repository: String,
    revision: String,
    token: Option<String>,
    /// Scheme, host and port of the hub: a token goes nowhere else.
    authority: String,
    listing: String,
    cache: Cache,
    endpoint: Option<String>,
    pub retries: u32,
    pub wait: Duration,
}

/// The address of files, as hf-hub makes it.
fn api(cache: &Cache, endpoint: Option<&str>, repo: Repo) -> Result<ApiRepo, HubError> {
    let mut builder = ApiBuilder::from_cache(cache.clone()).with_progress(false);
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint.to_owned());
    }
    let api = builder.build().map_err(|error| HubError::Endpoint {
        endpoint: endpoint.unwrap_or_default().into(),
        message: error.to_string(),
    })?;
    Ok(api.repo(repo))
}

impl Client {
    pub(super) fn new(hub: &Hub, reference: &Reference) -> Result<Self> {
        let (repository, revision) = (reference.repository.clone(), reference.revision.clone());
        let repo = Repo::with_revision(repository.clone(), RepoType::Model, revision.clone());
        let (cache, endpoint) = (Cache::new(hub.cache.clone()), hub.endpoint.clone());
        let path = repo.api_url();
        let example = api(&cache, endpoint.as_deref(), repo)?.url("x");
        let base = example.split(&format!("/{repository}/resolve/")).next().unwrap_or_default();
        let authority = authority(base).ok_or_else(|| HubError::Endpoint {
            endpoint: base.to_owned(),
            message: "expected http://HOST or https://HOST".into(),
        })?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("elapid/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)));
        Ok(Self {
            agent: config.build().into(),
            listing: format!("{base}/api/{path}"),
            repository,
            revision,
            token: hub.token.clone(),
            authority,
            cache,
            endpoint,
            retries: hub.retries,
            wait: hub.wait,
        })
    }

    /// The commit of the revision, and its files.
    pub(super) fn listing(&self) -> Result<Listing, HubError> {
        let url = &self.listing;
        let mut response = self.patiently(|| self.ask(url, Ask::Get { from: 0 }))?;
        let body = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        let body = body.map_err(|error| network(url, &error))?;
        let answer = |message: &str| HubError::Answer { url: url.clone(), message: message.into() };
        let value: Value =
            serde_json::from_slice(&body).map_err(|error| answer(&format!("no JSON: {error}")))?;
        // The commit becomes a folder of the cache.
        let commit = value["sha"].as_str().filter(|sha| is_hash(sha, 40));
        let commit = commit.ok_or_else(|| answer("it names no commit (\"sha\")"))?;
        let files = value["siblings"].as_array().ok_or_else(|| answer("it lists no files"))?;
        let files = files.iter().filter_map(|file| file["rfilename"].as_str());
        let files = files.filter(|file| is_file(file)).map(str::to_owned).collect();
        Ok(Listing { commit: commit.into(), files })
    }

    /// Where a file of a commit is.
    pub(super) fn url(&self, commit: &str, file: &str) -> Result<String, HubError> {
        let repo = Repo::with_revision(self.repository.clone(), RepoType::Model, commit.to_owned());
        Ok(api(&self.cache, self.endpoint.as_deref(), repo)?.url(&escape(file)))
    }

    /// Hash and size of a file.
    pub(super) fn metadata(&self, url: &str) -> Result<Metadata, HubError> {
        let response = self.patiently(|| self.ask(url, Ask::Head))?;
        let header = |names: [&str; 2]| {
            let values = names.into_iter().filter_map(|name| response.headers().get(name));
            values.filter_map(|value| value.to_str().ok()).next()
        };
        let answer = |message: String| HubError::Answer { url: url.to_owned(), message };
        let etag = header(["x-linked-etag", "etag"])
            .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned())
            .ok_or_else(|| answer("it has no ETag".into()))?;
        if !etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') || etag.is_empty() {
            return Err(answer(format!("ETag {etag:?} is no hash")));
        }
        let size = header(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| answer("it has no size".into()))?;
        Ok(Metadata { etag, size })
    }

    /// The body of a file from byte `from` on, if the other side can do that: see its status.
    pub(super) fn open(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        self.ask(url, Ask::Get { from })
    }

    /// Tries again what may pass.
    fn patiently<R>(&self, ask: impl Fn() -> Result<R, HubError>) -> Result<R, HubError> {
        let mut tries = 0;
        loop {
            match ask() {
                Err(error) if passes(&error) && tries < self.retries.min(2) => {
                    std::thread::sleep(self.wait * 2u32.pow(tries));
                    tries += 1;
                }
                other => return other,
            }
        }
    }

    /// One question; redirects are followed, for metadata only on the hub itself, whose answer has the file's
    /// hash. A refusal becomes an error.
    fn ask(&self, url: &str, ask: Ask) -> Result<Response<Body>, HubError> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let mut request = match ask {
                Ask::Head => self.agent.head(&url),
                Ask::Get { .. } => self.agent.get(&url),
            };
            if let Ask::Get { from: from @ 1.. } = ask {
                request = request.header("Range", format!("bytes={from}-"));
            }
            if let Some(token) = &self.token
                && authority(&url).as_ref() == Some(&self.authority)
            {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| network(&url, &error))?;
            let status = response.status();
            if !status.is_redirection() {
                let fine = status.is_success() || status.as_u16() == 416;
                return if fine { Ok(response) } else { Err(self.refusal(&url, response)) };
            }
            let to = response.headers().get("location").and_then(|to| to.to_str().ok());
            let Some(next) = to.and_then(|to| join(&url, to)) else {
                let message = "it leads nowhere (no usable Location)".into();
                return Err(HubError::Answer { url, message });
            };
            let leaves = authority(&next).as_ref() != Some(&self.authority);
            if matches!(ask, Ask::Head) && leaves {
                return Ok(response);
            }
            url = next;
        }
        Err(HubError::Answer { url, message: "it leads in circles".into() })
    }

    /// What a refusal means. The hub explains itself in headers; a repository that does not exist answers
    /// like one that is private.
    fn refusal(&self, url: &str, mut response: Response<Body>) -> HubError {
        let status = response.status().as_u16();
        let header = |name: &str| {
            response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or("").to_owned()
        };
        let (code, mut message) = (header("x-error-code"), header("x-error-message"));
        if message.is_empty() {
            let body = response.body_mut().with_config().limit(1 << 16).read_to_string();
            let body = body.unwrap_or_default();
            let error = serde_json::from_str::<Value>(&body).ok();
            let error = error.and_then(|value| value["error"].as_str().map(str::to_owned));
            message = error.unwrap_or_else(|| body.lines().next().unwrap_or("").trim().to_owned());
        }
        if message.is_empty() {
            message = "no reason given".into();
        }
        let repository = self.repository.clone();
        let with_token = self.token.is_some();
        match (code.as_str(), status) {
            ("GatedRepo", _) => HubError::Gated { repository, with_token, message },
            ("RevisionNotFound", _) => {
                HubError::NoRevision { repository, revision: self.revision.clone() }
            }
            ("RepoNotFound", _) => HubError::NoRepository { repository, with_token },
            ("EntryNotFound", _) => {
                let file = url.rsplit('/').next().unwrap_or_default().to_owned();
                HubError::NoFile { repository, file, files: Vec::new() }
            }
            (_, 401) if !with_token => HubError::NoRepository { repository, with_token },
            (_, 401 | 403) => HubError::Unauthorised { repository, with_token, message },
            (_, 404) if url == self.listing => HubError::NoRepository { repository, with_token },
            _ => HubError::Status { status, url: url.to_owned(), message },
        }
    }
}

#[derive(Clone, Copy)]
enum Ask {
    Head,
    Get { from: u64 },
}

/// True for what may be otherwise in a moment.
pub(super) fn passes(error: &HubError) -> bool {
    match error {
        HubError::Network { .. } => true,
        HubError::Status { status, .. } => *status == 429 || *status == 408 || *status >= 500,
        _ => false,
    }
}

/// A connection that failed.
pub(super) fn network(url: &str, error: &ureq::Error) -> HubError {
    let message = match error {
        ureq::Error::HostNotFound => "the host's name is not known (no network?)".into(),
        other => other.to_string(),
    };
    HubError::Network { url: url.to_owned(), message }
}

/// True for a hexadecimal number of so many digits.
pub(super) fn is_hash(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// `scheme://host:port` of an address.
fn authority(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"))?;
    Some(format!("{scheme}://{}", uri.authority()?))
}

/// Where a `Location` leads.
fn join(url: &str, location: &str) -> Option<String> {
    if location.contains("://") {
        return authority(location).map(|_| location.to_owned());
    }
    // The hub's own redirects are whole paths.
    let rest = location.strip_prefix('/').filter(|rest| !rest.starts_with('/'))?;
    Some(format!("{}/{rest}", authority(url)?))
}

/// Characters of a file name that mean something else in an address.
fn escape(file: &str) -> String {
    let mut text = String::with_capacity(file.len());
    for byte in file.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                text.push(char::from(byte));
            }
            other => text += &format!("%{other:02X}"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(authority("http://a:1/b?c").as_deref(), Some("http://a:1"));
        assert_eq!(authority("ftp://a/b"), None);
        assert_eq!(authority("a/b"), None);
        assert_eq!(join("https://a/b/c", "/d?e").as_deref(), Some("https://a/d?e"));
        assert_eq!(join("https://a/b", "http://x/y").as_deref(), Some("http://x/y"));
        assert_eq!(join("https://a/b", "//x/y"), None);
        assert_eq!(join("https://a/b", "file:///etc"), None);
        assert_eq!(escape("a b/ü%.gguf"), "a%20b/%C3%BC%25.gguf");
    }
}
