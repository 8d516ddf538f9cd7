//! Pickles: programs that call code, refer to themselves, or want memory.

use super::Attack;
use super::archive::{Stored, zip};

/// An archive as PyTorch writes it, with this pickle and storage 0 of so many zero bytes.
fn archive(pickle: &[u8], storage: usize) -> Vec<u8> {
    zip(&[
        Stored::new("archive/data.pkl", pickle),
        Stored::new("archive/data/0", &vec![0; storage]),
    ])
}

/// A dict with a tensor "w" of these pickled offset, shape and strides over a storage of `len` floats.
fn tensor(len: &[u8], offset: &[u8], shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let mut p = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    p.extend(b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu");
    p.extend(len);
    p.extend(b"tQ");
    p.extend(offset);
    p.extend(shape);
    p.extend(strides);
    p.extend(b"\x89}tRs.");
    p
}

fn call(module: &str, name: &str) -> Vec<u8> {
    let mut p = b"\x80\x02c".to_vec();
    p.extend(format!("{module}\n{name}\n").bytes());
    p.extend(b"(X\x02\0\0\0idtR.");
    p
}

pub fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    let mut add = |what, bytes: Vec<u8>, words| {
        attacks.push(Attack { what, file: "pytorch_model.bin", bytes, words });
    };
    let wrap = |body: &[u8]| archive(&[b"\x80\x02", body].concat(), 16);

    add("os.system", archive(&call("os", "system"), 0), &["refused", "os.system"]);
    add("posix.system", archive(&call("posix", "system"), 0), &["refused", "posix.system"]);
    add("nt.system", archive(&call("nt", "system"), 0), &["refused", "nt.system"]);
    add("builtins.eval", archive(&call("builtins", "eval"), 0), &["refused", "builtins.eval"]);
    add("builtins.exec", archive(&call("builtins", "exec"), 0), &["refused", "builtins.exec"]);
    add(
        "subprocess.Popen",
        archive(&call("subprocess", "Popen"), 0),
        &["refused", "subprocess.Popen"],
    );
    add("torch.load", archive(&call("torch", "load"), 0), &["refused", "torch.load"]);
    add(
        "builtins.getattr",
        archive(&call("builtins", "getattr"), 0),
        &["refused", "builtins.getattr"],
    );
    add(
        "runpy by a stacked name",
        wrap(b"X\x05\0\0\0runpyX\x08\0\0\0run_path\x93)R."),
        &["refused", "runpy.run_path"],
    );
    add("INST", wrap(b"(X\x02\0\0\0idios\nsystem\n."), &["refused", "os.system"]);
    add("a legacy file that calls", call("os", "system"), &["pytorch_model.bin"]);
    add("NEWOBJ", wrap(b"ccollections\nOrderedDict\n)\x81."), &["refused", "NEWOBJ"]);
    add("NEWOBJ_EX", wrap(b"ccollections\nOrderedDict\n)}\x92."), &["refused", "NEWOBJ"]);
    add("OBJ", wrap(b"(ccollections\nOrderedDict\no."), &["refused", "NEWOBJ"]);
    add("EXT1", wrap(b"\x82\x01."), &["refused", "EXT"]);
    add("a buffer from outside", wrap(b"\x97."), &["refused", "NEXT_BUFFER"]);
    add("BUILD on a tuple", wrap(b")}b."), &["refused", "state"]);
    add("a call of what is no name", wrap(b"})R."), &["refused", "calls"]);
    add("protocol 0", wrap(b"I1\n."), &["refused", "protocol 0"]);
    add("protocol 6", archive(b"\x80\x06N.", 0), &["protocol", "6"]);
    add("no operation", wrap(b"\xff."), &["0xff"]);
    add("a list in itself", wrap(b"]q\0h\0a."), &["list contains itself"]);
    add("a dict in itself", wrap(b"}q\0X\x01\0\0\0ah\0s."), &["dict contains itself"]);
    add("a cycle of two", wrap(b"]q\0]q\x01h\0ah\x01a."), &["pytorch_model.bin"]);
    add(
        "a cycle through a tuple in a dict",
        wrap(b"}q\0X\x01\0\0\0ah\0\x85s."),
        &["contains itself"],
    );
    add(
        "nested in 100,000 levels",
        wrap(&[&b"]".repeat(100_000)[..], b"."].concat()),
        &["refused"],
    );
    let nested = [&b"N".to_vec()[..], &b"\x85".repeat(4000), b"."].concat();
    add("tuples in 4,000 levels", wrap(&nested), &["expected a dict"]);
    add("100,000 marks", wrap(&[&b"(".repeat(100_000)[..], b"."].concat()), &["refused", "marks"]);
    add(
        "a stack of 100,000",
        wrap(&[&b"N".repeat(100_000)[..], b"."].concat()),
        &["refused", "stack"],
    );
    let memo: Vec<u8> =
        (0..20_000u32).flat_map(|i| [&b"r"[..], &i.to_le_bytes()].concat()).collect();
    add("a memo of 20,000", wrap(&[&b"N"[..], &memo, b"."].concat()), &["refused", "memo"]);
    add("an empty memo", wrap(b"h\x05."), &["memo 5"]);
    add("an empty stack", wrap(b"."), &["empty stack"]);
    add("items for nothing", wrap(b"(NNu."), &["stack is empty"]);
    add("no mark", wrap(b"Nt."), &["no mark"]);
    add("a value from below a mark", wrap(b"N(0."), &["empty stack"]);
    add("no end", wrap(b"}"), &["truncated pickle"]);
    add("a text of 4 GB", wrap(b"X\xff\xff\xff\xffabc"), &["truncated pickle"]);
    add("a text of 2^64 bytes", wrap(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc"), &["pickle"]);
    add("bytes of 4 GB", wrap(b"B\xff\xff\xff\xffabc"), &["truncated pickle"]);
    add("a text that is none", wrap(b"X\x02\0\0\0\xff\xfe."), &["UTF-8"]);
    add("no dict", wrap(b"K\x05."), &["expected a dict"]);
    add("a number as a name", wrap(b"}K\x05Ns."), &["names of tensors"]);
    add("a number as a tensor", wrap(b"}X\x01\0\0\0wK\x05s."), &["w: expected a tensor"]);
    add("a storage of no type", wrap(b"(X\x07\0\0\0storageNX\x01\0\0\x000NK\x04tQ."), &["storage"]);

    let four = b"K\x04";
    add(
        "a negative extent",
        archive(&tensor(four, b"K\0", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), 16),
        &["shape -1"],
    );
    add(
        "a negative stride",
        archive(&tensor(four, b"K\0", b"K\x04\x85", b"J\xff\xff\xff\xff\x85"), 16),
        &["strides -1"],
    );
    add(
        "a negative offset",
        archive(&tensor(four, b"J\xff\xff\xff\xff", b"K\x04\x85", b"K\x01\x85"), 16),
        &["offset -1"],
    );
    add(
        "an offset beyond",
        archive(&tensor(four, b"K\x01", b"K\x04\x85", b"K\x01\x85"), 16),
        &["w: ", "leaves its storage"],
    );
    add(
        "a stride beyond",
        archive(&tensor(four, b"K\0", b"K\x04\x85", b"K\x02\x85"), 16),
        &["w: ", "leaves its storage"],
    );
    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
    add(
        "a shape that overflows",
        archive(&tensor(four, b"K\0", &[&huge[..], huge, b"\x86"].concat(), b"K\0K\0\x86"), 16),
        &["w: ", "leaves its storage"],
    );
    add(
        "an element seen 2^40 times",
        archive(&tensor(four, b"K\0", b"\x8a\x06\0\0\0\0\0\x01\x85", b"K\0\x85"), 16),
        &["w: ", "leaves its storage"],
    );
    add(
        "a number of two words",
        archive(&tensor(four, b"K\0", b"\x8a\x09\0\0\0\0\0\0\0\0\x01\x85", b"K\0\x85"), 16),
        &["shape is no whole number"],
    );
    add(
        "more axes than there are",
        archive(
            &tensor(
                four,
                b"K\0",
                b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01t",
                b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01t",
            ),
            16,
        ),
        &["w: ", "axes"],
    );
    add(
        "axes without strides",
        archive(&tensor(four, b"K\0", b"K\x04\x85", b")"), 16),
        &["w: ", "strides"],
    );
    add(
        "a storage larger than its entry",
        archive(&tensor(b"K\x05", b"K\0", b"K\x04\x85", b"K\x01\x85"), 16),
        &["w: ", "5 elements"],
    );
    add(
        "a storage of 2^63 elements",
        archive(&tensor(huge, b"K\0", b"K\x04\x85", b"K\x01\x85"), 16),
        &["w: "],
    );
    let mut missing = tensor(four, b"K\0", b"K\x04\x85", b"K\x01\x85");
    let key = missing.windows(6).position(|window| window == b"X\x01\0\0\x000").unwrap() + 5;
    missing[key] = b'9';
    add("a storage that is not there", archive(&missing, 16), &["archive/data/9"]);

    // One storage under many names: each is small, together they are not.
    let one = tensor(b"M\0\x10", b"K\0", b"M\0\x10\x85", b"K\x01\x85");
    let (start, end) = (one.iter().position(|&b| b == b'c').unwrap(), one.len() - 2);
    let mut many = b"\x80\x02}(".to_vec();
    for name in 0..40u8 {
        many.extend([b'X', 2, 0, 0, 0, b'a' + name / 20, b'a' + name % 20]);
        many.extend(&one[start..end]);
    }
    many.extend(b"u.");
    add("forty names for one storage", archive(&many, 4 * 4096), &["bytes together"]);
    attacks
}
