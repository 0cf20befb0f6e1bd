"""Fused forwards of Wan, LTX and HunyuanVideo: nearer to the truth than diffusers', and out of others' way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import wraps
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from family_pipelines import relative
from fused_families import FAMILIES, errors, in_float32, inputs, output, quantized
from test_fused_flux import fused_classes, needs_library, plain
from torch import Tensor, nn

import svdquant
from svdquant.families import fused
from svdquant.families.fused import across_heads, modulation
from svdquant.kernels import gpu
from svdquant.nn import QUANTIZED

WAN = ("WanTransformerBlock", "WanAttnProcessor", "FP32LayerNorm")
LTX2 = ("LTX2VideoTransformerBlock", "LTX2AudioVideoAttnProcessor")
# Block and processor first.
BLOCKS: dict[str, tuple[str, ...]] = {
    "wan": WAN,
    "wan_5b": WAN,
    "wan_i2v": WAN,
    "ltx": ("LTXVideoTransformerBlock", "LTXVideoAttnProcessor"),
    "ltx2": LTX2,
    "ltx2_halves": LTX2,
    "hunyuan_video": (
        *("HunyuanVideoTransformerBlock", "HunyuanVideoAttnProcessor2_0", "HunyuanVideoSingleTransformerBlock"),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(family: str) -> Any:
    return quantized(family)


@pytest.fixture
def given(family: str) -> dict[str, Any]:
    return inputs(family, batch=2)


def parts_of(model: nn.Module) -> list[Any]:
    """Modules, and processors, which are no modules."""
    return [part for m in model.modules() for part in (m, m.__dict__.get("processor")) if part is not None]


@needs_library
@pytest.mark.parametrize("batch", [1, 2])
def test_nearer_to_the_truth(family, model, batch):
    ours, theirs = errors(model, inputs(family, batch))
    assert 0 < ours <= 1.2 * theirs < 0.05


@needs_library
def test_taken(family, model, given, monkeypatch):
    """Nothing of what is fused is left to diffusers' forwards."""
    assert set(BLOCKS[family]) <= fused_classes(model)
    theirs = output(plain(model), given)
    for parent in {type(part).__base__ for part in parts_of(model) if type(part).__name__ in BLOCKS[family]}:
        method = "forward" if issubclass(parent, nn.Module) else "__call__"
        monkeypatch.setattr(parent, method, lambda *_args, **_options: pytest.fail("diffusers' own forward"))
    assert 0 < relative(output(model, given), theirs) < 0.05


def test_turned_off(model, given, monkeypatch):
    theirs = output(plain(model), given)
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    assert torch.equal(output(model, given), theirs)


def test_modules_stay_what_they_are(model, given):
    theirs = plain(model)
    for ours, original in zip(parts_of(model), parts_of(theirs), strict=True):
        assert isinstance(ours, type(original)) and type(ours).__name__ == type(original).__name__
        assert ours.__dict__.keys() == original.__dict__.keys()
    assert torch.equal(output(model, given), output(copy.deepcopy(model), given))


def test_hooks_see_what_they_saw(model, given):
    """The same modules are called as in diffusers' forwards, with hooks on all of them, and with hooks on each."""

    def calls(watched: Any) -> tuple[set[str], Tensor]:
        seen: set[str] = set()
        for name, module in watched.named_modules():
            module.register_forward_hook(lambda _m, _i, _o, name=name: seen.add(name))
        return seen, output(watched, given)

    free = output(model, given)
    ours, theirs = (calls(m) for m in (copy.deepcopy(model), plain(model)))
    assert ours[0] == theirs[0]
    assert relative(ours[1], theirs[1]) < 0.05
    # Those of offloading, which are put in the place of forwards, change no bit.
    for module in model.modules():
        if not list(module.children()) and list(module.parameters()):
            module._hf_hook = object()
            module.forward = module.forward
    assert torch.equal(output(model, given), free)


def test_adapters(model, given):
    """PEFT takes the place of layers: they are called, and nothing that they compute is left out."""
    from peft import LoraConfig, inject_adapter_in_model

    before = output(model, given)
    torch.manual_seed(0)
    targets = [name for name, m in model.named_modules() if isinstance(m, (*QUANTIZED, nn.Linear)) and "attn" in name]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets), model)
    y = output(model, given)
    assert relative(y, output(plain(model), given)) < 0.05 < relative(y, before)


def test_a_users_processor(family, model, given):
    default: Any = next(type(part) for part in parts_of(model) if type(part).__name__ == BLOCKS[family][1])

    class Counting(default.__base__):  # type: ignore[misc,name-defined]
        calls = 0

        # Attention of old asks processors for their parameters.
        @wraps(default.__call__)
        def __call__(self, *args: Any, **options: Any) -> Any:
            type(self).calls += 1
            return super().__call__(*args, **options)

    expected = output(model, given)
    changed = 0
    for module in model.modules():
        if type(module.__dict__.get("processor")) is default:
            module.processor = Counting()
            changed += 1
    fused.install(model)
    assert relative(output(model, given), expected) < 0.05
    assert Counting.calls == changed > 0


@pytest.mark.parametrize("family", ["wan_i2v", "ltx", "ltx2", "hunyuan_video"])
def test_attention_backends_and_sequences_in_parts(family, model, given, monkeypatch):
    processors = [part for part in parts_of(model) if type(part).__name__ == BLOCKS[family][1]]
    ours, theirs = (import_module(cls.__module__) for cls in type(processors[0]).__mro__[:2])
    dispatch, seen = theirs.dispatch_attention_fn, []

    def record(*heads: Tensor, **options: Any) -> Tensor:
        seen.append(options)
        return dispatch(*heads, **options | {"parallel_config": None})

    for module in (theirs, ours):
        monkeypatch.setattr(module, "dispatch_attention_fn", record)
    free = output(model, given)
    count = len(seen)
    # diffusers makes a model's backend everybody's.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    model.set_attention_backend("_native_math")
    assert relative(output(model, given), free) < 0.05
    assert [options["backend"] for options in seen] == [None] * count + ["_native_math"] * count
    # Sequences that are split over several devices are diffusers' business.
    monkeypatch.setattr(ours, "dispatch_attention_fn", lambda *_args, **_options: pytest.fail("not diffusers' own"))
    config = object()
    for processor in processors:
        processor._parallel_config = config
    output(model, given)
    assert any(options["parallel_config"] is config for options in seen[2 * count :])


@pytest.mark.parametrize("family", ["wan", "ltx", "hunyuan_video"])
def test_first_block_cache(model, given):
    """diffusers looks the classes of blocks up."""
    free = output(model, given)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert torch.equal(output(model, given), free)
    model.disable_cache()


def test_gradients(model, given):
    """Training goes through diffusers' own forwards."""
    theirs = plain(model)
    name = next(key for key in ("hidden_states", "sample") if key in given)
    grown = []
    for m in (model, theirs):
        x = given[name].clone().requires_grad_()
        y = m(**given | {name: x}).sample
        y.float().sum().backward()
        grown.append((y.detach(), x.grad))
    assert torch.equal(grown[0][0], grown[1][0]) and torch.equal(grown[0][1], grown[1][1])
    assert bool(grown[0][1].any())


@pytest.mark.parametrize("family", ["wan", "ltx", "ltx2", "hunyuan_video"])
def test_another_signature(family, model, monkeypatch):
    """A diffusers whose forward takes other parameters keeps it."""
    names = BLOCKS[family]
    parents = [next(type(p).__base__ for p in parts_of(model) if type(p).__name__ == name) for name in names[:2]]
    for parent in parents:
        method = "forward" if issubclass(parent, nn.Module) else "__call__"
        monkeypatch.setattr(parent, method, lambda self, hidden_states, something_new: hidden_states)
    known = fused._classes.__wrapped__()
    assert not set(parents) & set(known) and len(known) > 5


@needs_library
def test_float32_is_exact(family, model, given):
    """One computation in two orders."""
    svdquant.set_activations(model, "none")
    model, given = nn.Module.float(model), in_float32(given)
    assert relative(output(model, given), output(plain(model), given)) < 1e-5


@pytest.mark.skipif(gpu.missing() is not None or not gpu.interpreting(), reason="needs triton, and TRITON_INTERPRET=1")
def test_by_a_gpus_kernels(monkeypatch):
    """In Triton's interpreter, beside the stored numbers, whose 8-bit copies differ by 1 %."""
    model, given = nn.Module.half(quantized("hunyuan_video")), inputs("hunyuan_video", dtype=torch.float16)
    given["hidden_states"] = given["hidden_states"][..., :1, :2, :6]
    monkeypatch.setenv("SVDQUANT_BACKEND", "reference")
    expected = output(plain(model), given)
    monkeypatch.setenv("SVDQUANT_BACKEND", "triton")
    assert relative(output(model, given), expected) < 0.05


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("rows", [1, 7], ids=["per sample", "per token"])
@pytest.mark.parametrize("affine", [True, False])
def test_modulation(dtype, bound, rows, affine):
    """Of tables and embeddings, against double precision."""
    norm = nn.LayerNorm(30, elementwise_affine=affine).to(dtype)
    for number, parameter in enumerate(norm.parameters()):
        parameter.copy_(random(30, seed=number))
    x, table, temb = (
        random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(2, 7, 30), (3, 30), (2, rows, 3, 30)])
    )
    shift, scale, gate = modulation.sums(table, temb)
    exact = [row.double() + part.double() for row, part in zip(table, temb.unbind(2), strict=True)]
    normed = copy.deepcopy(norm).double()(x.double())
    ours = modulation.FP32LayerNorm(30, elementwise_affine=affine).to(dtype)
    ours.load_state_dict(norm.state_dict())
    assert relative(ours(x).double(), normed) < bound
    y = ours(x, scale=scale, shift=shift)
    assert y.dtype == dtype and relative(y.double(), normed * (1 + exact[1]) + exact[0]) < bound
    modulated = modulation.modulate(x, scale, shift).double()
    assert relative(modulated, x.double() * (1 + exact[1]) + exact[0]) < 2 * bound
    truth = x.double() + exact[2] * y.double()
    assert relative(modulation.gate_add(x, gate, y).double(), truth) < bound
    assert modulation.gate_add(x, gate, y, into_residual=True).data_ptr() == x.data_ptr()
    assert relative(x.double(), truth) < bound


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotation_without_a_norm(dtype):
    """Numbers of all sizes that the type has are turned, and not scaled."""
    x = random(2, 5, 3, 8, dtype=dtype) * torch.tensor([1e-4, 1.0, 60.0, 3e3, 1e-2]).to(dtype)[None, :, None, None]
    angles = random(5, 4, seed=1) * 9
    cosine, sine = (part.repeat_interleave(2, 1) for part in (angles.cos(), angles.sin()))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    truth = torch.view_as_real(pairs * torch.polar(torch.ones(5, 4).double(), angles.double())[None, :, None]).flatten(
        -2
    )
    y = across_heads.rotate(x, (cosine, sine))
    assert y.data_ptr() == x.data_ptr()
    for token in range(5):
        bound = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-6}[dtype]
        assert relative(y[:, token].double(), truth[:, token]) < bound
    still = random(1, 5, 3, 8, dtype=dtype, seed=2)
    assert torch.equal(across_heads.rotate(still.clone(), (torch.ones(5, 8), torch.zeros(5, 8))), still)
