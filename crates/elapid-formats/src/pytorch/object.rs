//! What a restricted pickle can hold: scalars, text, plain containers, storages and tensors. Objects lie in one
//! list and refer to each other by position, so that nesting costs no stack and cycles no memory.

use std::ops::Range;

use elapid_tensor::DType;

/// A scalar, or the place of an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float,
    Object(u32),
}

/// An object; texts and bytes are ranges of the pickle itself.
#[derive(Debug)]
pub(super) enum Object {
    Text(Range<usize>),
    /// Never a part of a state dict, so they are not kept.
    Bytes,
    /// A whole number of more than 64 bits, little endian.
    Long(Range<usize>),
    Tuple(Box<[Value]>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Global(Global),
    Storage(Box<Storage>),
    Tensor(Box<TensorView>),
}

impl Object {
    /// The type as Python names it.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "str",
            Self::Bytes => "bytes",
            Self::Long(_) => "int",
            Self::Tuple(_) => "tuple",
            Self::List(_) => "list",
            Self::Dict(_) => "dict",
            Self::Global(_) => "type or function",
            Self::Storage(_) => "storage",
            Self::Tensor(_) => "tensor",
        }
    }
}

/// Flat memory that tensors are views of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    /// Where its bytes are: the name of an entry, or a key of the legacy format.
    pub key: String,
    pub kind: StorageKind,
    /// Elements; bytes if it is untyped.
    pub len: usize,
    /// First element within the storage of that key.
    pub offset: usize,
}

/// A tensor as a view of a storage.
#[derive(Debug)]
pub(super) struct TensorView {
    pub storage: Storage,
    pub kind: StorageKind,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// Element types of PyTorch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StorageKind {
    Known(DType),
    /// Name and bytes of an element; never a weight.
    Other(&'static str, usize),
    Untyped,
}

impl StorageKind {
    pub(super) fn size(self) -> usize {
        match self {
            Self::Known(dtype) => dtype.size(),
            Self::Other(_, size) => size,
            Self::Untyped => 1,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Known(dtype) => dtype.name(),
            Self::Other(name, _) => name,
            Self::Untyped => "untyped",
        }
    }
}

/// The names that a pickle may ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    /// storage, offset, shape, strides, gradient flag, hooks.
    RebuildTensor,
    /// The same with an element type, for untyped storages.
    RebuildTensorOfType,
    RebuildParameter,
    Size,
    Type(StorageKind),
}

impl Global {
    /// The meaning of `module.name`; none for everything that is refused.
    pub(super) fn find(module: &str, name: &str) -> Option<Self> {
        use StorageKind::{Known, Other, Untyped};
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorOfType,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch", "FloatStorage" | "float32") => Self::Type(Known(DType::F32)),
            ("torch", "BFloat16Storage" | "bfloat16") => Self::Type(Known(DType::BF16)),
            ("torch", "HalfStorage" | "float16") => Self::Type(Known(DType::F16)),
            ("torch", "DoubleStorage" | "float64") => Self::Type(Known(DType::F64)),
            ("torch", "LongStorage" | "int64") => Self::Type(Known(DType::I64)),
            ("torch", "IntStorage" | "int32") => Self::Type(Known(DType::I32)),
            ("torch", "ByteStorage" | "uint8") => Self::Type(Known(DType::U8)),
            ("torch", "uint32") => Self::Type(Known(DType::U32)),
            ("torch", "ShortStorage" | "int16") => Self::Type(Other("i16", 2)),
            ("torch", "CharStorage" | "int8") => Self::Type(Other("i8", 1)),
            ("torch", "BoolStorage" | "bool") => Self::Type(Other("bool", 1)),
            ("torch" | "torch.storage", "UntypedStorage") => Self::Type(Untyped),
            _ => return None,
        })
    }
}
