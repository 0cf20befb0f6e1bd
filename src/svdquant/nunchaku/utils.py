"""Small helpers that scripts import. None of them refuses a machine: every device runs every precision here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SVDQuantError

if TYPE_CHECKING:
    import torch

# Nunchaku's names → the names of the formats here.
PRECISIONS = {"auto": "auto", "int4": "int4", "fp4": "nvfp4", "nvfp4": "nvfp4"}


def default_device(kind: str = "accelerator") -> torch.device:
    """The first accelerator, else the CPU; the CPU for kind "cpu"."""
    from ..integrations.pipeline import pick_device

    return pick_device("auto" if kind == "accelerator" else "cpu")


def require_device(device: str | torch.device | int) -> torch.device:
    """A device that can be used; raises `SVDQuantError` for any other."""
    from ..integrations.pipeline import pick_device

    return pick_device(f"cuda:{device}" if isinstance(device, int) else str(device))


def get_precision(
    precision: str = "auto",
    device: str | torch.device = "cuda",
    pretrained_model_name_or_path: str | Path | None = None,
) -> str:
    """ "int4" or "fp4": which of two published files to take; "auto" takes fp4 on GPUs with NVFP4 units for it.

    The answer is about speed. A file of the other precision runs too, so its name is not compared.
    """
    if precision not in PRECISIONS:
        raise SVDQuantError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return "int4" if precision == "int4" else "fp4"
    return "fp4" if (_capability(device) or (0, 0))[0] in (10, 12) else "int4"


def is_turing(device: str | torch.device = "cuda") -> bool:
    """Whether the device is an NVIDIA GPU of compute capability 7.5."""
    return _capability(device) == (7, 5)


def get_gpu_memory(device: str | torch.device = "cuda", unit: str = "GiB", return_gpu_name: bool = False) -> Any:
    """Memory of the device in whole `unit`s ("GiB", "MiB", "B"), or (memory, name).

    Without a GPU it is the host's memory, because that is where models then run.
    """
    import torch

    sizes = {"GiB": 1024**3, "MiB": 1024**2, "B": 1}
    if unit not in sizes:
        raise SVDQuantError(f"unit={unit!r} is not one of {', '.join(sizes)}")
    where = torch.device(device)
    if where.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(where)
        memory, name = properties.total_memory, properties.name
    elif torch.cuda.is_available() or not (hasattr(torch, "xpu") and torch.xpu.is_available()):
        import psutil

        memory, name = psutil.virtual_memory().total, "CPU"
    else:
        xpu = torch.xpu.get_device_properties(0)
        memory, name = xpu.total_memory, xpu.name
    memory //= sizes[unit]
    return (memory, name) if return_gpu_name else memory


def check_hardware_compatibility(quantization_config: dict[str, Any], device: str | torch.device = "cuda") -> None:
    """Returns: a device that lacks units for a format computes it in another way, so no device is refused."""


def get_precision_from_quantization_config(quantization_config: dict[str, Any]) -> str:
    """ "int4" or "nvfp4", from the record in a file's metadata; raises `SVDQuantError` for any other format."""
    weight = quantization_config.get("weight") or {}
    dtype, group = weight.get("dtype"), weight.get("group_size")
    if dtype == "int4":
        return "int4"
    if dtype == "fp4_e2m1_all" and group == 16:
        return "nvfp4"
    raise SVDQuantError(f"weights of type {dtype!r} in groups of {group} are neither int4 nor nvfp4; take another file")


def fetch_or_download(path: str | Path, repo_type: str = "model") -> Path:
    """A local path as it is; a Hub path after its download. Raises `SVDQuantError` where there is neither."""
    from ..checkpoint.hub import fetch

    if repo_type != "model":
        raise SVDQuantError(f"repo_type={repo_type!r} is not model; download it with huggingface_hub")
    return fetch(path)


def load_state_dict_in_safetensors(
    path: str | Path, device: str | torch.device = "cpu", filter_prefix: str = "", return_metadata: bool = False
) -> Any:
    """Tensors of one file whose names start with `filter_prefix`, without it; or (tensors, metadata)."""
    from safetensors import safe_open

    from ..checkpoint.header import read_header

    local = fetch_or_download(path)
    metadata = read_header(local)[1]
    with safe_open(local, framework="pt", device=str(device)) as file:
        tensors = {
            name.removeprefix(filter_prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118  (a safe_open is not iterable)
            if name.startswith(filter_prefix)
        }
    return (tensors, metadata) if return_metadata else tensors


def filter_state_dict(state_dict: dict[str, Any], filter_prefix: str = "") -> dict[str, Any]:
    """The entries whose names start with `filter_prefix`, without it."""
    return {name.removeprefix(filter_prefix): t for name, t in state_dict.items() if name.startswith(filter_prefix)}


def pad_tensor(tensor: torch.Tensor | None, multiples: int, dim: int, fill: Any = 0) -> torch.Tensor | None:
    """`tensor` with dimension `dim` filled up to a multiple of `multiples`."""
    if tensor is None or multiples <= 1 or tensor.shape[dim] % multiples == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = ceil_divide(shape[dim], multiples) * multiples
    padded = tensor.new_full(shape, fill)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return padded


def ceil_divide(x: int, divisor: int) -> int:
    """x / divisor, rounded up."""
    return -(-x // divisor)


def sha256sum(filepath: str | Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(filepath, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def copy_params_into(
    src: torch.nn.Module, dst: torch.nn.Module, strict: bool = True, non_blocking: bool = False
) -> None:
    """Overwrites the parameters and buffers of `dst` with those of `src`. strict: the names must be the same."""
    import torch

    def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return dict(module.named_parameters()) | dict(module.named_buffers())

    source, target = tensors(src), tensors(dst)
    if strict and (odd := sorted(source.keys() ^ target.keys())):
        raise SVDQuantError(f"{odd[0]} is in only one of the two modules; copy with strict=False")
    shared = source.keys() & target.keys()
    if other := sorted(name for name in shared if source[name].shape != target[name].shape):
        raise SVDQuantError(f"{other[0]} has another shape in each of the two modules; copy between equal ones")
    with torch.no_grad():
        for name in shared:
            target[name].copy_(source[name], non_blocking=non_blocking)


def _capability(device: str | torch.device | int) -> tuple[int, int] | None:
    import torch

    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(where)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
