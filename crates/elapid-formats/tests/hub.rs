//! Pulling from a hub on this machine: what is fetched, how it is cached, and what happens when the network,
//! the hub or the disk does not do its part.

mod hub_server;

use std::path::Path;
use std::time::Duration;

use elapid_formats::hub::{Hub, HubError, Progress, Pulled, Reference, Wanted};
use elapid_formats::{Error, Result};
use hub_server::{Fault, HubServer, commit, etag};
use tempfile::TempDir;

const NAME: &str = "spaces-of-states/mamba-small";

/// Numbers that no compression or repetition hides errors in.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut value = seed;
    let mut next = || {
        value = value.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (value >> 33) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (".gitattributes", b"x".to_vec()),
        ("README.md", content(1, 2000)),
        ("config.json", b"{\"model_type\": \"mamba\"}".to_vec()),
        ("generation_config.json", b"{}".to_vec()),
        ("model.safetensors", content(2, 700_000)),
        ("pytorch_model.bin", content(3, 5000)),
        ("tokenizer.json", content(4, 3000)),
    ]
}

const WANTED: [&str; 4] =
    ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"];

/// A hub, and a cache of its own.
struct Place {
    server: HubServer,
    cache: TempDir,
}

impl Place {
    fn new() -> Self {
        let cache = tempfile::tempdir().unwrap();
        Self { server: HubServer::start().with(NAME, &files()), cache }
    }

    fn hub(&self) -> Hub {
        Hub::from_environment()
            .unwrap()
            .with_cache(self.cache.path())
            .with_endpoint(&self.server.endpoint)
            .with_token(None)
            .with_retries(3, Duration::from_millis(5))
    }

    fn pull(&self, name: &str) -> Result<Pulled> {
        self.hub().pull(&Reference::parse(name).unwrap(), Wanted::Model, &mut ())
    }

    fn folder(&self) -> std::path::PathBuf {
        self.cache.path().join("models--spaces-of-states--mamba-small")
    }
}

#[track_caller]
fn refused(result: Result<Pulled>, parts: &[&str]) -> HubError {
    let error = result.unwrap_err();
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    match error {
        Error::Hub(error) => *error,
        other => panic!("{other:?}"),
    }
}

fn names(pulled: &Pulled) -> Vec<&str> {
    pulled.files.iter().map(|file| file.name.as_str()).collect()
}

#[test]
fn a_model_lies_in_the_cache_as_other_clients_have_it() {
    let place = Place::new();
    let pulled = place.pull(NAME).unwrap();
    assert_eq!(names(&pulled), WANTED);
    assert_eq!(pulled.commit, commit(1));
    let folder = place.folder();
    assert_eq!(pulled.model, folder.join("snapshots").join(commit(1)));
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), commit(1));
    for (name, content) in files().into_iter().filter(|(name, _)| WANTED.contains(name)) {
        let path = pulled.model.join(name);
        assert_eq!(std::fs::read(&path).unwrap(), content, "{name}");
        assert_eq!(std::fs::read(folder.join("blobs").join(etag(&content))).unwrap(), content);
        #[cfg(unix)]
        assert_eq!(
            std::fs::read_link(&path).unwrap(),
            Path::new("../../blobs").join(etag(&content))
        );
    }
    assert_eq!(std::fs::read_dir(folder.join("blobs")).unwrap().count(), WANTED.len());

    // Once there, only the commit is asked for.
    place.server.forget();
    let again = place.pull(NAME).unwrap();
    assert_eq!(again.files.iter().map(|file| file.received).sum::<u64>(), 0);
    assert_eq!(place.server.seen().len(), 1);
    let reference = Reference::parse(NAME).unwrap();
    assert_eq!(place.hub().cached(&reference, Wanted::Model), Some(pulled.model));
    assert_eq!(place.server.seen().len(), 1);
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let place = Place::new();
    place.server.fail("model.safetensors", &[Fault::Cut(300_000), Fault::Status(503)]);
    let pulled = place.pull(NAME).unwrap();
    let ranges: Vec<_> =
        place.server.bodies("model.safetensors").into_iter().map(|seen| seen.range).collect();
    assert_eq!(ranges.len(), 3);
    let from = ranges[1].as_deref().unwrap().trim_start_matches("bytes=").trim_end_matches('-');
    let from: u64 = from.parse().unwrap();
    assert!((1..=300_000).contains(&from), "{from}");
    assert_eq!(ranges[2], ranges[1]);
    assert_eq!(std::fs::read(pulled.model.join("model.safetensors")).unwrap(), files()[4].1);
    assert_eq!(pulled.files[3].received, 700_000);
}

#[test]
fn another_process_goes_on_too() {
    let place = Place::new();
    let impatient = place.hub().with_retries(0, Duration::ZERO);
    place.server.fail("model.safetensors", &[Fault::Cut(300_000)]);
    let reference = Reference::parse(NAME).unwrap();
    let error = refused(impatient.pull(&reference, Wanted::Model, &mut ()), &["cannot reach"]);
    assert!(matches!(error, HubError::Network { .. }));
    // What is half there is no model.
    assert_eq!(place.hub().cached(&reference, Wanted::Model), None);
    let partial = place.folder().join("blobs").join(etag(&files()[4].1) + ".incomplete");
    let have = std::fs::metadata(&partial).unwrap().len();
    assert!((1..=300_000).contains(&have), "{have}");

    struct Heard(Vec<(String, u64)>, u64);
    impl Progress for Heard {
        fn file(&mut self, name: &str, size: u64, have: u64) {
            assert_eq!(size, 700_000);
            self.0.push((name.into(), have));
        }
        fn at(&mut self, bytes: u64) {
            assert!(bytes >= self.1);
            self.1 = bytes;
        }
    }
    let mut heard = Heard(Vec::new(), 0);
    let pulled = place.hub().pull(&reference, Wanted::Model, &mut heard).unwrap();
    assert_eq!((heard.0, heard.1), (vec![("model.safetensors".into(), have)], 700_000));
    assert_eq!(pulled.files[3].received, 700_000 - have);
    assert!(!partial.exists());
    assert_eq!(std::fs::read(&pulled.files[3].path).unwrap(), files()[4].1);
}

#[test]
fn a_server_that_cannot_go_on_starts_again() {
    let place = Place::new();
    place.server.fail("model.safetensors", &[Fault::Cut(300_000), Fault::WholeFile]);
    let pulled = place.pull(NAME).unwrap();
    assert_eq!(std::fs::read(&pulled.files[3].path).unwrap(), files()[4].1);
    // What is there and too long is not believed.
    let place = Place::new();
    let blobs = place.folder().join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(etag(&files()[4].1) + ".incomplete"), vec![0; 800_000]).unwrap();
    assert_eq!(place.pull(NAME).unwrap().files[3].received, 700_000);
}

#[test]
fn damage_is_found_and_removed() {
    let place = Place::new();
    place.server.fail("model.safetensors", &[Fault::Flip]);
    let found = place.pull(NAME);
    refused(found, &["model.safetensors", "checksum", &etag(&files()[4].1), "removed"]);
    place.server.fail("config.json", &[]);
    let place = Place::new();
    place.server.fail("config.json", &[Fault::Flip]);
    refused(place.pull(NAME), &["config.json", "checksum", &etag(&files()[2].1)]);
    place.pull(NAME).unwrap();

    // What an earlier time left was damaged on the disk: it is fetched again without being asked.
    let place = Place::new();
    let blobs = place.folder().join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(etag(&files()[4].1) + ".incomplete"), vec![0; 1000]).unwrap();
    let pulled = place.pull(NAME).unwrap();
    assert_eq!(std::fs::read(&pulled.files[3].path).unwrap(), files()[4].1);
}

#[test]
fn refusals_say_what_they_mean() {
    let place = Place::new();
    let error = refused(place.pull("nobody/nothing"), &["no model nobody/nothing", "HF_TOKEN"]);
    assert!(matches!(error, HubError::NoRepository { with_token: false, .. }));
    let known = place.hub().with_token(Some("t".into()));
    let nobody = Reference::parse("nobody/nothing").unwrap();
    refused(known.pull(&nobody, Wanted::Model, &mut ()), &["does not open"]);
    let error = refused(place.pull(&format!("{NAME}@v9")), &["no revision \"v9\""]);
    assert!(matches!(error, HubError::NoRevision { .. }));
    let unknown = format!("{NAME}@{}", commit(9));
    refused(place.pull(&unknown), &["no revision", &commit(9)]);

    place.server.change(NAME, |own| own.token = Some("secret".into()));
    refused(place.pull(NAME), &["private"]);
    let reference = Reference::parse(NAME).unwrap();
    let wrong = place.hub().with_token(Some("wrong".into()));
    let error =
        refused(wrong.pull(&reference, Wanted::Model, &mut ()), &["refuses", "credentials"]);
    assert!(matches!(error, HubError::Unauthorised { with_token: true, .. }));
    // The right token opens it, and goes to the hub only: the other address refuses tokens.
    let right = place.hub().with_token(Some("secret".into()));
    right.pull(&reference, Wanted::Model, &mut ()).unwrap();

    let place = Place::new();
    place.server.change(NAME, |own| own.gated = Some("Access to it is restricted.".into()));
    let error = refused(place.pull(NAME), &["owner lets in", "Access to it is restricted."]);
    assert!(matches!(error, HubError::Gated { .. }));
    place.server.add("a/b", "main", &commit(2), &[("notes.txt", b"x".to_vec())]);
    refused(place.pull("a/b"), &["no weights", "notes.txt"]);
    refused(place.pull("a/b/m.gguf"), &["no file \"m.gguf\"", "notes.txt"]);

    let place = Place::new();
    place.server.fail("model.safetensors", &vec![Fault::Status(500); 9]);
    refused(place.pull(NAME), &["answered 500", "on purpose"]);
    assert_eq!(place.server.bodies("model.safetensors").len(), 4);
}

#[test]
fn without_a_network_the_cache_must_do() {
    let place = Place::new();
    let reference = Reference::parse(NAME).unwrap();
    let offline = || place.hub().offline(true).pull(&reference, Wanted::Model, &mut ());
    refused(offline(), &[NAME, "not completely in", "HF_HUB_OFFLINE"]);
    let pulled = place.pull(NAME).unwrap();
    place.server.forget();
    let found = offline().unwrap();
    assert_eq!((&found.model, names(&found)), (&pulled.model, WANTED.to_vec()));
    assert!(place.server.seen().is_empty());
    // By its commit too.
    let exact = Reference { revision: commit(1), ..reference.clone() };
    assert_eq!(place.hub().cached(&exact, Wanted::Model).unwrap(), pulled.model);

    // Nobody answers there.
    let gone = place.hub().with_endpoint("http://127.0.0.1:9").with_retries(0, Duration::ZERO);
    refused(
        gone.pull(&reference, Wanted::Model, &mut ()),
        &["cannot reach http://127.0.0.1:9", "--offline"],
    );
    let wrong = place.hub().with_endpoint("ftp://somewhere");
    refused(wrong.pull(&reference, Wanted::Model, &mut ()), &["ftp://somewhere", "HF_ENDPOINT"]);
    // A snapshot that lost its weights is not complete.
    std::fs::remove_file(pulled.model.join("model.safetensors")).unwrap();
    assert_eq!(place.hub().cached(&reference, Wanted::Model), None);
    place.pull(NAME).unwrap();
    assert!(place.hub().cached(&reference, Wanted::Model).is_some());
}

#[test]
fn revisions_share_what_is_the_same() {
    let place = Place::new();
    let mut newer = files();
    newer[2].1 = b"{\"model_type\": \"mamba\", \"new\": 1}".to_vec();
    place.server.add(NAME, "refs/pr/1", &commit(2), &newer);
    let old = place.pull(NAME).unwrap();
    let new = place.pull(&format!("{NAME}@refs/pr/1")).unwrap();
    assert_eq!(new.files.iter().map(|file| file.received).sum::<u64>(), newer[2].1.len() as u64);
    assert_ne!(old.model, new.model);
    assert_eq!(std::fs::read(new.model.join("config.json")).unwrap(), newer[2].1);
    let reference = Reference::parse(&format!("{NAME}@refs/pr/1")).unwrap();
    assert_eq!(place.hub().cached(&reference, Wanted::Model), Some(new.model));

    // A branch moves on: pulling again follows, the cache alone does not.
    place.server.add(NAME, "main", &commit(2), &newer);
    let main = Reference::parse(NAME).unwrap();
    assert_eq!(place.hub().cached(&main, Wanted::Model), Some(old.model));
    assert_eq!(place.pull(NAME).unwrap().commit, commit(2));
    // By commit, nothing is remembered under a name.
    place.pull(&format!("{NAME}@{}", commit(1))).unwrap();
    assert!(!place.folder().join("refs").join(commit(1)).exists());
}

#[test]
fn shards_single_files_tokenizers_and_moved_repositories() {
    let place = Place::new();
    let index = "{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-2.safetensors\", \"c\": \"m-1.safetensors\"}}";
    let sharded = [
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.into()),
        ("m-1.safetensors", content(5, 4000)),
        ("m-2.safetensors", content(6, 10)),
        ("m-3.safetensors", content(7, 10)),
    ];
    place.server.add("a/sharded", "main", &commit(3), &sharded);
    let pulled = place.pull("a/sharded").unwrap();
    assert_eq!(
        names(&pulled),
        ["config.json", "model.safetensors.index.json", "m-1.safetensors", "m-2.safetensors"]
    );
    assert!(pulled.model.is_dir());
    std::fs::remove_file(pulled.model.join("m-2.safetensors")).unwrap();
    assert_eq!(place.hub().cached(&Reference::parse("a/sharded").unwrap(), Wanted::Model), None);

    let bad = "{\"weight_map\": {\"a\": \"../../m.safetensors\"}}";
    let outside = [("config.json", b"{}".to_vec()), ("model.safetensors.index.json", bad.into())];
    place.server.add("a/bad", "main", &commit(4), &outside);
    let error = place.pull("a/bad").unwrap_err().to_string();
    assert!(error.contains("index.json") && error.contains("../../m.safetensors"), "{error}");

    let quantised = [("q8/x.gguf", content(8, 3000)), ("y.gguf", content(9, 3000))];
    place.server.add("a/q", "main", &commit(5), &quantised);
    refused(place.pull("a/q"), &["several", "q8/x.gguf", "y.gguf"]);
    let one = place.pull("a/q/q8/x.gguf").unwrap();
    assert_eq!(std::fs::read(&one.model).unwrap(), quantised[0].1);
    assert!(one.model.ends_with("q8/x.gguf"));
    assert_eq!(
        place.hub().cached(&Reference::parse("a/q/q8/x.gguf").unwrap(), Wanted::Model),
        Some(one.model)
    );
    let reference = Reference::parse("a/q").unwrap();
    let one = place.hub().pull(&reference, Wanted::File("y.gguf"), &mut ()).unwrap();
    assert_eq!(names(&one), ["y.gguf"]);

    let reference = Reference::parse(NAME).unwrap();
    let tokenizer = place.hub().pull(&reference, Wanted::Tokenizer, &mut ()).unwrap();
    assert_eq!(names(&tokenizer), ["config.json", "generation_config.json", "tokenizer.json"]);
    assert_eq!(place.hub().cached(&reference, Wanted::Model), None);

    place.server.change("old/name", |own| own.moved = Some(NAME.into()));
    let moved = place.pull("old/name").unwrap();
    assert_eq!(std::fs::read(moved.model.join("model.safetensors")).unwrap(), files()[4].1);
}

#[test]
fn two_at_the_same_time_download_once() {
    let place = Place::new();
    let pull = || place.pull(NAME).unwrap();
    let (a, b) = std::thread::scope(|scope| {
        let other = scope.spawn(pull);
        (pull(), other.join().unwrap())
    });
    assert_eq!(a.model, b.model);
    assert_eq!(place.server.bodies("model.safetensors").len(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_what_fits_is_kept() {
    use std::process::Command;

    let place = Place::new();
    let mount = |size: &str| {
        let options = ["-t", "tmpfs", "-o", size, "tmpfs"];
        let output = Command::new("mount").args(options).arg(place.cache.path()).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !mount("size=256k") {
        println!("skipped: a tmpfs cannot be mounted here");
        return;
    }
    let full = place.pull(NAME).map_err(|error| error.to_string());
    let more = mount("remount,size=8m");
    let rest = place.pull(NAME).map(|pulled| pulled.files[3].received);
    assert!(Command::new("umount").arg(place.cache.path()).status().unwrap().success());
    let full = full.unwrap_err();
    assert!(full.contains(".incomplete") && full.contains("No space left"), "{full}");
    if more {
        let rest = rest.unwrap();
        assert!(rest > 0 && rest < 700_000, "{rest}");
    }
}
