//! Finding the driver, NVRTC and cuBLASLt at run time.
//!
//! They are sought on the loader's path, in CUDA_HOME, CUDA_PATH and /usr/local/cuda*, and in the Python
//! environments (virtualenv, conda, the `python3` of PATH) whose packages bring them. A library outside the loader's
//! path is loaded from its file once; later loads by its short name then find it. Every function that is used is
//! looked up here first, because a missing one would otherwise end the program at its first call.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use super::error::{GpuError, Result};

/// A library: its name, the functions that are used, how to get it.
struct Wanted {
    name: &'static str,
    stem: &'static str,
    /// Version suffixes of the file, the best first.
    versions: &'static [&'static str],
    windows: &'static [&'static str],
    symbols: &'static [&'static str],
    remedy: &'static str,
}

const DRIVER: Wanted = Wanted {
    name: "the NVIDIA driver (libcuda)",
    stem: "cuda",
    versions: &["", ".1"],
    windows: &["nvcuda.dll"],
    symbols: &[
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem_v2",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuStreamCreate",
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuGraphLaunch",
        "cuStreamSynchronize",
        "cuMemAlloc_v2",
        "cuMemFree_v2",
        "cuMemHostAlloc",
        "cuMemFreeHost",
        "cuMemGetInfo_v2",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuMemsetD8Async",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuFuncGetAttribute",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuEventDestroy_v2",
        "cuGetErrorName",
        "cuGetErrorString",
    ],
    remedy: "install the driver of the card (version 525 or later)",
};

const NVRTC: Wanted = Wanted {
    name: "NVRTC (the run-time compiler of CUDA)",
    stem: "nvrtc",
    versions: &["", ".13", ".12"],
    windows: &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"],
    symbols: &[
        "nvrtcVersion",
        "nvrtcCreateProgram",
        "nvrtcCompileProgram",
        "nvrtcDestroyProgram",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
    ],
    remedy: "install CUDA 12 or later, or `pip install nvidia-cuda-nvrtc`, or set CUDA_HOME",
};

const CUBLASLT: Wanted = Wanted {
    name: "cuBLASLt (matrix products)",
    stem: "cublasLt",
    versions: &["", ".13", ".12"],
    windows: &["cublasLt64_13.dll", "cublasLt64_12.dll"],
    symbols: &[
        "cublasLtCreate",
        "cublasLtDestroy",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatrixLayoutSetAttribute",
    ],
    remedy: "install CUDA 12 or later, or `pip install nvidia-cublas`, or set CUDA_HOME",
};

/// What was found of one library.
#[derive(Debug, Clone)]
pub struct Found {
    /// What it is.
    pub name: &'static str,
    /// Where it was loaded from; the bare file name if the loader knew it. None if it is missing.
    pub path: Option<PathBuf>,
    /// A function that it lacks, if it is too old.
    pub lacks: Option<&'static str>,
    /// How to get it.
    pub remedy: &'static str,
}

impl Found {
    /// True if it is there with all that is needed.
    pub fn usable(&self) -> bool {
        self.path.is_some() && self.lacks.is_none()
    }

    /// An error that says what is wrong, if it is not usable.
    ///
    /// # Errors
    /// [`GpuError::Missing`] or [`GpuError::TooOld`].
    pub fn check(&self) -> Result<()> {
        match (&self.path, self.lacks) {
            (None, _) => Err(GpuError::Missing { library: self.name, remedy: self.remedy }),
            (_, Some(symbol)) => Err(GpuError::TooOld { library: self.name, symbol }),
            _ => Ok(()),
        }
    }
}

/// The libraries that GPU code needs.
#[derive(Debug, Clone)]
pub struct Libraries {
    /// The driver: without it there is no card.
    pub driver: Found,
    /// The run-time compiler: without it there are no kernels but those in the cache.
    pub nvrtc: Found,
    /// Matrix products.
    pub cublaslt: Found,
}

/// Looks for the libraries, once.
pub fn libraries() -> &'static Libraries {
    static FOUND: OnceLock<Libraries> = OnceLock::new();
    FOUND.get_or_init(|| Libraries {
        driver: DRIVER.find(),
        nvrtc: NVRTC.find(),
        cublaslt: CUBLASLT.find(),
    })
}

impl Wanted {
    fn files(&self) -> Vec<String> {
        if cfg!(windows) {
            self.windows.iter().map(|&name| name.to_owned()).collect()
        } else {
            self.versions.iter().map(|version| format!("lib{}.so{version}", self.stem)).collect()
        }
    }

    fn find(&self) -> Found {
        let files = self.files();
        let by_name = files.iter().map(PathBuf::from);
        // The driver belongs to the system: a copy elsewhere (CUDA's stubs) would not work.
        let by_path = if self.stem == "cuda" { Vec::new() } else { folders() };
        let by_path = by_path.iter().flat_map(|folder| files.iter().map(|file| folder.join(file)));
        for path in by_name.chain(by_path.filter(|path| path.is_file())) {
            // SAFETY: loading a CUDA library runs its initialisers, which have no preconditions.
            let Ok(library) = (unsafe { Library::new(&path) }) else { continue };
            let lacks = self.symbols.iter().copied().find(|symbol| {
                // SAFETY: the symbol is only looked up, never called through this type.
                unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err()
            });
            // It stays loaded, so that later loads by its short name find this very file.
            std::mem::forget(library);
            return Found { name: self.name, path: Some(path), lacks, remedy: self.remedy };
        }
        Found { name: self.name, path: None, lacks: None, remedy: self.remedy }
    }
}

/// Folders that may hold CUDA libraries, the most explicit first.
fn folders() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = std::env::var_os(variable) {
            toolkit(Path::new(&root), &mut found);
        }
    }
    for root in children(Path::new("/usr/local"), "cuda").into_iter().rev() {
        toolkit(&root, &mut found);
    }
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(root) = std::env::var_os(variable) {
            python(Path::new(&root), &mut found);
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for folder in std::env::split_paths(&path) {
        let program = folder.join(if cfg!(windows) { "python.exe" } else { "python3" });
        if program.exists()
            && let Some(root) = folder.parent()
        {
            python(root, &mut found);
        }
    }
    found
}

fn toolkit(root: &Path, found: &mut Vec<PathBuf>) {
    for part in ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "bin", "bin/x64"] {
        found.push(root.join(part));
    }
}

/// The library folder of an environment and those of its packages named `nvidia`.
fn python(root: &Path, found: &mut Vec<PathBuf>) {
    found.push(root.join("lib"));
    let mut sites = vec![root.join("Lib/site-packages")];
    for version in children(&root.join("lib"), "python3") {
        sites.push(version.join("site-packages"));
        sites.push(version.join("dist-packages"));
    }
    for site in sites {
        for package in children(&site.join("nvidia"), "") {
            found.extend([package.join("lib"), package.join("bin")]);
        }
    }
}

/// Folders within `folder` whose name starts with `prefix`, in order of name.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    found
}
