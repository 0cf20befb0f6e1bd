"""The fused blocks of FLUX.2, Qwen-Image, Z-Image and SD3.5 compute what diffusers' do, and as near to the truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux2, transformer_qwenimage, transformer_z_image
from fused_cases import Case, cast, error, fused_parts, of_type, plain, tensors
from torch import Tensor, nn

import svdquant
from svdquant import kernels
from svdquant.families import fused
from svdquant.kernels import fused as definitions
from svdquant.nn import SVDQuantLinear

pytestmark = pytest.mark.skipif(not kernels.cpu.available(), reason="nothing is fused without the compiled library")
ADAPTIVE = {"AdaLayerNormContinuous"}
WORDS = ["a cat", "two small dogs that sleep beside a cat in the sun"]
# Pipeline → classes that take diffusers' places, and how to draw several pictures of several sizes with it.
CASES: dict[str, tuple[set[str], dict[str, Any]]] = {
    "flux2_dev": (
        {
            *("Flux2TransformerBlock", "Flux2SingleTransformerBlock", "Flux2AttnProcessor"),
            *("Flux2ParallelSelfAttnProcessor", "Flux2FeedForward", "RMSNorm"),
        },
        {"prompt": WORDS, "height": 48, "width": 16},
    ),
    "qwen_image": (
        {"QwenImageTransformerBlock", "QwenDoubleStreamAttnProcessor2_0", "RMSNorm", "GELU"},
        {"prompt": WORDS, "height": 48, "width": 16, "true_cfg_scale": 2.0, "negative_prompt": "dark"},
    ),
    "z_image": (
        {"ZImageTransformerBlock", "ZSingleStreamAttnProcessor", "FeedForward", "RMSNorm"},
        {"prompt": WORDS, "height": 48, "width": 16, "guidance_scale": 3.0},
    ),
    "sd35_large": (
        {"JointTransformerBlock", "JointAttnProcessor2_0", "AdaLayerNormZero", "RMSNorm", "GELU"},
        {"prompt": WORDS, "height": 48, "width": 16, "guidance_scale": 3.0},
    ),
    "sd35_medium": (
        {
            *("JointTransformerBlock", "JointAttnProcessor2_0", "AdaLayerNormZero", "SD35AdaLayerNormZeroX"),
            *("RMSNorm", "GELU"),
        },
        {"prompt": WORDS, "height": 16, "width": 48, "guidance_scale": 3.0},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    names, arguments = CASES[request.param]
    yield Case(request.param, names | (ADAPTIVE if request.param != "z_image" else set()), **arguments)


@pytest.fixture
def model(case: Case) -> Any:
    return copy.deepcopy(case.quantized)


@pytest.fixture
def theirs_fail(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets forwards of diffusers whose place fused ones have taken fail."""

    def watch(model: nn.Module) -> None:
        for cls in {type(part) for part in fused_parts(model)}:
            method = "forward" if issubclass(cls, nn.Module) else "__call__"
            monkeypatch.setattr(cls.__base__, method, lambda *_a, _cls=cls, **_k: pytest.fail(f"diffusers' {_cls}"))

    return watch


def test_nothing_is_left_to_diffusers(case, model, theirs_fail):
    """Every picture takes the fused forwards, and all of them."""
    assert {type(part).__name__ for part in fused_parts(model)} == case.names
    assert fused_parts(plain(model)) == []
    expected = case.run(model)
    theirs_fail(model)
    assert torch.equal(case.run(model), expected)


def test_by_the_library(case, model, monkeypatch):
    """No operation between products is left to its definition in torch."""
    asked, run = [], []
    for name in ("norm_modulate", "norm_rotate", "gate_add"):
        for module, calls in ((definitions, asked), (kernels.cpu, run)):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, _f=function, _c=calls, **k: _c.append(1) or _f(*a, **k))
    case.run(model)
    assert len(asked) == len(run) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activations", ["auto", "none"])
def test_as_near_to_the_truth(case, model, dtype, activations):
    """Two pictures of odd size with guidance, texts of different lengths."""
    of_type(model, dtype)
    svdquant.set_activations(model, activations)
    ours, theirs = (case.run(m, dtype=dtype) for m in (model, plain(model)))
    truth = case.truth(model)
    bound = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-5}[dtype]
    if activations == "auto":
        bound = max(bound, 3e-2)
    assert error(ours, truth) < max(1.2 * error(theirs, truth), 1e-6) and error(theirs, truth) < bound
    assert 0 < error(ours, theirs) < 1.5 * bound


def test_one_picture(case, model, theirs_fail):
    arguments = {"prompt": "a cat", "height": 16, "width": 48}
    if case.name == "qwen_image":
        arguments |= {"true_cfg_scale": 1.0, "negative_prompt": None}
    inputs = case.record(**arguments)
    theirs, truth = case.run(plain(model), inputs), case.truth(model, inputs)
    theirs_fail(model)
    assert error(case.run(model, inputs), truth) < 1.2 * error(theirs, truth)


def test_turned_off(case, model, monkeypatch):
    theirs = case.run(plain(model))
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    assert torch.equal(case.run(model), theirs)


def test_gradients(case, model):
    """Training goes through diffusers' own forwards."""
    block, args, options = last_block(case, model)
    with torch.enable_grad():
        ours, theirs = (tensors(b(*args, **options)) for b in (block, plain(block)))
    assert all(torch.equal(y, truth) for y, truth in zip(ours, theirs, strict=True))


def last_block(case: Case, model: nn.Module) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A fused block, and what it reads."""
    block = [part for part in fused_parts(model) if type(part).__name__.endswith("Block")][-1]
    return block, *case.read_by(model, block)


def test_inputs_stay(case, model):
    """What a block reads is not written."""
    block, args, options = last_block(case, model)
    before = copy.deepcopy((args, options))
    with torch.no_grad():
        block(*args, **options)
    for now, then in zip(tensors((args, options)), tensors(before), strict=True):
        assert torch.equal(now, then)


def test_hooks_see_what_layers_made(case, model):
    """Every layer is called, and what a hook keeps of it is not written over."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SVDQuantLinear) or name.endswith("norm_q"):
            module.register_forward_hook(lambda _m, _i, y, name=name: seen.setdefault(name, (y, y.clone())) and None)
    expected = case.run(case.quantized)
    assert torch.equal(case.run(model), expected)
    wanted = {n for n, m in model.named_modules() if isinstance(m, SVDQuantLinear) or n.endswith("norm_q")}
    assert set(seen) == wanted
    last = ("linear_in", "w1", "to_qkv_mlp_proj")
    assert all(torch.equal(*kept) for name, kept in seen.items() if name.endswith(last))


def test_adapters(case, model):
    """PEFT takes the place of layers: they are called, and nothing that they compute is left out."""
    from peft import LoraConfig

    before = case.run(model)
    torch.manual_seed(0)
    targets = [name for name, m in model.named_modules() if type(m) is SVDQuantLinear][::2]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    y, theirs = case.run(model), case.run(plain(model))
    assert error(y, theirs) < 3e-2 < error(y, before)
    model.disable_adapters()
    assert error(case.run(model), before) < 3e-2


def test_a_users_processor(case, model):
    """It is called, in an otherwise fused block."""
    theirs = next(type(p).__base__ for p in fused_parts(model) if type(p).__name__.endswith(("Processor", "2_0")))
    calls = []

    class Mine(theirs):
        def __call__(self, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **options)

    for module in model.modules():
        if type(module.__dict__.get("processor")).__base__ is theirs:
            module.set_processor(Mine())
    fused.install(model)
    assert error(case.run(model), case.run(plain(model))) < 3e-2 and calls


def test_a_forward_of_somebody_else(case, model):
    layer = next(m for n, m in model.named_modules() if n.endswith((".attn.to_q", "attention.to_q")))
    forward, calls = layer.forward, []
    expected = case.run(model)
    layer.forward = lambda x: calls.append(x.shape) or forward(x)
    assert torch.equal(case.run(model), expected) and calls


# What only some families have.


@pytest.fixture(scope="module")
def flux2() -> Case:
    return Case("flux2_klein", set())


@pytest.mark.parametrize("mode", ["extract", "cached"])
def test_flux2_with_kept_keys(flux2, mode):
    """Tokens that are modulated differently, other processors, and arguments for them: diffusers' own."""
    model = copy.deepcopy(flux2.quantized)
    for module in model.modules():
        if isinstance(module, transformer_flux2.Flux2Attention):
            module.set_processor(transformer_flux2.Flux2KVAttnProcessor())
        if isinstance(module, transformer_flux2.Flux2ParallelSelfAttention):
            module.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    fused.install(model)
    args, options = copy.deepcopy(flux2.inputs)
    picture = options["hidden_states"]

    def run(model: Any) -> Tensor:
        longer = options | {
            "hidden_states": torch.cat([picture[:, :3], picture], 1),
            "img_ids": torch.cat([options["img_ids"][..., :3, :], options["img_ids"]], -2),
        }
        longer["return_dict"] = options["return_dict"] = True
        first = model(*args, **longer, kv_cache_mode="extract", num_ref_tokens=3)
        if mode == "extract":
            return first.sample.double()
        return model(*args, **options, kv_cache_mode="cached", kv_cache=first.kv_cache).sample.double()

    with torch.no_grad():
        assert error(run(model), run(plain(model))) < 3e-2


def test_flux2_modulation_of_every_token(flux2):
    block = flux2.quantized.single_transformer_blocks[0]
    x, mods = torch.randn(1, 9, 128).bfloat16(), torch.randn(1, 9, 384).bfloat16()
    with torch.no_grad():
        assert torch.equal(block(x, None, mods), plain(block)(x, None, mods))
        ours, theirs = (b(x, None, mods[:, :1]) for b in (block, plain(block)))
    assert 0 < error(ours, theirs) < 2e-2


@pytest.fixture(scope="module")
def qwen() -> Case:
    return Case("qwen_image", set())


@pytest.mark.parametrize("first", [0, 3, 12])
@pytest.mark.parametrize("batch", [1, 2])
def test_qwen_with_two_times(qwen, first, batch, monkeypatch):
    """The newest edit model's tokens of given pictures have a time of their own (zero_cond_t)."""
    block = copy.deepcopy(qwen.quantized.transformer_blocks[0])
    block.zero_cond_t = True
    inputs = qwen_inputs(batch)
    inputs["temb"] = torch.cat([inputs["temb"], inputs["temb"].flip(-1)])
    inputs["modulate_index"] = (torch.arange(12) >= first).int().expand(batch, -1)
    exact = cast(inputs, torch.float32)
    with torch.no_grad():
        theirs = plain(block)(**inputs)
        svdquant.set_activations(block, "auto")
        truth = plain(block).float()(**exact)
        base = transformer_qwenimage.QwenImageTransformerBlock
        monkeypatch.setattr(base, "forward", lambda *_a, **_k: pytest.fail("diffusers' own"))
        ours = block(**inputs)
    for y, t, exactly in zip(ours, theirs, truth, strict=True):
        assert error(y, exactly) < 1.2 * error(t, exactly) < 0.03


def test_qwen_with_mixed_times(qwen):
    block = copy.deepcopy(qwen.quantized.transformer_blocks[0])
    block.zero_cond_t = True
    inputs = qwen_inputs(1)
    inputs["temb"] = torch.cat([inputs["temb"], inputs["temb"].flip(-1)])
    inputs["modulate_index"] = torch.tensor([[0, 1] * 6])
    with torch.no_grad():
        for y, t in zip(block(**inputs), plain(block)(**inputs), strict=True):
            assert error(y, t) < 2e-2


def qwen_inputs(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    angles = (torch.rand(17, 32, generator=generator) * 6).split([12, 5])
    return {
        "hidden_states": random(batch, 12, 128),
        "encoder_hidden_states": random(batch, 5, 128),
        "encoder_hidden_states_mask": mask,
        "temb": random(batch, 128),
        "image_rotary_emb": tuple(torch.polar(torch.ones_like(a), a) for a in angles),
    }


def test_qwen_refuses_what_diffusers_refuses(qwen):
    block = qwen.quantized.transformer_blocks[0]
    given = qwen_inputs(1)
    x, text = given["hidden_states"], given["encoder_hidden_states"]
    with torch.no_grad(), pytest.raises(ValueError, match="encoder_hidden_states"):
        block.attn(x)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask"):
        block.attn(x, text, attention_mask=torch.ones(1, 1, 1, 17))


@pytest.mark.parametrize("batch", [1, 2])
def test_z_image_per_token_times_and_tables(batch):
    """Tables of rotations per batch entry, or one for all; times per token are diffusers' business."""
    torch.manual_seed(0)
    block = transformer_z_image.ZImageTransformerBlock(0, 128, 2, 2, 1e-5, True).bfloat16()
    nn.init.normal_(block.adaLN_modulation[0].bias)
    svdquant.quantize(block, svdquant.SVDQuantConfig(rank=16))
    fused.install(block)
    x, angles = torch.randn(batch, 7, 128).bfloat16(), torch.rand(batch, 7, 32) * 6
    times = [torch.randn(batch, 128).bfloat16() for _ in range(3)]
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[-1, 5:] = False
    tables = torch.polar(torch.ones_like(angles), angles)
    with torch.no_grad():
        for table in (tables, tables[:1]):
            ours, theirs = (b(x, mask, table, times[0]) for b in (block, plain(block)))
            assert 0 < error(ours, theirs) < 2e-2
        noise = torch.arange(7).expand(batch, -1) % 2
        options = {"noise_mask": noise, "adaln_noisy": times[1], "adaln_clean": times[2]}
        ours, theirs = (b(x, mask, tables, **options) for b in (block, plain(block)))
    assert error(ours, theirs) < 2e-2


def test_every_family_is_there():
    """A class that this version of diffusers has not, or has with another signature, would be left out."""
    files = [import_module(f"{fused.__name__}.{file}") for file in fused.FILES]
    classes = {ours for file in files for ours in file.FUSED}
    assert set(fused._classes().values()) == classes
