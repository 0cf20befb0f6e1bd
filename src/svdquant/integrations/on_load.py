"""Quantizing while a 16-bit checkpoint is being read: groups are solved as soon as their weights have arrived."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SVDQuantConfig, matches
from ..errors import SVDQuantError
from ..nn import make_layer, replace_module
from ..ptq.linears import find_linears
from ..ptq.plan import GroupPlan, make_plan
from ..ptq.quantize import check_single_model, make_report
from ..ptq.solve import solve_group


class GroupSolver:
    """Turns 16-bit weights, shard by shard, into the tensors of quantized layers, data-free.

    model: on the meta device; every solved layer takes its place in it. keep: modules that stay as they are.
    device: where groups are solved; None = where their weights are read to.
    """

    def __init__(
        self, model: nn.Module, config: SVDQuantConfig, keep: list[str] | None = None, device: Any = None
    ) -> None:
        check_single_model(config)
        # A pattern that fits no linear is an error in a configuration, but these are the model's own.
        kept = [k for k in keep or [] if any(matches(k, name) for name in find_linears(model))]
        config = replace(config, layers=None)
        plan = make_plan(model, replace(config, skip=[*config.skip, *kept]))
        self._model, self._config, self._plan, self._device = model, config, plan, device
        self._group_of = {m.name: group for group in plan.groups for m in group.members}
        self._originals = {name: model.get_submodule(name) for name in self._group_of}
        self._held: dict[str, Tensor] = {}

    @property
    def keys(self) -> set[str]:
        """Names of the 16-bit tensors that are still to come or are held."""
        return {f"{name}.{leaf}" for name in self._group_of for leaf in self._leaves(name)}

    def take(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is to be loaded now: weights of unfinished groups are held back, tensors of finished ones added."""
        out: dict[str, Tensor] = {}
        touched: dict[str, GroupPlan] = {}
        keys = self.keys
        for key, value in state_dict.items():
            if key not in keys:
                out[key] = value
                continue
            self._held[key] = value
            group = self._group_of[key.rpartition(".")[0]]
            touched[group.name] = group
        for group in touched.values():
            if self._complete(group):
                out |= self._solve(group)
        return out

    def finish(self, where: str) -> None:
        """Raises `SVDQuantError` where a group never became complete."""
        if lacking := sorted(self.keys - self._held.keys()):
            raise SVDQuantError(
                f"{where}: tensor {lacking[0]} is missing, so its layer cannot be quantized; download it again"
            )

    def _leaves(self, name: str) -> tuple[str, ...]:
        return ("weight",) if self._originals[name].bias is None else ("weight", "bias")

    def _complete(self, group: GroupPlan) -> bool:
        return all(f"{m.name}.{leaf}" in self._held for m in group.members for leaf in self._leaves(m.name))

    def _solve(self, group: GroupPlan) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor | None] = {}
        for member in group.members:
            name, original = member.name, self._originals[member.name]
            dtype: torch.dtype = original.weight.dtype  # type: ignore[assignment]
            weights[name] = self._held.pop(f"{name}.weight").to(self._device, dtype)
            bias = self._held.pop(f"{name}.bias", None)
            biases[name] = None if bias is None else bias.to(self._device, dtype)
        out: dict[str, Tensor] = {}
        solved = solve_group(group, weights, biases, None, self._config)
        report = make_report(self._plan, {name: layer.report for name, layer in solved.items()}, self._config)
        report.check(self._config.max_error)
        kept = {layer.name for layer in report.layers if layer.kind == "keep"}
        for name, layer in solved.items():
            if name in kept:
                out[f"{name}.weight"] = weights[name]
                out |= {f"{name}.bias": b for b in (biases[name],) if b is not None}
                continue
            replace_module(self._model, name, make_layer(self._originals[name], layer.tensors.to("meta")))
            out |= {f"{name}.{leaf}": value for leaf, value in layer.tensors.named().items()}
        for member in group.members:
            del self._group_of[member.name], self._originals[member.name]
        return out


def solving_device(device_map: Any) -> Any:
    """The first accelerator of a device map, where groups are solved fastest; None = wherever they are read to."""
    if isinstance(device_map, str):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for device in (device_map or {}).values():
        if not isinstance(device, str) or device not in ("cpu", "disk", "meta"):
            return None if torch.device(device).type == "cpu" else device
    return None
