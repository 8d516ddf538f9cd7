//! Rows of a table by token id on a GPU, and the table's gradient.

use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Result, Source,
};

use crate::gpu::{GpuElement, Rows, array, wrong};

const OP: &str = "embedding";

static SOURCE: Source = Source { name: OP, text: include_str!("cuda.cu"), headers: &[] };

/// Most tokens of a piece: part of the order in which gradients are summed.
const PIECE: usize = 32;
const THREADS: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArguments {
    table: u64,
    table_stride: i64,
    ids: u64,
    out: u64,
    out_stride: i64,
    tokens: i64,
    width: i64,
}
// SAFETY: the layout of `ForwardArguments` in cuda.cu.
unsafe impl KernelArguments for ForwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct PiecesArguments {
    dy: u64,
    dy_stride: i64,
    order: u64,
    pieces: u64,
    piece_count: i64,
    workspace: u64,
    dtable: u64,
    dtable_stride: i64,
    width: i64,
    accumulate: i64,
}
// SAFETY: the layout of `PiecesArguments` in cuda.cu.
unsafe impl KernelArguments for PiecesArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct JoinArguments {
    workspace: u64,
    joins: u64,
    join_count: i64,
    dtable: u64,
    dtable_stride: i64,
    width: i64,
    accumulate: i64,
}
// SAFETY: the layout of `JoinArguments` in cuda.cu.
unsafe impl KernelArguments for JoinArguments {}

/// The token ids of a batch on the GPU, sorted for the gradient. What is launched for them depends on their number
/// and on the table's alone, so recorded launches hold for other ids.
#[derive(Debug)]
pub struct TokenIds {
    ids: DeviceBuffer<u32>,
    /// Tokens by id, equal ids in their order.
    order: DeviceBuffer<u32>,
    /// first, count, id, row of the workspace; those behind the last have count 0.
    pieces: DeviceBuffer<[u32; 4]>,
    joins: DeviceBuffer<[u32; 4]>,
    classes: usize,
}

/// What [`TokenIds`] holds, on the host.
struct Sorted {
    order: Vec<u32>,
    pieces: Vec<[u32; 4]>,
    joins: Vec<[u32; 4]>,
}

impl Sorted {
    fn new(ids: &[u32], classes: usize) -> Result<Self> {
        const WHOLE: u32 = u32::MAX;
        // By counting: a step waits for this.
        let mut place = vec![0u32; classes + 1];
        for (token, &id) in ids.iter().enumerate() {
            match place.get_mut(id as usize + 1) {
                Some(count) => *count += 1,
                None => {
                    let message = format!("token {token} has id {id}, the table {classes} rows");
                    return Err(wrong(OP, message));
                }
            }
        }
        let (mut pieces, mut joins) = (vec![], vec![]);
        let (mut first, mut rows) = (0u32, 0u32);
        for id in 0..classes {
            let tokens = place[id + 1];
            place[id] = first;
            let count = tokens.div_ceil(PIECE as u32);
            if count > 1 {
                joins.push([rows, count, id as u32, 0]);
            }
            for piece in 0..count {
                let start = piece * PIECE as u32;
                let row = if count > 1 { rows } else { WHOLE };
                rows += u32::from(count > 1);
                pieces.push([first + start, (tokens - start).min(PIECE as u32), id as u32, row]);
            }
            first += tokens;
        }
        let mut order = vec![0u32; ids.len()];
        for (token, &id) in ids.iter().enumerate() {
            let next = &mut place[id as usize];
            order[*next as usize] = token as u32;
            *next += 1;
        }
        // An id has at most one piece that is not full, and several only if it has a full one.
        let full = ids.len() / PIECE;
        pieces.resize(full + classes.min(ids.len()), [0; 4]);
        joins.resize(full, [0; 4]);
        Ok(Self { order, pieces, joins })
    }
}

impl TokenIds {
    /// Copies ids to the GPU, for a table of `classes` rows.
    ///
    /// # Errors
    /// If an id is not below `classes`, or there is no memory.
    pub fn upload(gpu: &Gpu, ids: &[u32], classes: usize) -> Result<Self> {
        let Sorted { order, pieces, joins } = Sorted::new(ids, classes)?;
        Ok(Self {
            ids: gpu.upload(ids)?,
            order: gpu.upload(&order)?,
            pieces: gpu.upload(&pieces)?,
            joins: gpu.upload(&joins)?,
            classes,
        })
    }

    /// Puts as many other ids in the place of these.
    ///
    /// # Errors
    /// If there are more or fewer, or as [`TokenIds::upload`].
    pub fn write(&mut self, ids: &[u32]) -> Result<()> {
        if ids.len() != self.len() {
            return Err(wrong(OP, format!("{} ids, expected {}", ids.len(), self.len())));
        }
        let Sorted { order, pieces, joins } = Sorted::new(ids, self.classes)?;
        self.ids.write(ids)?;
        self.order.write(&order)?;
        self.pieces.write(&pieces)?;
        self.joins.write(&joins)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True if there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Rows of the table that the ids are for.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Rows of the workspace, at most: full pieces, and one that is not for every id with several.
    fn workspace_rows(&self) -> usize {
        2 * self.joins.len()
    }
}

/// Rows `[T, D]` of type T of a table `[V, D]` in f32.
///
/// # Errors
/// If the table does not fit, or the GPU fails.
pub fn forward<T: GpuElement>(
    gpu: &Gpu,
    table: DeviceSlice<'_, f32>,
    ids: &TokenIds,
    width: usize,
) -> Result<DeviceBuffer<T>> {
    array(OP, "table", table, ids.classes * width)?;
    take::<f32, T>(gpu, Rows::new(table, width), ids, width)
}

/// Rows `[T, D]` of type T of a table `[V, D]` of type V.
///
/// # Errors
/// As [`forward`].
pub(crate) fn take<V: GpuElement, T: GpuElement>(
    gpu: &Gpu,
    table: Rows<'_, V>,
    ids: &TokenIds,
    width: usize,
) -> Result<DeviceBuffer<T>> {
    let tokens = ids.ids.len();
    let out = gpu.scratch::<T>(tokens * width)?;
    let arguments = ForwardArguments {
        table: table.address(OP, ids.classes, width)?,
        table_stride: table.stride(),
        ids: ids.ids.address(),
        out: out.address(),
        out_stride: width as i64,
        tokens: tokens as i64,
        width: width as i64,
    };
    let blocks = (tokens * width.div_ceil(4)).div_ceil(THREADS).min(16 * gpu.multiprocessors());
    let module = gpu.module(&SOURCE, &[("TABLE", V::CUDA), ("ELEMENT", T::CUDA)])?;
    let launch = Launch::linear(blocks as u32, THREADS as u32);
    // SAFETY: the ids are below the table's rows and the extents were checked.
    unsafe { gpu.launch(&module.kernel("embedding_forward")?, launch, &arguments)? };
    Ok(out)
}

/// Gradient `[V, D]` of the table, given that of the rows `[T, D]`.
///
/// # Errors
/// If a buffer does not fit, or the GPU fails.
pub fn backward<T: GpuElement>(
    gpu: &Gpu,
    ids: &TokenIds,
    dy: Rows<'_, T>,
    width: usize,
) -> Result<DeviceBuffer<f32>> {
    let dtable = gpu.zeros::<f32>(ids.classes * width)?;
    let workspace = gpu.scratch::<f32>(ids.workspace_rows() * width)?;
    let pieces = PiecesArguments {
        dy: dy.address(OP, ids.ids.len(), width)?,
        dy_stride: dy.stride(),
        order: ids.order.address(),
        pieces: ids.pieces.address(),
        piece_count: ids.pieces.len() as i64,
        workspace: workspace.address(),
        dtable: dtable.address(),
        dtable_stride: width as i64,
        width: width as i64,
        accumulate: 0,
    };
    let joins = JoinArguments {
        workspace: workspace.address(),
        joins: ids.joins.address(),
        join_count: ids.joins.len() as i64,
        dtable: dtable.address(),
        dtable_stride: width as i64,
        width: width as i64,
        accumulate: 0,
    };
    let module = gpu.module(&SOURCE, &[("TABLE", "float"), ("ELEMENT", T::CUDA)])?;
    let launch = |count: usize| Launch {
        grid: [count as u32, width.div_ceil(4 * THREADS) as u32, 1],
        ..Launch::linear(1, THREADS as u32)
    };
    // SAFETY: the tables were made by `TokenIds::upload` for these tokens, and the extents were checked.
    unsafe {
        gpu.launch(&module.kernel("embedding_pieces")?, launch(ids.pieces.len()), &pieces)?;
        gpu.launch(&module.kernel("embedding_join")?, launch(ids.joins.len()), &joins)?;
    }
    Ok(dtable)
}
