"""Read the tensors of a pickle, and nothing else in it.

No name in a pickle is imported: tensors, their storages and types, NumPy arrays and mappings are understood here, and
every other class or function stands for an inert :class:`Stub`, whatever the pickle says to do with it. Stubs keep what
they were given, so that the weights of a whole pickled network are found inside.

All that a pickle can get hold of is made here. What it could write to (the state it may set on an object) is refused
or kept aside, so nothing of this process changes either.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastensdistill.foreign.leaf import Leaf

MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before PyTorch 1.6
DEEPEST = 4  # pickles within pickles
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
    "QInt8": torch.int8, "QUInt8": torch.uint8, "QInt32": torch.int32,
}  # fmt: skip
MAPPINGS = {("collections", name) for name in ("OrderedDict", "defaultdict", "Counter")} | {("builtins", "dict")}
REFUSED = {
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, without values",
    "_rebuild_wrapper_subclass": "a tensor subclass (DTensor, torchao, ...)",
}


class Mapping(dict):
    """Any mapping of a pickle: OrderedDict, defaultdict, ..."""

    def __init__(self, *items: Any, **_more: Any):
        super().__init__()
        if items and isinstance(items[0], dict | list | tuple):
            self.update(items[0])

    def __setstate__(self, state: Any) -> None:
        pass


class Stub:
    """An object that is not made. ``path`` is its class's; ``args``, ``state`` and ``items`` what it was to hold."""

    path = ""
    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **_more: Any) -> Stub:  # a pickle may make it without calling __init__
        stub = super().__new__(cls)
        stub.args, stub.state, stub.items = args, None, {}
        return stub

    def __init__(self, *_args: Any, **_more: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """What a pickle adds to a list or a set."""
        self.items[len(self.items)] = value

    add = append

    def extend(self, values: Any) -> None:
        """What a pickle adds to a list at once."""
        for value in values:
            self.append(value)

    def __call__(self, *args: Any, **_more: Any) -> Stub:
        return Stub(*args)


class _Call:
    """A function that a pickle may call, and can do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a function")


class _StorageType:
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a type")


class _Storage:
    """``numel`` elements of ``dtype`` under ``key``; ``read`` gives their bytes once they are known."""

    def __init__(self, dtype: torch.dtype, key: str, numel: int):
        self.dtype, self.key, self.numel = dtype, key, numel
        self.read: Callable[[], bytes] | None = None
        self._values: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        if self._values is None:
            if self.read is None:
                raise EOFError(f"no data for storage {self.key}")
            data = bytearray(self.read())
            self._values = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return self._values.view(dtype)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a storage")


class _DType:
    """NumPy's description of an element, as its pickles give it."""

    def __init__(self, name: Any = "", *_more: Any):
        self.name, self.order = str(name), "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1]) if len(state) > 3 and not state[3] and not state[4] else "unknown"

    def numpy(self) -> np.dtype | None:
        plain = re.fullmatch(r"[<>|=]?[fiubc]\d{1,2}", self.name) and self.order in "<>|="
        if not plain:
            return None
        element = np.dtype(self.name)
        return element.newbyteorder(">") if self.order == ">" else element


class _Array(Leaf):
    """A NumPy array that is being put together."""

    def __init__(self) -> None:
        super().__init__(None, None, None, "a NumPy array of objects")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, fortran, data)

    def fill(self, shape: Any, dtype: Any, fortran: bool, data: Any) -> None:
        kind = dtype.numpy() if isinstance(dtype, _DType) else None
        if kind is None or not isinstance(data, bytes | bytearray | str):
            return
        data = data.encode("latin1") if isinstance(data, str) else data
        array = np.frombuffer(data, kind).reshape(tuple(shape), order="F" if fortran else "C")
        tensor = torch.from_numpy(np.array(array, kind.newbyteorder("="), order="C"))
        Leaf.__init__(self, tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Unpickler(pickle.Unpickler):
    """Reads one pickle of ``file``. ``storages`` are those it speaks of, whose data stand elsewhere in the file."""

    def __init__(self, file: BinaryIO, storages: dict[str, _Storage], encoding: str = "utf-8", depth: int = 0):
        super().__init__(file, encoding=encoding)
        self.storages, self.depth = storages, depth
        self._found: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What ``module.name`` stands for: never an import."""
        key = (module, name)
        if key not in self._found:
            self._found[key] = self._stand_in(module, name)
        return self._found[key]

    def _stand_in(self, module: str, name: str) -> Any:
        root = module.split(".")[0]
        if root == "torch" and name.endswith("Storage") and name.removesuffix("Storage") in STORAGES:
            return _StorageType(STORAGES[name.removesuffix("Storage")])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch._utils" and name in REFUSED:
            return _Call(lambda *_: Leaf.unreadable(REFUSED[name]))
        functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor"): _tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
            ("torch._utils", "_rebuild_device_tensor_from_numpy"): _first,
            ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _first,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda function, _type, args, _state: function(*args),
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch.storage", "_load_from_bytes"): self._storage_within,
            ("_codecs", "encode"): lambda text, _encoding="latin1": text.encode("latin1"),
            ("copyreg", "_reconstructor"): lambda cls, _base=None, _state=None: cls(),
            ("copy_reg", "_reconstructor"): lambda cls, _base=None, _state=None: cls(),
            ("builtins", "set"): lambda values=(): list(values),
            ("__builtin__", "set"): lambda values=(): list(values),
        }
        if key_function := functions.get((module, name)):
            return _Call(key_function)
        if (module, name) in MAPPINGS:
            return type("Mapping", (Mapping,), {})
        if root == "numpy":
            if name == "dtype":
                return type("DType", (_DType,), {})
            if name == "_reconstruct":
                return _Call(lambda *_: _Array())
            if name == "_frombuffer":
                return _Call(_array)
        return type("Stub", (Stub,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a checkpoint of PyTorch refers to, as a :class:`Leaf` can read it later."""
        if not isinstance(pid, tuple) or not pid:
            raise pickle.UnpicklingError("a reference to something outside the file")
        if pid[0] == "module":  # a class with its source text, as torch.save(network) wrote it
            return pid[1]
        kind, dtype, key, _device, numel = pid[:5]
        if kind != "storage" or not isinstance(dtype, _StorageType):
            raise pickle.UnpicklingError("a reference to something other than a storage")
        storage = self.storages.setdefault(str(key), _Storage(dtype.dtype, str(key), int(numel)))
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage")  # PyTorch 0.3
        return storage

    def _storage_within(self, data: Any) -> Any:
        if self.depth >= DEEPEST or not isinstance(data, bytes):
            raise pickle.UnpicklingError("pickles within pickles")
        return read_pickle(io.BytesIO(data), self.depth + 1)


def read_pickle(file: BinaryIO, depth: int = 0) -> Any:
    """What a plain pickle, or a file of torch.save before PyTorch 1.6, holds: containers, stubs and leaves."""
    for encoding in ("utf-8", "latin1"):  # the second for pickles of Python 2
        file.seek(0)
        storages: dict[str, _Storage] = {}

        def load(encoding: str = encoding, storages: dict[str, _Storage] = storages) -> Any:
            return Unpickler(file, storages, encoding, depth).load()

        try:
            content = load()
            if not isinstance(content, int) or content != MAGIC:
                return content
            load()  # the protocol's number
            load()  # sizes of C's types
            content = load()
            keys = load()
        except UnicodeDecodeError:
            continue
        return _with_storages(file, content, keys, storages)
    raise pickle.UnpicklingError("text in no known encoding")


def _with_storages(file: BinaryIO, content: Any, keys: Any, storages: dict[str, _Storage]) -> Any:
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    for key in keys:
        if key not in storages:
            raise pickle.UnpicklingError(f"storage {key} of no tensor")
        storage = storages[key]
        size = int.from_bytes(file.read(8), "little") * storage.dtype.itemsize
        if file.tell() + size > end:
            raise EOFError("a storage is cut off")
        data = file.read(size)
        storage.read = lambda data=data: data  # type: ignore[misc]
    return content


def read_stored(file: BinaryIO, stored: Callable[[str], bytes]) -> Any:
    """What the pickle in a zip file of torch.save holds; ``stored(key)`` gives the bytes of a storage."""
    storages: dict[str, _Storage] = {}
    content = Unpickler(file, storages).load()
    for key, storage in storages.items():
        storage.read = lambda key=key: stored(key)  # type: ignore[misc]
    return content


def _first(value: Any, *_more: Any) -> Any:
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Leaf:
    """PyTorch's own arguments: (..., requires_grad, hooks, {"conj": ..., "neg": ...})."""
    return _strided(storage, offset, size, stride, storage.dtype, more[2] if len(more) > 2 else None)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, _g: Any, _h: Any, dtype: Any, *more: Any) -> Leaf:
    return _strided(storage, offset, size, stride, dtype, more[0] if more else None)


def _strided(storage: Any, offset: int, size: Any, stride: Any, dtype: torch.dtype, flags: Any) -> Leaf:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage")
    size, stride = tuple(int(n) for n in size), tuple(int(n) for n in stride)
    if min((*size, *stride, offset), default=0) < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor of no size")
    held = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if math.prod(size) and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= held:
        raise pickle.UnpicklingError("a tensor larger than its storage")

    def read() -> Tensor:
        tensor = torch.as_strided(storage.values(dtype), size, stride, offset).clone()
        if flags and dict(flags).get("conj"):
            tensor = tensor.conj().resolve_conj()
        return -tensor if flags and dict(flags).get("neg") else tensor

    return Leaf(size, dtype, read)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(shape, dtype, order == "F", data)
    return array
