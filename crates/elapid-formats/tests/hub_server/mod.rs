//! A hub on 127.0.0.1 that speaks the protocol of the real one, and breaks where a test wants it to. Small
//! files come from the hub itself, with git's hash; large ones from another address, with their SHA-256.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ring::digest;

/// From here on a file is large.
const LARGE: usize = 1000;

/// One repository: its revisions, and the files of each commit.
#[derive(Default)]
pub struct Repository {
    pub revisions: BTreeMap<String, String>,
    pub commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Only with this token.
    pub token: Option<String>,
    /// Open to nobody, with this reason.
    pub gated: Option<String>,
    /// It has moved there.
    pub moved: Option<String>,
}

/// What goes wrong, once each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends after so many bytes of a body.
    Cut(usize),
    /// This status instead of the file.
    Status(u16),
    /// One byte of the body is another one.
    Flip,
    /// The wish to go on from the middle is ignored.
    WholeFile,
}

/// One request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    /// At the address of large files.
    pub elsewhere: bool,
}

#[derive(Default)]
struct Shared {
    repositories: HashMap<String, Repository>,
    faults: HashMap<String, Vec<Fault>>,
    seen: Vec<Seen>,
    /// The address of large files.
    elsewhere: String,
}

/// The running server.
pub struct HubServer {
    shared: Arc<Mutex<Shared>>,
    pub endpoint: String,
}

/// A commit's name.
pub fn commit(number: u8) -> String {
    format!("{number:02x}").repeat(20)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a file in the cache.
pub fn etag(content: &[u8]) -> String {
    if content.len() >= LARGE {
        return hex(digest::digest(&digest::SHA256, content).as_ref());
    }
    let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(format!("blob {}\0", content.len()).as_bytes());
    hash.update(content);
    hex(hash.finish().as_ref())
}

impl HubServer {
    pub fn start() -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let main = TcpListener::bind("127.0.0.1:0").unwrap();
        let large = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", main.local_addr().unwrap());
        shared.lock().unwrap().elsewhere = format!("http://{}", large.local_addr().unwrap());
        for (listener, elsewhere) in [(main, false), (large, true)] {
            let shared = shared.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = shared.clone();
                    std::thread::spawn(move || serve(&stream, &shared, elsewhere));
                }
            });
        }
        Self { shared, endpoint }
    }

    /// A repository whose branch `main` has these files.
    pub fn with(self, name: &str, files: &[(&str, Vec<u8>)]) -> Self {
        self.add(name, "main", &commit(1), files);
        self
    }

    /// A revision of a repository.
    pub fn add(&self, name: &str, revision: &str, commit: &str, files: &[(&str, Vec<u8>)]) {
        self.change(name, |repository| {
            repository.revisions.insert(revision.into(), commit.into());
            let files = files.iter().map(|(name, content)| ((*name).into(), content.clone()));
            repository.commits.insert(commit.into(), files.collect());
        });
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Repository)) {
        change(self.shared.lock().unwrap().repositories.entry(name.into()).or_default());
    }

    /// What goes wrong at the next requests for the body of a file.
    pub fn fail(&self, file: &str, faults: &[Fault]) {
        self.shared.lock().unwrap().faults.insert(file.into(), faults.to_vec());
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().unwrap().seen.clone()
    }

    /// The requests for the body of a file.
    pub fn bodies(&self, file: &str) -> Vec<Seen> {
        let mut seen = self.seen();
        seen.retain(|seen| {
            seen.method == "GET" && seen.path.split('?').next().unwrap().ends_with(file)
        });
        // The hub itself only says where large ones are.
        if seen.iter().any(|seen| seen.elsewhere) {
            seen.retain(|seen| seen.elsewhere);
        }
        seen
    }

    pub fn forget(&self) {
        self.shared.lock().unwrap().seen.clear();
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Send so much of it, then break off.
    cut: Option<usize>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn refusal(status: u16, code: &str, message: &str) -> Self {
        let body = format!("{{\"error\": {message:?}}}");
        let answer = Self::new(status, body).header("X-Error-Message", message);
        if code.is_empty() { answer } else { answer.header("X-Error-Code", code) }
    }
}

fn serve(stream: &TcpStream, shared: &Mutex<Shared>, elsewhere: bool) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
    }
    let seen = Seen {
        method,
        path,
        range: headers.get("range").cloned(),
        token: headers.get("authorization").map(|value| value.replace("Bearer ", "")),
        elsewhere,
    };
    let answer = {
        let mut shared = shared.lock().unwrap();
        shared.seen.push(seen.clone());
        answer(&mut shared, &seen)
    };
    let mut text = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
    text += &format!("Content-Length: {}\r\n", answer.body.len());
    for (name, value) in &answer.headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += "\r\n";
    let mut out = stream;
    let body = if seen.method == "HEAD" { &[][..] } else { &answer.body };
    let sent = answer.cut.unwrap_or(body.len()).min(body.len());
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.write_all(&body[..sent]));
    let _ = stream.shutdown(Shutdown::Both);
}

fn answer(shared: &mut Shared, seen: &Seen) -> Answer {
    let path = seen.path.split('?').next().unwrap_or_default();
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    if seen.elsewhere {
        return large(shared, &parts, seen);
    }
    match parts.as_slice() {
        ["api", "models", owner, name, "revision", revision] => {
            listing(shared, &format!("{owner}/{name}"), &revision.replace("%2F", "/"), seen)
        }
        [owner, name, "resolve", commit, file @ ..] => {
            let (repository, file) = (format!("{owner}/{name}"), file.join("/"));
            resolve(shared, &repository, commit, &file, seen)
        }
        _ => Answer::refusal(404, "", "Not Found"),
    }
}

/// A reason to show nothing, as the hub gives it.
fn closed(shared: &Shared, repository: &str, seen: &Seen) -> Option<Answer> {
    let Some(found) = shared.repositories.get(repository) else {
        // Those without a token are not told whether it exists.
        return Some(match &seen.token {
            None => Answer::refusal(401, "", "Invalid username or password."),
            Some(_) => Answer::refusal(404, "RepoNotFound", "Repository not found"),
        });
    };
    if found.token.is_some() && found.token != seen.token {
        let message = "Invalid credentials in Authorization header";
        return Some(Answer::refusal(
            401,
            if seen.token.is_none() { "RepoNotFound" } else { "" },
            message,
        ));
    }
    None
}

fn listing(shared: &Shared, repository: &str, revision: &str, seen: &Seen) -> Answer {
    if let Some(refusal) = closed(shared, repository, seen) {
        return refusal;
    }
    let found = &shared.repositories[repository];
    if let Some(to) = &found.moved {
        return Answer::new(307, "")
            .header("Location", format!("/api/models/{to}/revision/{revision}"));
    }
    let own = revision.to_owned();
    let commit = found.revisions.get(revision).unwrap_or(&own);
    let Some(files) = found.commits.get(commit) else {
        return Answer::refusal(404, "RevisionNotFound", "Invalid rev id");
    };
    let files: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
    let listing = serde_json::json!({"id": repository, "sha": commit, "siblings": files});
    Answer::new(200, listing.to_string()).header("Content-Type", "application/json")
}

fn resolve(shared: &mut Shared, repository: &str, commit: &str, file: &str, seen: &Seen) -> Answer {
    if let Some(refusal) = closed(shared, repository, seen) {
        return refusal;
    }
    let found = &shared.repositories[repository];
    if let Some(to) = &found.moved {
        return Answer::new(307, "").header("Location", format!("/{to}/resolve/{commit}/{file}"));
    }
    if let Some(reason) = &found.gated {
        return Answer::refusal(403, "GatedRepo", reason);
    }
    let Some(content) = found.commits.get(commit).and_then(|files| files.get(file)).cloned() else {
        return Answer::refusal(404, "EntryNotFound", "Entry not found");
    };
    let etag = etag(&content);
    if content.len() < LARGE {
        return body(shared, file, &content, seen)
            .header("ETag", format!("\"{etag}\""))
            .header("X-Repo-Commit", commit);
    }
    let to = format!("{}/{repository}/{commit}/{file}?signature=1", shared.elsewhere);
    Answer::new(302, "elsewhere")
        .header("Location", to)
        .header("X-Repo-Commit", commit)
        .header("X-Linked-Etag", format!("\"{etag}\""))
        .header("X-Linked-Size", content.len().to_string())
        .header("ETag", "\"not-this-one\"")
}

/// The address of large files knows nothing of tokens, and refuses those who show one.
fn large(shared: &mut Shared, parts: &[&str], seen: &Seen) -> Answer {
    if seen.token.is_some() {
        return Answer::new(400, "a token came to the wrong place");
    }
    let [owner, name, commit, file @ ..] = parts else { return Answer::new(404, "") };
    let file = file.join("/");
    let found = shared.repositories.get(&format!("{owner}/{name}"));
    let content = found.and_then(|found| found.commits.get(*commit)?.get(&file)).cloned();
    match content {
        None => Answer::new(404, ""),
        Some(content) => body(shared, &file, &content, seen),
    }
}

/// Bytes of a file, from where the range says, with the next fault.
fn body(shared: &mut Shared, file: &str, content: &[u8], seen: &Seen) -> Answer {
    let fault = match shared.faults.get_mut(file) {
        Some(faults) if !faults.is_empty() && seen.method == "GET" => Some(faults.remove(0)),
        _ => None,
    };
    let from = seen
        .range
        .as_deref()
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let from = from.filter(|_| fault != Some(Fault::WholeFile));
    if let Some(Fault::Status(status)) = fault {
        return Answer::new(status, "{\"error\": \"on purpose\"}");
    }
    let mut part = content[from.unwrap_or(0).min(content.len())..].to_vec();
    if fault == Some(Fault::Flip) {
        part[0] ^= 1;
    }
    let mut answer = match from {
        None => Answer::new(200, part),
        Some(from) if from >= content.len() => Answer::new(416, ""),
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            Answer::new(206, part).header("Content-Range", range)
        }
    };
    if let Some(Fault::Cut(length)) = fault {
        answer.cut = Some(length);
    }
    answer
}
