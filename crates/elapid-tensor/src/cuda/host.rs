//! Kernels on the host: compiled by its C++ compiler into a library that is kept in the cache.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ffi::c_void;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libloading::Library;

use super::cache;
use super::error::{GpuError, Result};
use super::gpu::Launch;
use super::source::{EMULATION, PRELUDE, Source};

/// A library of emulated kernels. It stays loaded: threads keep fibers that run its code.
pub(super) struct HostModule(&'static Library);

type Run = unsafe extern "C" fn(*const c_void, *const u32, u64);

/// An emulated kernel.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    run: Run,
    /// Size of its struct of arguments.
    pub(super) arguments: u32,
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// Whether kernels can be compiled here at all.
pub(super) fn check_compiler() -> Result<()> {
    match Command::new(compiler()).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(GpuError::Missing {
            library: "a C++ compiler",
            remedy: "install g++ or clang++, or set CXX",
        }),
    }
}

impl HostModule {
    pub(super) fn compile(source: &Source, macros: &[(&str, &str)]) -> Result<Self> {
        let compiler = compiler();
        // Sanitizers, say.
        let extra = std::env::var("ELAPID_EMULATION_FLAGS").unwrap_or_default();
        let mut options: Vec<String> =
            ["-std=c++17", "-O1", "-w", "-shared", "-fPIC"].map(Into::into).into();
        options.extend(extra.split_whitespace().map(Into::into));
        options.extend(macros.iter().map(|(name, value)| format!("-D{name}={value}")));

        let joined = options.join(" ");
        let mut parts = vec![compiler.as_str(), &joined, PRELUDE, EMULATION, source.text];
        parts.extend(source.headers.iter().flat_map(|&(name, text)| [name, text]));
        let library = cache::place(source.name, &parts, std::env::consts::DLL_EXTENSION);
        if let Some(module) = Self::load(&library) {
            return Ok(module);
        }
        build(source, &compiler, &options, &library)?;
        Self::load(&library).ok_or_else(|| GpuError::Cache {
            path: library.display().to_string(),
            message: "the compiled library cannot be loaded".into(),
        })
    }

    fn load(path: &Path) -> Option<Self> {
        if !path.is_file() {
            return None;
        }
        // SAFETY: the library was compiled from our own text and has no initialisers but those of C++.
        let library = unsafe { Library::new(path) }.ok()?;
        Some(Self(Box::leak(Box::new(library))))
    }

    pub(super) fn entry(&self, name: &str) -> Result<Entry, String> {
        let missing = |error: libloading::Error| format!("is not there: {error}");
        // SAFETY: KERNEL defines both with these types.
        unsafe {
            let run = *self.0.get::<Run>(format!("{name}_on_host").as_bytes()).map_err(missing)?;
            let arguments = self.0.get::<*const u32>(format!("{name}_arguments").as_bytes());
            Ok(Entry { run, arguments: **arguments.map_err(missing)? })
        }
    }
}

/// Compiles into a file of its own and moves it into place.
fn build(source: &Source, compiler: &str, options: &[String], library: &Path) -> Result<()> {
    let work = cache::temporary(library)?;
    let write = |name: &str, text: &str| {
        std::fs::write(work.join(name), text).map_err(|error| cache::failed(&work, &error))
    };
    std::fs::create_dir_all(&work).map_err(|error| cache::failed(&work, &error))?;
    write("prelude.cuh", PRELUDE)?;
    write("emulation.h", EMULATION)?;
    for (name, text) in source.headers {
        write(name, text)?;
    }
    write("kernels.cpp", source.text)?;
    let made = work.join("kernels.so");
    let output = Command::new(compiler)
        .args(options)
        .arg("-o")
        .arg(&made)
        .arg(work.join("kernels.cpp"))
        .output();
    let failed = |log: String| GpuError::Compile {
        source_name: source.name,
        target: format!("the host ({compiler})"),
        log,
    };
    let outcome = match output {
        Err(error) => Err(failed(format!("{compiler} cannot be run: {error}"))),
        Ok(output) if !output.status.success() => {
            Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()))
        }
        Ok(_) => std::fs::rename(&made, library).map_err(|error| cache::failed(library, &error)),
    };
    // What is left is only clutter.
    let _ = std::fs::remove_dir_all(&work);
    outcome
}

impl Entry {
    /// Runs the whole grid before it returns.
    ///
    /// # Safety
    /// As [`super::Gpu::launch`].
    pub(super) unsafe fn run(self, launch: Launch, arguments: *const c_void) {
        static LAUNCHES: AtomicU64 = AtomicU64::new(1);
        static SEED: LazyLock<u64> = LazyLock::new(first_seed);
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let sizes = [gx, gy, gz, bx, by, bz, launch.shared];
        let seed = SEED.wrapping_add(LAUNCHES.fetch_add(1, Ordering::Relaxed));
        // SAFETY: seven sizes, as the emulation reads; the rest is the caller's promise.
        unsafe { (self.run)(arguments, sizes.as_ptr(), seed) };
    }
}

/// Where the drawn orders of threads start: ELAPID_EMULATION_SEED, so that repeated runs can try others.
fn first_seed() -> u64 {
    let seed = std::env::var("ELAPID_EMULATION_SEED").ok().and_then(|text| text.parse().ok());
    seed.unwrap_or(0)
}

const ALIGN: usize = 256;

fn layout(bytes: usize) -> Layout {
    // Only a size near the whole address space can fail.
    Layout::from_size_align(bytes, ALIGN).expect("a buffer's size fits the address space")
}

/// Memory full of NaN, so that what no kernel wrote shows.
pub(super) fn allocate(bytes: usize) -> u64 {
    // SAFETY: the size is at least 1.
    let pointer = unsafe { alloc(layout(bytes)) };
    if pointer.is_null() {
        handle_alloc_error(layout(bytes));
    }
    // SAFETY: just allocated with that size.
    unsafe { pointer.write_bytes(0xff, bytes) };
    pointer as u64
}

pub(super) fn release(address: u64, bytes: usize) {
    // SAFETY: `allocate` gave this address for this size, and its owner is being dropped.
    unsafe { dealloc(address as *mut u8, layout(bytes)) };
}
