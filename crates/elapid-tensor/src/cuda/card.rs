//! A real card, through the driver and NVRTC.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result as cu;
use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUcontext, CUdevice, CUdevice_attribute,
    CUevent, CUevent_flags, CUfunction, CUfunction_attribute_enum, CUgraphExec,
    CUgraphInstantiate_flags, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig, CUstream, CUstreamCaptureMode, cuDriverGetVersion, cuFuncGetAttribute,
    cuLaunchKernelEx,
};
use cudarc::nvrtc::sys as rtc;

use super::blas_card::Multiplier;
use super::cache;
use super::error::{GpuError, Result};
use super::gpu::Launch;
use super::libraries::libraries;
use super::source::{PRELUDE, Source};

/// A card and this program's stream on it.
#[derive(Debug)]
pub struct Card {
    ordinal: usize,
    context: CUcontext,
    stream: CUstream,
    name: String,
    total: usize,
    multiprocessors: usize,
    shared_memory: usize,
    capability: (i32, i32),
    driver: i32,
    /// None before the first matrix product.
    pub(super) multiplier: Mutex<Option<Multiplier>>,
}

// SAFETY: the driver's handles may be used from any thread once the context is current there.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

pub(super) struct CardModule {
    module: cudarc::driver::sys::CUmodule,
    device: String,
    context: CUcontext,
    source: &'static str,
}

// SAFETY: as for Card.
unsafe impl Send for CardModule {}
// SAFETY: as for Card.
unsafe impl Sync for CardModule {}

/// A kernel's handle; its module stays loaded to the end of the program.
#[derive(Clone, Copy)]
pub(super) struct Function(CUfunction);

// SAFETY: as for Card.
unsafe impl Send for Function {}
// SAFETY: as for Card.
unsafe impl Sync for Function {}

pub(super) struct CardEvent {
    event: CUevent,
    device: String,
    context: CUcontext,
}

pub(super) struct CardGraph {
    executable: CUgraphExec,
    context: CUcontext,
}

// SAFETY: as for Card.
unsafe impl Send for CardGraph {}
// SAFETY: as for Card.
unsafe impl Sync for CardGraph {}

impl Drop for CardGraph {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle; the driver waits for launches that are under way.
        unsafe {
            let _ = cu::ctx::set_current(self.context);
            let _ = cu::graph::exec_destroy(self.executable);
        }
    }
}

type Outcome<T> = std::result::Result<T, cu::DriverError>;

fn checked<T>(device: &str, call: &'static str, outcome: Outcome<T>) -> Result<T> {
    outcome.map_err(|error| GpuError::Call {
        device: device.to_owned(),
        call,
        message: format!("{error:?}"),
    })
}

impl Card {
    /// Number of NVIDIA GPUs that the driver shows.
    ///
    /// # Errors
    /// If the driver is missing, too old, or refuses.
    pub fn count() -> Result<usize> {
        libraries().driver.check()?;
        checked("cuda", "cuInit", cu::init())?;
        Ok(checked("cuda", "cuDeviceGetCount", cu::device::get_count())? as usize)
    }

    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(GpuError::NoSuchCard { ordinal, count });
        }
        let label = format!("cuda:{ordinal}");
        let device = checked(&label, "cuDeviceGet", cu::device::get(ordinal as i32))?;
        let name = checked(&label, "cuDeviceGetName", cu::device::get_name(device))?;
        let attribute = |which| attribute(&label, device, which);
        use CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_memory =
            attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // SAFETY: the device handle is the driver's own.
        let total = checked(&label, "cuDeviceTotalMem", unsafe { cu::device::total_mem(device) })?;
        // SAFETY: as above; the primary context is never released, as kernels live to the end of the program.
        let context = checked(&label, "cuDevicePrimaryCtxRetain", unsafe {
            cu::primary_ctx::retain(device)
        })?;
        // SAFETY: the context was just retained.
        checked(&label, "cuCtxSetCurrent", unsafe { cu::ctx::set_current(context) })?;
        let stream = cu::stream::create(cu::stream::StreamKind::NonBlocking);
        let stream = checked(&label, "cuStreamCreate", stream)?;
        let mut driver = 0;
        // SAFETY: the driver writes one integer.
        checked(&label, "cuDriverGetVersion", unsafe { cuDriverGetVersion(&mut driver) }.result())?;
        let multiplier = Mutex::new(None);
        Ok(Self {
            ordinal,
            context,
            stream,
            name,
            total,
            multiprocessors,
            shared_memory,
            capability,
            driver,
            multiplier,
        })
    }

    fn call<T>(&self, name: &'static str, f: impl FnOnce() -> Outcome<T>) -> Result<T> {
        self.enter()?;
        checked(&self.label(), name, f())
    }

    /// Makes this card the one that this thread's calls are for.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context lives to the end of the program.
        let outcome = unsafe { cu::ctx::set_current(self.context) };
        outcome.or_else(|error| checked(&self.label(), "cuCtxSetCurrent", Err(error)))
    }

    pub(super) fn context(&self) -> CUcontext {
        self.context
    }

    pub(super) fn stream(&self) -> CUstream {
        self.stream
    }

    pub(super) fn label(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Its name, as `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of memory.
    pub fn total_memory(&self) -> usize {
        self.total
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Bytes of shared memory that a block can have.
    pub fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    /// Compute capability, as (9, 0).
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The newest CUDA version that the driver knows, as 13.0.
    pub fn driver_version(&self) -> String {
        format!("{}.{}", self.driver / 1000, self.driver % 1000 / 10)
    }

    /// Free and total bytes, as the driver counts them now.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.call("cuMemGetInfo", cu::mem_get_info)
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        // SAFETY: the address is used within `bytes` only, by its owner.
        self.call("cuMemAlloc", || unsafe { cu::malloc_sync(bytes) })
    }

    pub(super) fn release(&self, address: u64) -> Result<()> {
        // SAFETY: `allocate` gave the address and its owner gave it up.
        self.call("cuMemFree", || unsafe { cu::free_sync(address) })
    }

    /// Memory of the host that kernels reach at the same address.
    pub(super) fn allocate_on_host(&self, bytes: usize) -> Result<u64> {
        // SAFETY: the address is used within `bytes` only, by its owner.
        let pointer = self.call("cuMemHostAlloc", || unsafe {
            cu::malloc_host(bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)
        })?;
        Ok(pointer as u64)
    }

    pub(super) fn release_on_host(&self, address: u64) -> Result<()> {
        // SAFETY: `allocate_on_host` gave the address and its owner gave it up.
        self.call("cuMemFreeHost", || unsafe { cu::free_host(address as *mut c_void) })
    }

    pub(super) fn fill_zero(&self, address: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller owns that many bytes.
        self.call("cuMemsetD8Async", || unsafe {
            cu::memset_d8_async(address, 0, bytes, self.stream)
        })
    }

    pub(super) fn copy_in(&self, address: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller owns as many bytes there. From pageable memory the driver has read before it returns.
        self.call("cuMemcpyHtoDAsync", || unsafe {
            cu::memcpy_htod_async(address, from, self.stream)
        })
    }

    pub(super) fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller owns as many bytes at both places.
        self.call("cuMemcpyDtoDAsync", || unsafe {
            cu::memcpy_dtod_async(to, from, bytes, self.stream)
        })
    }

    pub(super) fn copy_out(&self, address: u64, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller owns as many bytes there, and `to` outlives the synchronisation below.
        self.call("cuMemcpyDtoHAsync", || unsafe {
            cu::memcpy_dtoh_async(to, address, self.stream)
        })?;
        self.synchronize()
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as the card.
        self.call("cuStreamSynchronize", || unsafe { cu::stream::synchronize(self.stream) })
    }

    /// From here on launches and copies are written down, not carried out.
    pub(super) fn begin_recording(&self) -> Result<()> {
        // Only this program's own calls are watched; allocations are allowed.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as the card.
        self.call("cuStreamBeginCapture", || unsafe {
            cu::stream::begin_capture(self.stream, mode)
        })
    }

    /// What was written down, ready to be launched.
    pub(super) fn end_recording(&self) -> Result<CardGraph> {
        // SAFETY: as above.
        let graph =
            self.call("cuStreamEndCapture", || unsafe { cu::stream::end_capture(self.stream) })?;
        if graph.is_null() {
            return Err(GpuError::Call {
                device: self.label(),
                call: "cuStreamEndCapture",
                message: "a call that cannot be recorded ended the recording".into(),
            });
        }
        // SAFETY: the driver gave the graph just now.
        let executable = self.call("cuGraphInstantiate", || unsafe {
            cu::graph::instantiate(graph, CUgraphInstantiate_flags(0))
        });
        // SAFETY: the executable is a copy; nobody else has the graph.
        self.call("cuGraphDestroy", || unsafe { cu::graph::destroy(graph) })?;
        Ok(CardGraph { executable: executable?, context: self.context })
    }

    pub(super) fn launch_graph(&self, graph: &CardGraph) -> Result<()> {
        // A product may be several kernels that meet in the workspace of all products, those of the graph among them:
        // nobody may be in the middle of one.
        let _products = self.multiplier.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: both handles are alive.
        self.call("cuGraphLaunch", || unsafe { cu::graph::launch(graph.executable, self.stream) })
    }

    pub(super) fn event(&self) -> Result<CardEvent> {
        let event =
            self.call("cuEventCreate", || cu::event::create(CUevent_flags::CU_EVENT_DEFAULT))?;
        let event = CardEvent { event, device: self.label(), context: self.context };
        // SAFETY: both handles are alive.
        self.call("cuEventRecord", || unsafe { cu::event::record(event.event, self.stream) })?;
        Ok(event)
    }

    /// # Safety
    /// As [`super::Gpu::launch_chained`]; `arguments` points to the kernel's struct.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        launch: Launch,
        arguments: *const c_void,
        chained: bool,
    ) -> Result<()> {
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        let mut parameters = [arguments.cast_mut()];
        if launch.shared > 48 << 10 {
            let which = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            self.call("cuFuncSetAttribute", || unsafe {
                cu::function::set_function_attribute(function.0, which, launch.shared as i32)
            })?;
        }
        if chained {
            let mut attribute = CUlaunchAttribute {
                id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            };
            let config = CUlaunchConfig {
                gridDimX: gx,
                gridDimY: gy,
                gridDimZ: gz,
                blockDimX: bx,
                blockDimY: by,
                blockDimZ: bz,
                sharedMemBytes: launch.shared,
                hStream: self.stream,
                attrs: &mut attribute,
                numAttrs: 1,
            };
            // SAFETY: one parameter, the struct, and one attribute, both read before the call returns; the rest is the
            // caller's promise.
            return self.call("cuLaunchKernelEx", || unsafe {
                cuLaunchKernelEx(&config, function.0, parameters.as_mut_ptr(), std::ptr::null_mut())
                    .result()
            });
        }
        // SAFETY: one parameter, the struct; the rest is the caller's promise.
        self.call("cuLaunchKernel", || unsafe {
            cu::launch_kernel(
                function.0,
                (gx, gy, gz),
                (bx, by, bz),
                launch.shared,
                self.stream,
                &mut parameters,
            )
        })
    }

    pub(super) fn compile(&self, source: &Source, macros: &[(&str, &str)]) -> Result<CardModule> {
        let (major, minor) = self.capability;
        // The features of exactly this generation, where it has such a target.
        let own = if major >= 9 { "a" } else { "" };
        let mut options =
            vec![format!("--gpu-architecture=sm_{major}{minor}{own}"), "--std=c++17".to_owned()];
        options.extend(macros.iter().map(|(name, value)| format!("-D{name}={value}")));
        let joined = options.join(" ");
        let version = nvrtc_version();
        let mut parts = vec![version.as_str(), &joined, PRELUDE, source.text];
        parts.extend(source.headers.iter().flat_map(|&(name, text)| [name, text]));
        let place = cache::place(source.name, &parts, "cubin");
        if let Some(cubin) = cache::read(&place)
            && let Ok(module) = self.load(source, &cubin)
        {
            return Ok(module);
        }
        libraries().nvrtc.check()?;
        let cubin = compile(source, &options, &format!("{} (sm_{major}{minor})", self.name))?;
        cache::write(&place, &cubin)?;
        self.load(source, &cubin)
    }

    fn load(&self, source: &Source, cubin: &[u8]) -> Result<CardModule> {
        // SAFETY: the bytes are a cubin that NVRTC made; the driver checks its header.
        let module = self
            .call("cuModuleLoadData", || unsafe { cu::module::load_data(cubin.as_ptr().cast()) })?;
        Ok(CardModule { module, device: self.label(), context: self.context, source: source.name })
    }
}

fn attribute(label: &str, device: CUdevice, which: CUdevice_attribute) -> Result<i32> {
    // SAFETY: the device handle is the driver's own.
    checked(label, "cuDeviceGetAttribute", unsafe { cu::device::get_attribute(device, which) })
}

fn nvrtc_version() -> String {
    if !libraries().nvrtc.usable() {
        return String::new();
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library writes two integers.
    let _ = unsafe { rtc::nvrtcVersion(&mut major, &mut minor) };
    format!("{major}.{minor}")
}

/// The machine code of a text, or what the compiler says.
fn compile(source: &Source, options: &[String], target: &str) -> Result<Vec<u8>> {
    let failed = |log: String| GpuError::Compile {
        source_name: source.name,
        target: target.to_owned(),
        log,
    };
    let string = |text: &str| {
        CString::new(text).map_err(|_| failed("the text holds a zero byte".to_owned()))
    };
    let mut headers = vec![string(PRELUDE)?];
    let mut names = vec![string("prelude.cuh")?];
    for (name, text) in source.headers {
        headers.push(string(text)?);
        names.push(string(name)?);
    }
    let (text, name) = (string(source.text)?, string(source.name)?);
    let options: Vec<CString> =
        options.iter().map(|option| string(option)).collect::<Result<_>>()?;
    let pointers =
        |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
    let (header_pointers, name_pointers) = (pointers(&headers), pointers(&names));
    let option_pointers = pointers(&options);
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings live to the end of this function; sizes are asked for before buffers are filled.
    unsafe {
        rtc::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            header_pointers.as_ptr(),
            name_pointers.as_ptr(),
        )
        .result()
        .map_err(|error| failed(format!("{error}")))?;
        let outcome =
            rtc::nvrtcCompileProgram(program, options.len() as i32, option_pointers.as_ptr());
        let result = match outcome.result() {
            Err(error) => {
                let mut size = 0;
                let _ = rtc::nvrtcGetProgramLogSize(program, &mut size);
                let mut log = vec![0u8; size];
                let _ = rtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
                let log = String::from_utf8_lossy(&log);
                Err(failed(format!("{error}\n{}", log.trim_end_matches('\0'))))
            }
            Ok(()) => {
                let mut size = 0;
                let mut cubin = Vec::new();
                rtc::nvrtcGetCUBINSize(program, &mut size)
                    .result()
                    .and_then(|()| {
                        cubin.resize(size, 0u8);
                        rtc::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()
                    })
                    .map(|()| cubin)
                    .map_err(|error| failed(format!("{error}")))
            }
        };
        let _ = rtc::nvrtcDestroyProgram(&mut program);
        result
    }
}

impl CardModule {
    pub(super) fn function(&self, name: &str) -> Result<Function> {
        let missing = |message: &str| GpuError::Kernel {
            kernel: name.to_owned(),
            source_name: self.source,
            message: message.to_owned(),
        };
        let symbol = CString::new(name).map_err(|_| missing("is no name"))?;
        // SAFETY: the context and module live to the end of the program.
        checked(&self.device, "cuCtxSetCurrent", unsafe { cu::ctx::set_current(self.context) })?;
        // SAFETY: as above.
        unsafe { cu::module::get_function(self.module, symbol) }
            .map(Function)
            .map_err(|_| missing("is not there"))
    }
}

impl Function {
    pub(super) fn resources(self) -> Option<(i32, i32)> {
        use CUfunction_attribute_enum as A;
        let read = |which| {
            let mut value = 0;
            // SAFETY: the driver writes one integer about a loaded function.
            unsafe { cuFuncGetAttribute(&mut value, which, self.0) }.result().ok()?;
            Some(value)
        };
        Some((read(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?, read(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?))
    }
}

impl CardEvent {
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the context and the event are alive.
        unsafe {
            checked(&self.device, "cuCtxSetCurrent", cu::ctx::set_current(self.context))?;
            checked(&self.device, "cuEventSynchronize", cu::event::synchronize(self.event))
        }
    }

    pub(super) fn since(&self, earlier: &Self) -> Result<f64> {
        // SAFETY: the context and both events are alive.
        unsafe {
            checked(&self.device, "cuCtxSetCurrent", cu::ctx::set_current(self.context))?;
            checked(&self.device, "cuEventSynchronize", cu::event::synchronize(self.event))?;
            let elapsed = cu::event::elapsed(earlier.event, self.event);
            Ok(f64::from(checked(&self.device, "cuEventElapsedTime", elapsed)?))
        }
    }
}

// SAFETY: as for Card.
unsafe impl Send for CardEvent {}
// SAFETY: as for Card.
unsafe impl Sync for CardEvent {}

impl Drop for CardEvent {
    fn drop(&mut self) {
        // SAFETY: the event is this value's own. A failure has nobody to tell.
        unsafe {
            let _ = cu::ctx::set_current(self.context);
            let _ = cu::event::destroy(self.event);
        }
    }
}
