"""Random files of every published layout load into stock classes that compute what an independent reader says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import nunchaku64
import nunchaku_files as files
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import svdquant
from svdquant.nn import quantized_layers

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass
class Case:
    """One file. options: as for `files.plan`; content: as for `files.make`."""

    family: str
    precision: str = "int4"
    half: torch.dtype = BF16
    rank: int = 16
    container: str = "single"
    config: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return files.CONFIGS[self.config or self.family] | self.fields

    def __str__(self) -> str:
        half = str(self.half).removeprefix("torch.")
        more = [f"{k}={v}" for k, v in (self.fields | self.options | self.content).items()]
        return "-".join([self.config or self.family, self.precision, half, f"r{self.rank}", self.container, *more])


CASES = [
    Case("flux"),
    Case("flux", half=FP16, rank=32, fields={"guidance_embeds": False}),
    Case("flux", rank=128, content={"padded_groups": False}),
    Case("flux", "nvfp4", rank=32),
    Case("flux", "nvfp4", FP16, content={"outer": "none"}),
    Case("flux", "nvfp4", content={"outer": "both"}),
    Case("flux", "nvfp4", content={"outer": "wtscale"}),
    Case("flux", "nvfp4", content={"outer": "wcscales"}),
    Case("flux", container="folder"),
    Case("flux", "nvfp4", rank=32, container="folder"),
    Case("flux", half=FP16, container="folder without config"),
    Case("flux", "nvfp4", container="folder without config"),
    Case("flux", rank=32, container="blocks", fields={"guidance_embeds": False}),
    Case("flux", half=FP16, container="blocks"),
    Case("flux_lite", rank=32, container="lite"),
    Case("flux_lite", "nvfp4", container="lite"),
    Case("qwen"),
    Case("qwen", half=FP16, rank=128, content={"padded_groups": False}),
    Case("qwen", "nvfp4", rank=32),
    Case("qwen", "nvfp4", FP16, content={"outer": "both"}),
    Case("sdxl"),
    Case("sdxl", half=FP16, rank=32),
    Case("zimage", rank=32),
    Case("zimage", "nvfp4"),
    Case("zimage", rank=256),
    Case("flux", "nvfp4", FP16, rank=256, container="folder"),
    Case("zimage", half=FP16, options={"skip_refiners": True}),
    Case("zimage", "nvfp4", options={"skip_refiners": True}),
    Case("sana"),
    Case("sana", "nvfp4", rank=32),
    Case("sana", container="folder", options={"out_bias": False}),
    Case("sana", rank=32, config="sana_padded"),
    Case("sana", "nvfp4", config="sana_padded"),
    Case("sana", half=FP16, container="folder", config="sana_padded", options={"pag": True}),
    Case("t5"),
    Case("t5", half=FP16, options={"linears": ("q", "k", "v", "o", "wi_0")}),
    Case("t5", content={"padded_groups": False}),
]


@dataclass
class Loaded:
    case: Case
    model: nn.Module
    state: dict[str, np.ndarray]
    modules: set[str]  # that the file quantizes


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    case: Case = request.param
    tensors, state = _contents(case)
    path, base = _write(case, tensors, state, tmp_path_factory.mktemp("file"))
    model = svdquant.load_model(path, torch_dtype=torch.float32, **({"base": base} if base else {}))
    modules = files.plan(case.family, case.settings, case.precision, **case.options).modules()
    return Loaded(case, svdquant.set_activations(model, "none"), state, modules)


def _contents(case: Case) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    tensors = files.make(
        case.family, case.settings, case.precision, case.half, case.rank, **case.options, **case.content
    )
    return tensors, files.stock_state(case.family, tensors, case.settings, case.precision, **case.options)


def _write(
    case: Case, tensors: dict[str, Tensor], state: dict[str, np.ndarray], folder: Path
) -> tuple[Path, Path | None]:
    """(the file or folder, the base it needs); what the base provides is put into `state`."""
    if case.container == "single":
        skip = case.options.get("skip_refiners", False)
        info = files.metadata(case.family, case.settings, case.precision, case.rank, skip)
        return files.write_single(folder / "model.safetensors", tensors, info), None
    if case.container == "lite":
        return files.write_lite(folder / "model", tensors, case.settings, case.precision, case.rank), None
    if case.container == "folder":
        return files.write_folder(folder / "model", tensors, files.full_config(case.family, case.settings)), None
    other = files.random_state(case.family, case.settings, seed=1)
    base = files.write_base(folder / "base", case.family, case.settings, other)
    if case.container == "folder without config":
        return files.write_folder(folder / "model", tensors, None), base
    state |= {name: values for name, values in other.items() if "transformer_blocks." not in name}
    return files.write_blocks(folder / "svdq-int4-flux.1-dev.safetensors", tensors), base


@torch.no_grad()
def run(family: str, model: nn.Module, dtype: torch.dtype) -> np.ndarray:
    """One forward on inputs drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # Times 1000, 0.5 and 4 are exact in every type.
    half = torch.full((1,), 0.5, dtype=dtype)
    if family == "t5":
        return model(input_ids=torch.arange(11)[None] * 5 % 64).last_hidden_state.double().numpy()
    if family == "zimage":
        out = model([random(4, 1, 8, 12)], half, [random(9, 32)], return_dict=False)[0]
        return torch.stack(list(out)).double().numpy()
    if family in ("flux", "flux_lite"):
        image = torch.zeros(16, 3)
        image[:, 1], image[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        arguments = {
            "hidden_states": random(1, 16, 4),
            "encoder_hidden_states": random(1, 6, 32),
            "pooled_projections": random(1, 32),
            "timestep": half,
            "img_ids": image,
            "txt_ids": torch.zeros(6, 3),
        }
        if model.config.guidance_embeds:
            arguments["guidance"] = 8 * half
    elif family == "qwen":
        arguments = {
            "hidden_states": random(1, 16, 16),
            "encoder_hidden_states": random(1, 6, 32),
            "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.bool),
            "timestep": half,
            "img_shapes": [[(1, 4, 4)]],
        }
    elif family == "sdxl":
        arguments = {
            "sample": random(1, 4, 8, 8),
            "timestep": 1000 * half,
            "encoder_hidden_states": random(1, 6, 32),
            "added_cond_kwargs": {"text_embeds": random(1, 32), "time_ids": random(1, 6)},
        }
    else:
        arguments = {
            "hidden_states": random(1, 4, 8, 8),
            "encoder_hidden_states": random(1, 6, 32),
            "timestep": 1000 * half,
        }
    return model(**arguments, return_dict=False)[0].double().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_class_is_the_stock_one(loaded: Loaded) -> None:
    assert type(loaded.model) is files.STOCK_CLASS[loaded.case.family]


def test_exactly_the_file_s_layers_are_quantized(loaded: Loaded) -> None:
    assert set(quantized_layers(loaded.model)) == loaded.modules


def test_layers_mean_the_independent_dense_weights(loaded: Loaded) -> None:
    for name, layer in quantized_layers(loaded.model).items():
        weight, bias = layer.tensors().dense()
        expected = loaded.state[f"{name}.weight"]
        assert distance(weight.double().numpy(), expected.reshape(len(expected), -1)) < 1e-4, name
        expected_bias = loaded.state.get(f"{name}.bias")
        if expected_bias is None:
            assert bias is None, name
        elif bias is None:
            assert not expected_bias.any(), name
        else:
            assert np.abs(bias.double().numpy() - expected_bias).max() < 1e-4, name


def test_other_tensors_are_passed_through(loaded: Loaded) -> None:
    parameters = loaded.model.state_dict()
    for name, expected in loaded.state.items():
        if name.rpartition(".")[0] not in loaded.modules:
            assert np.array_equal(parameters[name].double().numpy(), expected), name


def test_model_computes_what_the_stock_one_does(loaded: Loaded) -> None:
    model = files.reference(loaded.case.family, loaded.case.settings, loaded.state)
    y = run(loaded.case.family, model, torch.float64)
    assert np.isfinite(y).all() and y.std() > 1e-3
    assert distance(run(loaded.case.family, loaded.model, torch.float32), y) < 1e-3


BY_FAMILY = [Case("flux", rank=32), Case("flux_lite", "nvfp4", container="lite"), Case("qwen", half=FP16), Case("sdxl")]
BY_FAMILY += [Case("zimage", "nvfp4", half=FP16), Case("sana", config="sana_padded"), Case("t5")]


@pytest.mark.parametrize("case", BY_FAMILY, ids=str)
def test_a_model_in_its_own_type_stays_close(case: Case, tmp_path: Path) -> None:
    tensors, state = _contents(case)
    model = svdquant.load_model(_write(case, tensors, state, tmp_path)[0])
    assert model.dtype == case.half
    expected = run(case.family, files.reference(case.family, case.settings, state), torch.float64)
    assert distance(run(case.family, model, case.half), expected) < 0.1


SAVED = [Case("flux", rank=32), Case("flux", "nvfp4"), Case("flux_lite", container="lite"), Case("qwen", "nvfp4", FP16)]
SAVED += [Case("sdxl"), Case("zimage", "nvfp4"), Case("zimage", options={"skip_refiners": True}), Case("t5")]
SAVED += [Case("sana"), Case("sana", config="sana_padded")]


def saved(case: Case, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors after a load and a save in the same format."""
    model = svdquant.load_model(_write(case, tensors, {}, folder)[0])
    if case.container == "lite":
        svdquant.save_model(model, folder / "saved", format="nunchaku_lite")
        return load_file(folder / "saved" / "diffusion_pytorch_model.safetensors")
    svdquant.save_model(model, folder / "saved.safetensors", format="nunchaku")
    return load_file(folder / "saved.safetensors")


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_a_saved_file_means_the_same_to_the_independent_reader(case: Case, tmp_path: Path) -> None:
    tensors, state = _contents(case)
    again = saved(case, tensors, tmp_path)
    assert {n for n in tensors if not n.endswith(("smooth_orig", "smooth_factor_orig"))} <= set(again)
    got = files.stock_state(case.family, again, case.settings, case.precision, **case.options)
    for name, expected in state.items():
        assert np.allclose(got[name], expected, rtol=1e-6, atol=1e-9), name


def leaves(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def modulation(tensors: dict[str, Tensor], name: str, x: np.ndarray, chunks: int) -> list[np.ndarray]:
    """What the runtime makes of a modulation layer: its outputs [channel, chunk], the scales with their 1."""
    layer = leaves(tensors, name)
    n, k = 4 * layer["qweight"].shape[0], x.shape[-1]
    weight, bias = nunchaku64.dense_awq(layer, n, k, 64)
    y = (x / (1 + np.exp(-x)) @ weight.T + bias).reshape(len(x), n // chunks, chunks)
    return [y[..., chunk] for chunk in range(chunks)]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape)


@torch.no_grad()
def test_stock_modulations_are_what_the_runtime_computes() -> None:
    """Not the package: that `files.stock_state` means what the runtime does with the same file."""
    tensors, state = _contents(case := Case("flux"))
    model = files.reference("flux", case.settings, state)
    x, embedding = draw(1, 5, 128), draw(1, 128)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    shift, scale, gate = modulation(tensors, "single_transformer_blocks.1.norm.linear", embedding, 3)
    got = model.single_transformer_blocks[1].norm(torch.tensor(x), emb=torch.tensor(embedding))
    assert np.allclose(got[0], normed * scale[:, None] + shift[:, None]) and np.allclose(got[1], gate)
    parts = modulation(tensors, "transformer_blocks.0.norm1.linear", embedding, 6)
    got = model.transformer_blocks[0].norm1(torch.tensor(x), emb=torch.tensor(embedding))
    assert np.allclose(got[0], normed * parts[1][:, None] + parts[0][:, None])
    for stock, own in zip(got[1:], (parts[2], parts[3], parts[4] - 1, parts[5]), strict=True):
        assert np.allclose(stock, own)

    tensors, state = _contents(case := Case("qwen"))
    block = files.reference("qwen", case.settings, state).transformer_blocks[1]
    parts = modulation(tensors, "transformer_blocks.1.txt_mod.1", embedding, 6)
    for i, chunk in enumerate(block.txt_mod(torch.tensor(embedding)).chunk(2, -1)):
        shift, scale, gate = parts[3 * i : 3 * i + 3]
        got = block._modulate(torch.tensor(normed), chunk)
        assert np.allclose(got[0], normed * scale[:, None] + shift[:, None]) and np.allclose(got[1], gate[:, None])


@torch.no_grad()
def test_stock_feed_forwards_are_what_the_runtime_computes() -> None:
    """Not the package, as above: shifted inputs of fc2, FLUX' joined output, the gate's side."""
    tensors, state = _contents(case := Case("flux"))
    model = files.reference("flux", case.settings, state)
    x, attention = draw(5, 128), draw(5, 128)[::-1]

    def layer(name: str, x: np.ndarray, shift: float = 0.0) -> np.ndarray:
        return nunchaku64.run_w4a4(leaves(tensors, name), x, shift)

    def gelu(x: np.ndarray) -> np.ndarray:
        return nn.functional.gelu(torch.tensor(x), approximate="tanh").numpy()

    b = "transformer_blocks.0."
    got = model.transformer_blocks[0].ff_context(torch.tensor(x))
    hidden = gelu(layer(f"{b}mlp_context_fc1", x))
    assert np.allclose(got, layer(f"{b}mlp_context_fc2", hidden, nunchaku64.SHIFT))

    b, block = "single_transformer_blocks.1.", model.single_transformer_blocks[1]
    hidden = gelu(layer(f"{b}mlp_fc1", x))
    assert np.allclose(block.act_mlp(block.proj_mlp(torch.tensor(x))), hidden)
    got = block.proj_out(torch.tensor(np.concatenate([attention, hidden], -1)))
    assert np.allclose(got, layer(f"{b}out_proj", attention) + layer(f"{b}mlp_fc2", hidden, nunchaku64.SHIFT))

    tensors, state = _contents(case := Case("zimage"))
    block, x = files.reference("zimage", case.settings, state).layers[0], draw(5, 384)
    value, gate = np.split(layer("layers.0.feed_forward.net.0.proj", x), 2, -1)
    expected = layer("layers.0.feed_forward.net.2", value * gate / (1 + np.exp(-gate)))
    assert np.allclose(block.feed_forward(torch.tensor(x)), expected)


@torch.no_grad()
@pytest.mark.parametrize("again", [False, True], ids=["random", "saved"])
@pytest.mark.parametrize("config", ["sana", "sana_padded"])
def test_stock_sana_is_what_the_runtime_computes(config: str, again: bool, tmp_path: Path) -> None:
    """As above: padded heads and hidden channels, the orders of K, V and of value, gate; and that of a saved file."""
    tensors, state = _contents(case := Case("sana", config=config))
    if again:
        tensors = saved(case, tensors, tmp_path)
    block = files.reference("sana", case.settings, state).transformer_blocks[0]
    d = len(state["patch_embed.proj.bias"])
    padded, b = -(-d // 128) * 128, "transformer_blocks.0."
    x = draw(12, d)

    def layer(name: str, x: np.ndarray) -> np.ndarray:
        return nunchaku64.run_w4a4(leaves(tensors, b + name), x)

    qkv = layer("attn.qkv_proj", x)
    q = np.maximum(qkv[:, :padded].reshape(12, -1, 32), 0)
    k, v = np.moveaxis(qkv[:, padded:].reshape(12, -1, 2, 32), 2, 0)
    k = np.maximum(k, 0)
    out = np.einsum("mhc,mhd,nhd->nhc", v, k, q) / (np.einsum("mhd,nhd->nh", k, q) + 1e-6)[..., None]
    got = block.attn1(torch.tensor(x)[None])[0]
    # diffusers computes this product in float32.
    assert np.allclose(got, layer("attn.out_proj", out.reshape(12, -1))[:, :d], rtol=1e-3, atol=1e-4)

    hidden = layer("ff.inverted_conv", x)
    hidden = torch.tensor(hidden / (1 + np.exp(-hidden))).T.reshape(1, -1, 3, 4)
    depth = [torch.from_numpy(nunchaku64.numbers(tensors[f"{b}ff.depth_conv.{leaf}"])) for leaf in ("weight", "bias")]
    hidden = nn.functional.conv2d(hidden, depth[0].movedim(-1, 1), depth[1], padding=1, groups=len(depth[1]))
    value, gate = hidden[0].flatten(1).T.reshape(12, -1, 2).movedim(-1, 0).numpy()
    expected = layer("ff.point_conv", value * gate / (1 + np.exp(-gate)))[:, :d]
    got = block.ff(torch.tensor(x).T.reshape(1, d, 3, 4))[0].flatten(1).T
    assert np.allclose(got, expected)


def test_the_embedding_of_a_text_encoder_may_be_there_twice(tmp_path: Path) -> None:
    tensors, state = _contents(Case("t5"))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    path = files.write_single(tmp_path / "t5.safetensors", tensors, files.metadata("t5", files.CONFIGS["t5"]))
    model = svdquant.set_activations(svdquant.load_model(path, torch_dtype=torch.float32), "none")
    y = run("t5", files.reference("t5", files.CONFIGS["t5"], state), torch.float64)
    assert distance(run("t5", model, torch.float32), y) < 1e-3
