"""stable-diffusion.cpp's q8_0 and q4_0: ggml's product, called in the library that its Python binding ships.

As stable-diffusion.cpp does it: float32 activations, `ggml_mul_mat` and the bias added in place, the CPU backend with
its plain buffers. "repacked" is ggml's own faster layout for q4_0, which stable-diffusion.cpp does not ask for.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cases import LinearCase
from .base import Peer

_F32 = 0
_REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"
_NODES = 64


class _Parameters(ctypes.Structure):
    _fields_ = (("memory_size", c_size_t), ("memory", c_void_p), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_version": (c_char_p, []),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int, c_int64]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_add_inplace": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_view_init": (c_int, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
}
_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silent = _LOG(lambda _level, _text, _data: None)
_loaded: dict[Path, Any] = {}


class _Ggml(Peer):
    family = "stable-diffusion.cpp"
    packages: ClassVar[dict[str, str]] = {"stable-diffusion-cpp-python": "stable_diffusion_cpp"}
    keeps_output = True
    _kind: ClassVar[int]
    _repacked: ClassVar[bool] = False

    @classmethod
    def available(cls) -> str | None:
        # Without importing the binding, which loads its models' code.
        found = importlib.util.find_spec("stable_diffusion_cpp")
        if found is None or not found.submodule_search_locations:
            return "not installed: pip install stable-diffusion-cpp-python"
        try:
            library = _library()
        except OSError as error:
            return f"its library cannot be loaded: {error}"
        wanted = [*_SIGNATURES, *([_REPACKED] if cls._repacked else [])]
        missing = [name for name in wanted if not hasattr(library, name)]
        return f"its library does not export {missing[0]}" if missing else None

    @classmethod
    def versions(cls) -> dict[str, str]:
        found = super().versions()
        if cls.available() is None:
            found["ggml"] = _library().ggml_version().decode()
        return found

    @classmethod
    def fits(cls, case: LinearCase) -> str | None:
        return "K must be a multiple of 32" if case.shape.k % 32 else None

    def prepare(self, case: LinearCase) -> None:
        g = self._ggml = _library()
        m, k, n = case.shape.m, case.shape.k, case.shape.n
        self._owned: list[tuple[Any, int]] = []
        context = self._own(g.ggml_free, self._context(g))
        weight = g.ggml_new_tensor_2d(context, self._kind, k, n)
        place = getattr(g, _REPACKED)() if self._repacked else g.ggml_backend_cpu_buffer_type()
        self._own(g.ggml_backend_buffer_free, g.ggml_backend_alloc_ctx_tensors_from_buft(context, place))
        dense = case.weight.float().contiguous()
        packed = torch.empty(g.ggml_row_size(self._kind, k) * n, dtype=torch.uint8)
        g.ggml_quantize_chunk(self._kind, dense.data_ptr(), packed.data_ptr(), 0, n, k, None)
        g.ggml_backend_tensor_set(weight, packed.data_ptr(), 0, packed.nbytes)
        self._bytes = packed.nbytes + 4 * n

        self._x, self._y, self._bias = torch.empty(m, k), torch.empty(m, n), case.bias.float().clone()
        graph_context = self._own(g.ggml_free, self._context(g))
        x = g.ggml_new_tensor_2d(graph_context, _F32, k, m)
        bias = g.ggml_new_tensor_1d(graph_context, _F32, n)
        product = g.ggml_mul_mat(graph_context, weight, x)
        for tensor, memory in ((x, self._x), (bias, self._bias), (product, self._y)):
            buffer = g.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
            self._own(g.ggml_backend_buffer_free, buffer)
            g.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())
        self._graph = g.ggml_new_graph(graph_context)
        result = g.ggml_add_inplace(graph_context, product, bias)
        g.ggml_build_forward_expand(self._graph, result)
        g.ggml_backend_view_init(result)
        self._backend = self._own(g.ggml_backend_free, g.ggml_backend_cpu_init())
        g.ggml_backend_cpu_set_n_threads(self._backend, case.threads)
        self._bound: Tensor | None = None

    def input(self, case: LinearCase) -> Tensor:
        return case.x.float()

    def __call__(self, x: Tensor) -> Tensor:
        if self._bound is not x:
            self._x.copy_(x)
            self._bound = x
        if self._ggml.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml could not compute the graph")
        return self._y

    @property
    def bytes(self) -> int | None:
        return self._bytes

    @staticmethod
    def _context(g: Any) -> int:
        """Room for tensors without their data, and a graph."""
        size = _NODES * g.ggml_tensor_overhead() + g.ggml_graph_overhead()
        return g.ggml_init(_Parameters(size, None, True))

    def _own(self, free: Any, handle: int) -> int:
        if not handle:
            raise RuntimeError("ggml refused to allocate")
        self._owned.append((free, handle))
        return handle

    def __del__(self) -> None:
        for free, handle in reversed(getattr(self, "_owned", [])):
            free(handle)


class GgmlQ8(_Ggml):
    name = "stable-diffusion.cpp q8_0"
    _kind = 8


class GgmlQ4(_Ggml):
    name = "stable-diffusion.cpp q4_0"
    _kind = 2


class GgmlQ4Repacked(_Ggml):
    name = "ggml q4_0 repacked"
    _kind = 2
    _repacked = True


def _library() -> Any:
    """The library of the binding, with the functions' types. Raises `OSError`."""
    found = importlib.util.find_spec("stable_diffusion_cpp")
    folder = Path(found.submodule_search_locations[0]) / "lib" if found and found.submodule_search_locations else Path()
    files = [f for f in sorted(folder.glob("*")) if f.name.endswith((".so", ".dylib", ".dll"))]
    if not files:
        raise OSError("the binding holds none")
    path = files[0]
    if path not in _loaded:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            if hasattr(library, name):
                getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
        library.ggml_log_set(_silent, None)
        if hasattr(library, _REPACKED):
            getattr(library, _REPACKED).restype = c_void_p
        _loaded[path] = library
    return _loaded[path]
