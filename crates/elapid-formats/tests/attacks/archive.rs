//! Zip archives and NumPy's files within them.

use super::Attack;

/// An entry that is stored as it is.
pub struct Stored<'a> {
    pub name: &'a str,
    pub data: &'a [u8],
}

impl<'a> Stored<'a> {
    pub fn new(name: &'a str, data: &'a [u8]) -> Self {
        Self { name, data }
    }
}

/// Where things lie in an archive with one entry.
struct Layout {
    directory: usize,
    end: usize,
}

/// A plain archive.
pub fn zip(entries: &[Stored<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut directory = Vec::new();
    for entry in entries {
        let offset = bytes.len() as u32;
        let len = entry.data.len() as u32;
        let mut common = Vec::new();
        common.extend([20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0]);
        common.extend([0; 4]);
        common.extend(len.to_le_bytes());
        common.extend(len.to_le_bytes());
        common.extend((entry.name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        bytes.extend(0x0403_4b50u32.to_le_bytes());
        bytes.extend(&common);
        bytes.extend(entry.name.as_bytes());
        bytes.extend(entry.data);
        directory.extend(0x0201_4b50u32.to_le_bytes());
        directory.extend([20, 0]);
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(entry.name.as_bytes());
    }
    let start = bytes.len() as u32;
    bytes.extend(&directory);
    bytes.extend(0x0605_4b50u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((entries.len() as u16).to_le_bytes());
    bytes.extend((entries.len() as u16).to_le_bytes());
    bytes.extend((directory.len() as u32).to_le_bytes());
    bytes.extend(start.to_le_bytes());
    bytes.extend([0; 2]);
    bytes
}

fn npy(dict: &str, data: usize) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\0".to_vec();
    bytes.extend((dict.len() as u16).to_le_bytes());
    bytes.extend(dict.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

pub fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    let mut add = |what, bytes: Vec<u8>, words| {
        attacks.push(Attack { what, file: "model.npz", bytes, words });
    };
    let good = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}", 16);
    let sound = zip(&[Stored::new("w.npy", &good)]);
    let layout = Layout { directory: 30 + 5 + good.len(), end: sound.len() - 22 };
    let patched = |at: usize, bytes: &[u8]| {
        let mut changed = sound.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let entry = layout.directory;
    let end = layout.end;

    add("the end cut off", sound[..sound.len() - 1].to_vec(), &["truncated zip"]);
    add("the start alone", b"PK\x03\x04".to_vec(), &["truncated zip"]);
    add("neither format", zip(&[Stored::new("a.txt", b"hello")]), &["neither"]);
    add("65,534 entries", patched(end + 8, &[0xfe, 0xff, 0xfe, 0xff]), &["65534 entries"]);
    add("several disks", patched(end + 4, &[1, 0]), &["disks"]);
    add("zip64 without its record", patched(end + 16, &[255; 4]), &["zip64"]);
    add("a directory beyond the file", patched(end + 16, &[0, 0, 0, 0x7f]), &["truncated zip"]);
    add("a directory of 2 GB", patched(end + 12, &[0, 0, 0, 0x7f]), &["truncated zip"]);
    add("no directory there", patched(entry, b"XXXX"), &["damaged zip"]);
    add("an entry beyond the file", patched(entry + 42, &[0, 0, 0, 0x7f]), &["w.npy", "outside"]);
    add("an entry in the wrong place", patched(entry + 42, &[3, 0, 0, 0]), &["w.npy"]);
    add(
        "an entry of 2 GB",
        patched(entry + 20, &[0, 0, 0, 0x7f, 0, 0, 0, 0x7f]),
        &["w.npy", "outside"],
    );
    add("two lengths", patched(entry + 24, &[1, 0, 0, 0]), &["w.npy", "two lengths"]);
    add("an encrypted entry", patched(entry + 8, &[1, 0]), &["w.npy", "encrypted"]);
    add("an unknown method", patched(entry + 10, &[12, 0]), &["w.npy", "method 12"]);
    add("deflated data that is none", patched(entry + 10, &[8, 0]), &["w.npy"]);
    let mut bomb = patched(entry + 10, &[8, 0]);
    bomb[entry + 24..entry + 28].copy_from_slice(&[0, 0, 0, 0x7f]);
    add("an entry that unpacks to 2 GB", bomb, &["w.npy", "times"]);
    add("a name of 65,535 bytes", patched(entry + 28, &[255, 255]), &["truncated zip"]);
    let twice = zip(&[Stored::new("w.npy", &good), Stored::new("w.npy", &good)]);
    add("two entries of one name", twice.clone(), &["w.npy", "two entries"]);
    let mut overlapping = zip(&[Stored::new("v.npy", &good), Stored::new("w.npy", &good)]);
    let second = overlapping.len() - 22 - 51 + 42;
    overlapping[second..second + 4].copy_from_slice(&[0; 4]);
    add("two entries in one place", overlapping, &["overlap"]);

    let mut array = |what, dict: &str, data: usize, words| {
        let bytes = zip(&[Stored::new("w.npy", &npy(dict, data))]);
        attacks.push(Attack { what, file: "arrays.npz", bytes, words });
    };
    let with = |kind: &str, shape: &str| {
        format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}")
    };
    array("an array cut off", &with("<f4", "(2, 2)"), 15, &["w: ", "16 bytes", "15"]);
    array("an array with more data", &with("<f4", "(2, 2)"), 17, &["w: ", "17"]);
    array("an enormous shape", &with("<f4", "(4294967296, 4294967296)"), 16, &["w: ", "memory"]);
    array(
        "an extent beyond 64 bits",
        &with("<f4", "(99999999999999999999,)"),
        16,
        &["w: ", "extent"],
    );
    array("a negative extent", &with("<f4", "(-4,)"), 16, &["w: ", "extent"]);
    array("big-endian floats", &with(">f4", "(2, 2)"), 16, &["w: ", ">f4"]);
    array("whole numbers", &with("<i8", "(2,)"), 16, &["w: ", "<i8"]);
    array("pickled objects", &with("|O", "(2,)"), 16, &["w: ", "|O"]);
    array("code for a shape", &with("<f4", "__import__('os')"), 16, &["w: ", "expected"]);
    array("a dict in 60,000 levels", &"{'descr':".repeat(7000), 0, &["w: ", "element type"]);
    let fortran = "{'descr': '<f4', 'fortran_order': True, 'shape': (4294967296, 4294967296)}";
    array("an enormous shape, transposed", fortran, 16, &["w: ", "leaves"]);
    let config = zip(&[Stored::new("w.npy", &good), Stored::new("config.json", b"[[[[")]);
    attacks.push(Attack {
        what: "a configuration that is no JSON",
        file: "config.npz",
        bytes: config,
        words: &["config.json", "JSON"],
    });
    attacks
}
