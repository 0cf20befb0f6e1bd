"""Adapters of LyCORIS' kinds with random contents, and the ΔW of each, in float64 from its published formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64
Group = dict[str, Tensor]
# (generator, W [N, K, …]) → (tensors of the group, ΔW)
Kind = Callable[[torch.Generator, Tensor], tuple[Group, Tensor]]


def normal(generator: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * size


def _size_of(features: int, wanted: int = 16) -> int:
    return next(size for size in range(min(wanted, features), 0, -1) if features % size == 0)


def rotation(blocks: Tensor, longest: float = 0.0) -> Tensor:
    q = blocks.to(F64) - blocks.to(F64).transpose(-1, -2)
    if longest and float(q.norm()) > longest:
        q = q * longest / q.norm()
    eye = torch.eye(q.shape[-1], dtype=F64)
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(generator: torch.Generator, weight: Tensor, alpha: float = 0.0, rescaled: bool = False) -> tuple[Group, Tensor]:
    """diag-oft: W′ = rescale · Rᵀ W, block by block."""
    n = weight.shape[0]
    size = _size_of(n)
    blocks = normal(generator, n // size, size, size, size=0.05)
    group = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
    r = rotation(blocks, alpha * n)
    turned = torch.einsum("knm,knp->kmp", r, weight.to(F64).reshape(n // size, size, -1)).reshape(weight.shape)
    if rescaled:
        rescale = 1 + normal(generator, n, *[1] * (weight.dim() - 1), size=0.2)
        group["rescale"] = rescale
        turned = turned * rescale.to(F64)
    return group, turned - weight.to(F64)


def limited_oft(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    return oft(generator, weight, alpha=1e-3, rescaled=True)


def boft(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    n = weight.shape[0]
    size = 8 if n % 8 == 0 else _size_of(n, 4)
    count = 1
    while n % (2**count * size) == 0 and count < 3:
        count += 1
    blocks = normal(generator, count, n // size, size, size, size=0.05)
    rows = weight.to(F64)
    for i, r in enumerate(rotation(blocks)):
        # Rows that lie k apart stand side by side.
        k = 2**i * (size // 2)
        order = torch.arange(n).reshape(-1, 2, k).transpose(1, 2).reshape(-1)
        turned = torch.einsum("bij,bj...->bi...", r, rows[order].reshape(n // size, size, *rows.shape[1:]))
        back = torch.empty_like(rows)
        back[order] = turned.reshape(rows.shape)
        rows = back
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, rows - weight.to(F64)


def peft_oft(generator: torch.Generator, weight: Tensor, scaled: bool = False) -> tuple[Group, Tensor]:
    """Inputs: x′ = x·R with the series of five terms."""
    k = weight.shape[1]
    size = _size_of(k, 8)
    packed = normal(generator, k // size, size * (size - 1) // 2, size=0.05 * (5 if scaled else 1))
    q = torch.zeros(k // size, size, size, dtype=F64)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = packed.to(F64) / ((size * (size - 1) // 2) ** 0.5 if scaled else 1)
    q = q - q.transpose(1, 2)
    r = torch.block_diag(*(torch.eye(size, dtype=F64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q))
    change = weight.to(F64) @ r.T - weight.to(F64)
    flag = {"oft_R.scaled_oft": torch.tensor(1)} if scaled else {}
    return {"oft_R.weight": packed} | flag, change


def scaled_peft_oft(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    return peft_oft(generator, weight, scaled=True)


def ia3(generator: torch.Generator, weight: Tensor, on_input: bool = False) -> tuple[Group, Tensor]:
    size = weight.shape[1 if on_input else 0]
    vector = normal(generator, size, size=0.2)
    kernel = [1] * (weight.dim() - 2)
    factor = vector.to(F64).reshape(1, -1, *kernel) if on_input else vector.to(F64).reshape(-1, 1, *kernel)
    stored = vector.reshape(1, -1, *kernel) if kernel else vector
    return {"weight": stored, "on_input": torch.tensor(int(on_input))}, weight.to(F64) * factor


def ia3_of_inputs(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    return ia3(generator, weight, on_input=True)


def glora(generator: torch.Generator, weight: Tensor, early: bool = False) -> tuple[Group, Tensor]:
    """W′ = W + (W·A + B)·alpha/r."""
    n, k, *kernel = weight.shape
    rank, ones = 3, [1] * len(kernel)
    a1, a2 = normal(generator, k, rank, *ones, size=0.1), normal(generator, rank, k, *ones, size=0.3)
    b1, b2 = normal(generator, n, rank, *ones, size=0.1), normal(generator, rank, k, *kernel, size=0.3)
    a = a1.flatten(1).to(F64) @ a2.flatten(1).to(F64)
    b = (b1.flatten(1).to(F64) @ b2.flatten(1).to(F64)).reshape(weight.shape)
    change = (torch.einsum("oi...,ij->oj...", weight.to(F64), a) + b) * (2.0 / rank)
    group = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    if early:
        group = {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    return group | {"alpha": torch.tensor(2.0)}, change


def early_glora(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    return glora(generator, weight, early=True)


def difference(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    """What LyCORIS calls full."""
    change = normal(generator, *weight.shape, size=0.3 / weight[0].numel() ** 0.5)
    return {"diff": change}, change.to(F64)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ij...,ip,jr->pr...", t.to(F64), a.to(F64), b.to(F64))


def locon_tucker(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    n, c, *kernel = weight.shape
    rank, ones = 3, [1] * len(kernel)
    up, down = normal(generator, n, rank, *ones), normal(generator, rank, c, *ones)
    mid = normal(generator, rank, rank, *kernel, size=0.05)
    change = torch.einsum("mnkl,im,nj->ijkl", mid.to(F64), up.flatten(1).to(F64), down.flatten(1).to(F64)) * (2 / rank)
    return {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "lora_mid.weight": mid,
        "alpha": torch.tensor(2.0),
    }, change


def loha_tucker(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    n, c, *kernel = weight.shape
    rank, group, halves = 2, {}, []
    for i in (1, 2):
        t = normal(generator, rank, rank, *kernel, size=0.3)
        a, b = normal(generator, rank, n), normal(generator, rank, c)
        group |= {f"hada_t{i}": t, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        halves.append(tucker(t, a, b))
    return group | {"alpha": torch.tensor(1.0)}, halves[0] * halves[1] * (1.0 / rank)


def loha(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    n, k = weight.shape[0], weight[0].numel()
    rank = 2
    a1, b1, a2, b2 = (
        normal(generator, *shape, size=size)
        for shape, size in (((n, rank), 0.1), ((rank, k), 1.0), ((n, rank), 0.3), ((rank, k), 1.0))
    )
    change = (a1.to(F64) @ b1.to(F64)) * (a2.to(F64) @ b2.to(F64)) * (1.0 / rank)
    group = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    return group, change.reshape(weight.shape)


def lokr(generator: torch.Generator, weight: Tensor, form: str = "whole") -> tuple[Group, Tensor]:
    """w1 ⊗ w2 with w2 whole, as a product, or in Tucker form."""
    n, c, *kernel = weight.shape
    w1 = normal(generator, 2, 2, size=0.3)
    ones = [1] * len(kernel)
    if form == "tucker":
        t = normal(generator, 2, 2, *kernel, size=0.4)
        a, b = normal(generator, 2, n // 2, size=0.5), normal(generator, 2, c // 2, size=0.5)
        group, w2, scale = {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}, tucker(t, a, b), 0.5
    elif form == "product":
        a, b = normal(generator, n // 2, 2, size=0.3), normal(generator, 2, weight[0].numel() // 2, size=0.3)
        group, scale = {"lokr_w2_a": a, "lokr_w2_b": b}, 0.5
        w2 = (a.to(F64) @ b.to(F64)).reshape(n // 2, c // 2, *kernel)
    else:
        left, right = normal(generator, n // 2, 2, size=0.3), normal(generator, 2, weight[0].numel() // 2, size=0.3)
        w2 = (left @ right).reshape(n // 2, c // 2, *kernel)
        group, scale, w2 = {"lokr_w2": w2}, 1.0, w2.to(F64)
    change = torch.kron(w1.to(F64).reshape(2, 2, *ones), w2.contiguous()) * scale
    return group | {"lokr_w1": w1, "alpha": torch.tensor(1.0)}, change


def lokr_tucker(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    return lokr(generator, weight, "tucker")


def lokr_product(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    return lokr(generator, weight, "product")


def column_dora(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    """A DoRA whose lengths are those of columns, at strength 1."""
    n, k = weight.shape
    down, up = normal(generator, 3, k, size=k**-0.5), normal(generator, n, 3, size=0.3)
    moved = weight.to(F64) + up.to(F64) @ down.to(F64) * (2.0 / 3)
    lengths = (moved.norm(dim=0, keepdim=True) * (1 + 0.2 * normal(generator, 1, k))).float()
    group = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": lengths}
    return group, moved * (lengths.to(F64) / moved.norm(dim=0, keepdim=True)) - weight.to(F64)


def row_dora(generator: torch.Generator, weight: Tensor) -> tuple[Group, Tensor]:
    """A DoRA whose lengths are those of rows (kernel by kernel of a convolution), at strength 1."""
    n, k, *kernel = weight.shape
    down = normal(generator, 3, k, *kernel, size=weight[0].numel() ** -0.5)
    up = normal(generator, n, 3, *[1] * len(kernel), size=0.3)
    moved = weight.to(F64) + (up.flatten(1).to(F64) @ down.flatten(1).to(F64) * (2.0 / 3)).reshape(weight.shape)
    norm = moved.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
    lengths = (norm * (1 + 0.2 * normal(generator, *norm.shape))).float()
    group = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": lengths}
    return group, moved * (lengths.to(F64) / norm) - weight.to(F64)


def adapter(
    kind: Kind, weights: dict[str, Tensor], seed: int, prefix: str = "lycoris_"
) -> tuple[Group, dict[str, Any]]:
    """(a file's tensors, module → ΔW float32) of one kind for every weight."""
    generator = torch.Generator().manual_seed(seed)
    state, changes = {}, {}
    for name, weight in weights.items():
        group, change = kind(generator, weight)
        base = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        state |= {f"{base}.{leaf}": value for leaf, value in group.items()}
        changes[name] = change.float()
    return state, changes
