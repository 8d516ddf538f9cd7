//! A GPU, real or emulated: kernels, launches, events.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::card::{Card, CardEvent, CardModule};
use super::error::{GpuError, Result};
use super::graph::{Recording, Turn};
use super::host::{self, HostModule};
use super::memory::Pool;
use super::profile::Profile;
use super::source::{KernelArguments, Source};

/// A GPU. Clones are the same GPU with the same memory, stream and kernels.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    id: GpuId,
    driver: Driver,
    tf32: AtomicBool,
    pool: Mutex<Pool>,
    recording: RwLock<Option<Recording>>,
    profile: Mutex<Option<Profile>>,
    modules: Mutex<HashMap<String, Place>>,
}

/// Of a module, locked while it is compiled, so that others can be compiled meanwhile.
type Place = Arc<Mutex<Option<Module>>>;

/// What carries out the calls.
pub(super) enum Driver {
    Card(Card),
    /// This program's own memory and the host's C++ compiler.
    Host,
}

/// Kernels compiled from one text with one set of macros.
#[derive(Clone)]
pub struct Module(Arc<ModuleInner>);

struct ModuleInner {
    source: &'static str,
    code: Code,
}

enum Code {
    Card(CardModule),
    Host(HostModule),
}

/// One kernel of a module.
#[derive(Clone)]
pub struct Kernel {
    module: Module,
    name: String,
    entry: Entry,
}

#[derive(Clone, Copy)]
enum Entry {
    Card(super::card::Function),
    Host(host::Entry),
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Launch {
    /// Blocks along x alone, threads along x alone, no dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 }
    }
}

/// A moment in a GPU's stream.
pub struct Event {
    gpu: Gpu,
    inner: EventInner,
}

enum EventInner {
    Card(CardEvent),
    Host(std::time::Instant),
}

/// Which GPU: a card of this machine by number, or the emulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GpuId {
    /// `cuda:N`.
    Card(u16),
    /// `cuda:emulated`: the kernels on the host, for tests.
    Emulated,
}

impl fmt::Display for GpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GpuId::Card(ordinal) => write!(f, "cuda:{ordinal}"),
            GpuId::Emulated => f.write_str("cuda:emulated"),
        }
    }
}

impl GpuId {
    /// The GPU, opened on the first call; later calls give the same one, with the same stream and memory.
    ///
    /// # Errors
    /// As [`Gpu::open`] and [`Gpu::emulated`].
    pub fn gpu(self) -> Result<Gpu> {
        static OPEN: Mutex<BTreeMap<GpuId, Gpu>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.get(&self) {
            return Ok(gpu.clone());
        }
        let gpu = self.open()?;
        open.insert(self, gpu.clone());
        Ok(gpu)
    }

    /// A GPU with a stream and memory that nobody else has.
    pub(super) fn open(self) -> Result<Gpu> {
        let driver = match self {
            GpuId::Card(ordinal) => Driver::Card(Card::open(ordinal.into())?),
            GpuId::Emulated => {
                host::check_compiler()?;
                Driver::Host
            }
        };
        Ok(Gpu::new(self, driver))
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}
impl Eq for Gpu {}

impl Gpu {
    /// Card `ordinal` of this machine; the same one for every caller.
    ///
    /// # Errors
    /// If the driver is missing or too old, there is no such card, or the card cannot be used.
    pub fn open(ordinal: u16) -> Result<Self> {
        GpuId::Card(ordinal).gpu()
    }

    /// The kernels on the host, for tests: slow, but the same texts and the same calls.
    ///
    /// # Errors
    /// If there is no C++ compiler (`c++`, or what CXX names).
    pub fn emulated() -> Result<Self> {
        GpuId::Emulated.gpu()
    }

    /// Checks that the card computes in bf16.
    ///
    /// # Errors
    /// [`GpuError::NoBf16`] if it is older than Ampere.
    pub fn check_bf16(&self) -> Result<()> {
        match self.card() {
            Some(card) if card.capability() < (8, 0) => Err(GpuError::NoBf16 {
                device: self.to_string(),
                name: card.name().to_owned(),
                capability: card.capability(),
            }),
            _ => Ok(()),
        }
    }

    /// Lets products of f32 on this GPU round their inputs to TF32, or no longer: several times as fast, with 10 bits
    /// after the point instead of 23. Off until asked for.
    pub fn allow_tf32(&self, allowed: bool) {
        self.0.tf32.store(allowed, Ordering::Relaxed);
    }

    /// Whether products of f32 may round their inputs.
    pub fn tf32_allowed(&self) -> bool {
        self.0.tf32.load(Ordering::Relaxed)
    }

    /// Which one it is.
    pub fn id(&self) -> GpuId {
        self.0.id
    }

    fn new(id: GpuId, driver: Driver) -> Self {
        Self(Arc::new(Inner {
            id,
            driver,
            tf32: AtomicBool::new(false),
            pool: Mutex::new(Pool::default()),
            recording: RwLock::new(None),
            profile: Mutex::new(None),
            modules: Mutex::new(HashMap::new()),
        }))
    }

    pub(super) fn driver(&self) -> &Driver {
        &self.0.driver
    }

    pub(super) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The card; none if emulated.
    pub fn card(&self) -> Option<&Card> {
        match self.driver() {
            Driver::Card(card) => Some(card),
            Driver::Host => None,
        }
    }

    /// True for the host's emulation.
    pub fn is_emulated(&self) -> bool {
        matches!(self.driver(), Driver::Host)
    }

    /// Multiprocessors, for the choice of how work is cut. The emulation claims a few.
    pub fn multiprocessors(&self) -> usize {
        self.card().map_or(4, Card::multiprocessors)
    }

    /// Bytes of shared memory that a block can have; the emulation's have as many as those of an H100.
    pub fn shared_memory(&self) -> usize {
        self.card().map_or(227 << 10, Card::shared_memory)
    }

    /// The kernels of `source` with macros defined as given, compiled now, or taken from memory or the cache.
    ///
    /// # Errors
    /// If the compiler is missing, or the text does not compile.
    pub fn module(&self, source: &Source, macros: &[(&str, &str)]) -> Result<Module> {
        let mut key = source.name.to_owned();
        for (name, value) in macros {
            key.extend([" ", name, "=", value]);
        }
        // Nothing may be loaded while another thread records; the turn comes first, as that thread asks for modules, too.
        let _turn = self.turn();
        let mut modules = self.0.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let place = modules.entry(key).or_default().clone();
        drop(modules);
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = &*place {
            return Ok(module.clone());
        }
        let code = match self.driver() {
            Driver::Card(card) => Code::Card(card.compile(source, macros)?),
            Driver::Host => Code::Host(HostModule::compile(source, macros)?),
        };
        let module = Module(Arc::new(ModuleInner { source: source.name, code }));
        *place = Some(module.clone());
        Ok(module)
    }

    /// Launches a kernel after all earlier work. It runs on while this call returns.
    ///
    /// # Errors
    /// If the arguments have another size than the kernel's, or the driver refuses.
    ///
    /// # Safety
    /// Under this shape of launch, the kernel must stay within the memory that `arguments` point to, and that memory
    /// must belong to this GPU. (Buffers may be dropped once this call has returned.)
    pub unsafe fn launch<A: KernelArguments>(
        &self,
        kernel: &Kernel,
        launch: Launch,
        arguments: &A,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_as(kernel, launch, arguments, false) }
    }

    /// As [`Gpu::launch`], for a kernel of a chain: on cards that can (Hopper and later) it starts while the launch before it
    /// still runs. It reads what nobody writes, and calls `wait_for_previous` before everything else.
    ///
    /// # Errors
    /// As [`Gpu::launch`].
    ///
    /// # Safety
    /// As [`Gpu::launch`]; and the kernel must call `wait_for_previous` as described.
    pub unsafe fn launch_chained<A: KernelArguments>(
        &self,
        kernel: &Kernel,
        launch: Launch,
        arguments: &A,
    ) -> Result<()> {
        let able = self.card().is_some_and(|card| card.capability() >= (9, 0));
        // SAFETY: the caller's promise.
        unsafe { self.launch_as(kernel, launch, arguments, able) }
    }

    /// # Safety
    /// As [`Gpu::launch_chained`].
    unsafe fn launch_as<A: KernelArguments>(
        &self,
        kernel: &Kernel,
        launch: Launch,
        arguments: &A,
        chained: bool,
    ) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.timed(
            || kernel.name.clone(),
            // SAFETY: the caller's promise.
            || unsafe { self.carry_out(kernel, launch, arguments, chained) },
        )
    }

    /// # Safety
    /// As [`Gpu::launch_chained`].
    unsafe fn carry_out<A: KernelArguments>(
        &self,
        kernel: &Kernel,
        launch: Launch,
        arguments: &A,
        chained: bool,
    ) -> Result<()> {
        let pointer = std::ptr::from_ref(arguments).cast::<c_void>();
        let turn = self.turn();
        match (self.driver(), kernel.entry) {
            // SAFETY: the struct has the kernel's layout (KernelArguments); the rest is the caller's promise.
            (Driver::Card(card), Entry::Card(function)) => unsafe {
                card.launch(function, launch, pointer, chained)
            },
            (Driver::Host, Entry::Host(entry)) => {
                let size = size_of::<A>() as u32;
                if size != entry.arguments {
                    return Err(kernel.error(format!(
                        "takes {} bytes of arguments, was given {size}",
                        entry.arguments
                    )));
                }
                let arguments = *arguments;
                turn.host(move || {
                    // SAFETY: as above.
                    unsafe { entry.run(launch, std::ptr::from_ref(&arguments).cast()) };
                });
                Ok(())
            }
            _ => Err(kernel.error("was compiled for another device".into())),
        }
    }

    /// Waits until all work so far is done.
    ///
    /// # Errors
    /// If some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.wait(&self.turn())
    }

    pub(super) fn wait(&self, turn: &Turn<'_>) -> Result<()> {
        turn.outside("cuStreamSynchronize", self)?;
        match self.driver() {
            Driver::Card(card) => card.synchronize(),
            Driver::Host => Ok(()),
        }
    }

    /// Marks this moment in the stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn event(&self) -> Result<Event> {
        let turn = self.turn();
        turn.outside("cuEventRecord", self)?;
        let inner = match self.driver() {
            Driver::Card(card) => EventInner::Card(card.event()?),
            Driver::Host => EventInner::Host(std::time::Instant::now()),
        };
        Ok(Event { gpu: self.clone(), inner })
    }

    /// # Safety
    /// The bytes must be in memory of this GPU, and nobody else may have them.
    pub(super) unsafe fn fill_zero(&self, address: u64, bytes: usize) -> Result<()> {
        let turn = self.turn();
        match self.driver() {
            Driver::Card(card) => card.fill_zero(address, bytes),
            Driver::Host => {
                turn.host(move || {
                    // SAFETY: the caller's promise.
                    unsafe { (address as *mut u8).write_bytes(0, bytes) };
                });
                Ok(())
            }
        }
    }

    /// # Safety
    /// As [`Gpu::fill_zero`].
    pub(super) unsafe fn copy_in(&self, address: u64, from: &[u8]) -> Result<()> {
        let turn = self.turn();
        turn.outside("cuMemcpyHtoDAsync", self)?;
        match self.driver() {
            Driver::Card(card) => card.copy_in(address, from),
            Driver::Host => {
                // SAFETY: the caller's promise.
                unsafe {
                    (address as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len());
                }
                Ok(())
            }
        }
    }

    /// # Safety
    /// As [`Gpu::fill_zero`], for `to`; `from` must be in memory of this GPU.
    pub(crate) unsafe fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        let turn = self.turn();
        match self.driver() {
            Driver::Card(card) => card.copy_within(to, from, bytes),
            Driver::Host => {
                turn.host(move || {
                    // SAFETY: the caller's promise.
                    unsafe {
                        (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes);
                    }
                });
                Ok(())
            }
        }
    }

    /// # Safety
    /// The bytes must be in memory of this GPU.
    pub(super) unsafe fn copy_out(&self, address: u64, to: &mut [u8]) -> Result<()> {
        let turn = self.turn();
        turn.outside("cuMemcpyDtoHAsync", self)?;
        match self.driver() {
            Driver::Card(card) => card.copy_out(address, to),
            Driver::Host => {
                // SAFETY: the caller's promise.
                unsafe {
                    to.as_mut_ptr().copy_from_nonoverlapping(address as *const u8, to.len());
                }
                Ok(())
            }
        }
    }

    pub(super) fn profile(&self) -> &Mutex<Option<Profile>> {
        &self.0.profile
    }

    pub(super) fn recording(&self) -> &RwLock<Option<Recording>> {
        &self.0.recording
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        match self.driver() {
            Driver::Card(card) => card.allocate(bytes),
            Driver::Host => Ok(host::allocate(bytes)),
        }
    }

    pub(super) fn release(&self, address: u64, bytes: usize) -> Result<()> {
        match self.driver() {
            Driver::Card(card) => card.release(address),
            Driver::Host => {
                host::release(address, bytes);
                Ok(())
            }
        }
    }
}

impl Module {
    /// The kernel `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        let missing = |message: String| GpuError::Kernel {
            kernel: name.to_owned(),
            source_name: self.0.source,
            message,
        };
        let entry = match &self.0.code {
            Code::Card(module) => Entry::Card(module.function(name)?),
            Code::Host(module) => Entry::Host(module.entry(name).map_err(missing)?),
        };
        Ok(Kernel { module: self.clone(), name: name.to_owned(), entry })
    }
}

impl Kernel {
    fn error(&self, message: String) -> GpuError {
        GpuError::Kernel { kernel: self.name.clone(), source_name: self.module.0.source, message }
    }

    /// Registers a thread and bytes of local memory (spills) a thread; none for the emulation.
    pub fn resources(&self) -> Option<(i32, i32)> {
        match self.entry {
            Entry::Card(function) => function.resources(),
            Entry::Host(_) => None,
        }
    }
}

impl Event {
    /// Waits until all work before this moment is done.
    ///
    /// # Errors
    /// If some of it failed.
    pub fn wait(&self) -> Result<()> {
        // Events must not be waited for while another thread records the stream.
        let _turn = self.gpu.turn();
        match &self.inner {
            EventInner::Card(event) => event.wait(),
            EventInner::Host(_) => Ok(()),
        }
    }

    /// Milliseconds from `earlier` to this moment; waits for both.
    ///
    /// # Errors
    /// If work before it failed.
    pub fn since(&self, earlier: &Event) -> Result<f64> {
        let _turn = self.gpu.turn();
        match (&earlier.inner, &self.inner) {
            (EventInner::Card(from), EventInner::Card(to)) => to.since(from),
            (EventInner::Host(from), EventInner::Host(to)) => {
                Ok(to.duration_since(*from).as_secs_f64() * 1e3)
            }
            _ => Ok(f64::NAN),
        }
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.id.fmt(f)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({self})")
    }
}
