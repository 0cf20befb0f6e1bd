"""`svdquant doctor`: versions, devices, which path each stored format takes on them, and what is wrong."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from .console import print_json, quiet_libraries, size, table
from .failures import DEBUG, doing
from .options import Json

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "triton")
_VARIABLES = (
    "SVDQUANT_BACKEND",
    "SVDQUANT_CPU_LIBRARY",
    "SVDQUANT_CPU_ISA",
    "SVDQUANT_FUSE",
    "TRITON_INTERPRET",
    DEBUG,
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
)
# What makes 8-bit and 16-bit products fast on a CPU.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)
_LOW_DISK = 10 * 2**30


def doctor(json: Json = False) -> None:
    """Show versions, devices, the path that each stored format takes on them, and anything wrong."""
    quiet_libraries()
    with doing("examining this machine"):
        found = examine()
    if json:
        print_json(found)
        return
    typer.echo(_text(found))


def examine() -> dict[str, Any]:
    """Everything `doctor` shows, as plain data."""
    devices = [_cpu(), *_accelerators()]
    cache = _cache_folder()
    return {
        "versions": _versions(),
        "devices": devices,
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "cache": {"folder": str(cache), "free_bytes": _free(cache)},
        "warnings": _warnings(devices, cache),
    }


def _versions() -> dict[str, str]:
    from .. import __version__

    found = {"svdquant": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu() -> dict[str, Any]:
    import torch

    from ..kernels.cpu import status

    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux
    return {
        "device": "cpu",
        "name": model,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        **_paths(torch.device("cpu")),
        "library": asdict(status()),
    }


def _accelerators() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        entry = {
            "device": f"cuda:{number}",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "sm": "" if torch.version.hip else f"sm_{properties.major}{properties.minor}",
        }
        found.append(entry | _paths(torch.device("cuda", number)))
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", **_paths(torch.device("mps"))})
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for number in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(number)
            entry = {"device": f"xpu:{number}", "name": properties.name, "memory_bytes": properties.total_memory}
            found.append(entry | _paths(torch.device("xpu", number)))
    return found


def _paths(device: Any) -> dict[str, Any]:
    """What "auto" activations mean per stored format on a device, by which backend, and why."""
    from ..kernels import device_path

    path = device_path(device)
    found = {"backend": path.backend, "activations": dict(path.auto), "why": path.why}
    if path.products:
        found["products"] = {precision: list(names) for precision, names in path.products.items()}
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _free(folder: Path) -> int | None:
    existing = next((f for f in (folder, *folder.parents) if f.is_dir()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None


def _warnings(devices: list[dict[str, Any]], cache: Path) -> list[str]:
    import torch

    from ..kernels.gpu import missing

    out = []
    has_driver = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
    if has_driver and not torch.cuda.is_available():
        if torch.version.cuda is None:
            out.append(
                "this machine has an NVIDIA driver, but torch was built without CUDA: install torch for CUDA from "
                "pytorch.org"
            )
        else:
            out.append(
                f"torch was built for CUDA {torch.version.cuda}, but sees no GPU: update the driver, or check "
                "CUDA_VISIBLE_DEVICES and the container's GPU option"
            )
    kernels = missing()
    if kernels is not None and any(device["device"].startswith(("cuda", "xpu")) for device in devices):
        out.append(f"GPUs dequantize and are slower: {kernels}")
    cpu = devices[0]
    if len(devices) == 1 and cpu["instructions"] and not any("vnni" in f or "amx" in f for f in cpu["instructions"]):
        out.append("no GPU, and a CPU without VNNI or AMX: pictures of large models will take many minutes")
    library = cpu["library"]
    if not library["available"]:
        out.append(f"no compiled products on this CPU, it dequantizes and is slower: {library['reason']}")
    elif library["threads"] == "none" and cpu["threads"] > 1:
        out.append(f"products on this CPU run on one thread: {library['threads_reason']}")
    if "SVDQUANT_BACKEND" in os.environ:
        out.append(f"SVDQUANT_BACKEND={os.environ['SVDQUANT_BACKEND']} overrides how layers multiply on every device")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        out.append("HF_HUB_OFFLINE is set: models are taken from the cache only")
    free = _free(cache)
    if free is not None and free < _LOW_DISK:
        out.append(f"only {size(free)} are free for downloads in {cache}: set HF_HOME to a larger disk")
    return out


def _library(library: dict[str, Any]) -> str:
    if not library["available"]:
        return "compiled products: none"
    others = [variant for variant in library["variants"] if variant != library["isa"]]
    also = f" (this CPU also runs {', '.join(others)})" if others else ""
    threads = "on one thread" if library["threads"] == "none" else f"threads of torch's {library['threads']}"
    return f"compiled products: {library['isa']}{also}, {threads}, {library['path']}"


def _text(found: dict[str, Any]) -> str:
    lines = [table(["package", "version"], [[k, v] for k, v in found["versions"].items()]), ""]
    for device in found["devices"]:
        memory = f", {size(device['memory_bytes'])}" if device.get("memory_bytes") else ""
        extra = device.get("sm") or " ".join(device.get("instructions", ()))
        threads = f", {device['threads']} threads" if "threads" in device else ""
        lines.append(f"{device['device']}  {device['name']}{memory}{threads}" + (f", {extra}" if extra else ""))
        for weights, activations in device["activations"].items():
            products = device.get("products", {}).get(activations)
            by = f"product {', else '.join(dict.fromkeys(products))}" if products else device["backend"]
            lines.append(f"    {weights:6} weights → {activations} activations, {by}")
        lines.append(f"    {device['why']}")
        if "library" in device:
            lines.append(f"    {_library(device['library'])}")
    lines.append("")
    lines += [f"{name}={value}" for name, value in found["environment"].items()] or ["no variable overrides anything"]
    free = found["cache"]["free_bytes"]
    lines.append(f"cache {found['cache']['folder']}" + (f", {size(free)} free" if free is not None else ""))
    lines += [""] + [f"warning: {text}" for text in found["warnings"]] if found["warnings"] else ["nothing wrong"]
    return "\n".join(lines)
