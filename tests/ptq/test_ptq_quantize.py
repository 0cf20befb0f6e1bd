"""`svdquant.quantize` on small modules: in place, all or nothing, reproducible."""

import copy

import pytest
import reference64
import torch
from diffusers import SanaTransformer2DModel
from torch import nn

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.nn import SVDQuantConv2d, SVDQuantLinear, quantized_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(128, 64) for _ in range(3))
        self.out = nn.Linear(64, 128, bias=False)
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128, bias=False)

    def forward(self, x):
        x = x + self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(32, 128)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(128, 16)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LEAVES = ("q", "k", "v", "out", "up", "down")
NAMES = [f"blocks.{i}.{leaf}" for i in range(2) for leaf in LEAVES]


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return Toy().bfloat16().eval()


def tokens(seed=0, rows=96):
    return torch.randn(4, rows, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()


def calibrate(model):
    for seed in range(3):
        model(tokens(seed))


def config(**fields):
    return SVDQuantConfig(**({"rank": 8, "smooth": 4, "calibration_rows": 512} | fields))


def bits(model):
    return {name: t.view(torch.uint8).clone() if t.dim() else t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def result(original):
    model = copy.deepcopy(original)
    return model, svdquant.quantize(model, config(), calibrate)


def test_every_linear_of_a_block_is_replaced(result):
    model, report = result
    assert list(quantized_layers(model)) == NAMES == [layer.name for layer in report.layers]
    assert type(model.embed) is type(model.head) is nn.Linear
    assert {layer.group for layer in report.layers} == {
        f"blocks.{i}.{n}" for i in range(2) for n in ("q", "out", "up", "down")
    }
    assert model.blocks[0].down.spec.unsigned == ((0, 192),) and model.blocks[0].down.bias is not None
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(("activations", "limit"), [("int4", 0.16), ("int8", 0.09), ("none", 0.09)])
def test_the_model_still_computes_the_same(result, original, activations, limit):
    model = copy.deepcopy(result[0])
    svdquant.set_activations(model, activations)
    with torch.no_grad():
        error = reference64.relative(model(tokens(9)).float(), original(tokens(9)).float())
    assert 1e-4 < error < limit


def test_the_report_adds_up(result, original):
    model, report = result
    assert report.bytes_before == sum(p.numel() * p.element_size() for p in original.parameters())
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.bytes_after < 0.6 * report.bytes_before and report.seconds > 0
    assert report.worst(1)[0].error == max(layer.error for layer in report.layers)
    assert report.mean_error() == pytest.approx(sum(layer.error for layer in report.layers) / 12)
    again = type(report).from_json(report.to_json())
    assert again == report
    assert all(name in report.table() for name in NAMES)


def test_deterministic(result, original):
    model = copy.deepcopy(original)
    torch.manual_seed(123)
    svdquant.quantize(model, config(), calibrate)
    assert same(bits(model), bits(result[0]))


def test_a_group_does_not_depend_on_the_others(result, original):
    """Quantized alone, with all other layers skipped, a group gets the bits that it has in the whole model."""
    model = copy.deepcopy(original)
    svdquant.quantize(
        model, config(skip=["blocks.0", "blocks.1.q", "blocks.1.k", "blocks.1.v", "blocks.1.out"]), calibrate
    )
    assert list(quantized_layers(model)) == ["blocks.1.up", "blocks.1.down"]
    for leaf in ("up", "down"):
        assert same(bits(getattr(model.blocks[1], leaf)), bits(getattr(result[0].blocks[1], leaf)))


def test_data_free(original):
    model = copy.deepcopy(original)
    report = svdquant.quantize(model, config())
    assert {layer.error_of for layer in report.layers} == {"weight"}
    assert all(layer.smooth_factor is None for layer in quantized_layers(model).values())
    with torch.no_grad():
        assert reference64.relative(model(tokens(9)).float(), original(tokens(9)).float()) < 0.15


def test_default_configuration_and_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    dense = copy.deepcopy(model)
    x = torch.randn(300, 128)
    report = svdquant.quantize(model, calibrate=lambda m: m(x))
    assert [layer.rank for layer in report.layers] == [32, 32]
    assert isinstance(model[0], SVDQuantLinear) and model[2].spec.unsigned == ((0, 256),)
    assert reference64.relative(model(x).detach(), dense(x).detach()) < 0.08


def test_keep_16bit_above(result, original):
    errors = sorted(layer.error for layer in result[1].layers)
    limit = (errors[5] + errors[6]) / 2
    model = copy.deepcopy(original)
    report = svdquant.quantize(model, config(keep_16bit_above=limit), calibrate)
    kept = [layer.name for layer in report.layers if layer.kind == "keep"]
    assert kept == [layer.name for layer in result[1].layers if layer.error > limit] and len(kept) == 6
    for name in NAMES:
        module, before = model.get_submodule(name), original.get_submodule(name)
        if name in kept:
            assert type(module) is nn.Linear and same(bits(module), bits(before))
        else:
            assert same(bits(module), bits(result[0].get_submodule(name)))
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    assert [layer.name for layer in report.quantized] == [name for name in NAMES if name not in kept]


def test_int8_activations_above(result, original):
    errors = {layer.name: layer.error for layer in result[1].layers}
    limit = sorted(errors.values())[6]
    model = copy.deepcopy(original)
    report = svdquant.quantize(model, config(int8_activations_above=limit), calibrate)
    changed = {layer.name for layer in report.layers if layer.activations == "int8"}
    groups = {layer.name: layer.group for layer in result[1].layers}
    bad = {groups[name] for name, error in errors.items() if error > limit}
    assert changed == {name for name in NAMES if groups[name] in bad} and 0 < len(changed) < 12
    for layer in report.layers:
        spec = model.get_submodule(layer.name).spec
        assert spec.activations == ("int8" if layer.name in changed else "auto")
        assert (layer.error < errors[layer.name]) is (layer.name in changed)


def unchanged(model, original):
    return (
        [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        and same(bits(model), bits(original))
        and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    )


def never(model):
    model.blocks[0](torch.zeros(1, 4, 128, dtype=torch.bfloat16))


def partly(model):
    """Reaches every layer in its first forward, but with numbers that cannot be used."""
    model(tokens() * float("nan"))


@pytest.mark.parametrize(
    ("fields", "run", "message"),
    [
        ({"max_error": 1e-3}, calibrate, r"12 layers exceed the relative error 0\.001: blocks"),
        ({"rank": 200}, calibrate, r"rank 200 exceeds blocks\.0\.\w+, which is \d+×\d+; use --rank 128 or less"),
        ({"skip": ["nothing"]}, calibrate, "pattern 'nothing' matches no linear"),
        ({}, never, "calibrate returned without calling Toy"),
        ({}, partly, r"calibration inputs of blocks\.0\.q hold NaN or infinity"),
    ],
)
def test_nothing_is_changed_by_a_failure(original, fields, run, message, tmp_path):
    model = copy.deepcopy(original)
    with pytest.raises(SVDQuantError, match=message):
        svdquant.quantize(model, config(**fields), run, work_dir=tmp_path)
    assert unchanged(model, original)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_calibration_does_not_reach(original):
    class Half(Toy):
        def forward(self, x):
            return self.head(self.blocks[0](self.embed(x)))

    model = Half().bfloat16()
    before = copy.deepcopy(model)
    with pytest.raises(SVDQuantError, match=r"calibration never reached blocks\.1\.q and 3 more"):
        svdquant.quantize(model, config(), calibrate)
    assert unchanged(model, before)


def test_a_weight_with_nan(original):
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.blocks[1].up.weight[3, 4] = float("nan")
    before = copy.deepcopy(model)
    with pytest.raises(SVDQuantError, match=r"blocks\.1\.up\.weight holds NaN"):
        svdquant.quantize(model, config())
    assert unchanged(model, before)


def test_max_error_that_holds(original):
    model = copy.deepcopy(original)
    assert len(svdquant.quantize(model, config(max_error=0.9)).layers) == 12


def test_quantizing_twice(result):
    with pytest.raises(SVDQuantError, match="Toy is quantized already"):
        svdquant.quantize(copy.deepcopy(result[0]), config())


def test_progress_and_work_dir(original, tmp_path):
    model, seen = copy.deepcopy(original), []
    svdquant.quantize(model, config(), calibrate, work_dir=tmp_path, progress=lambda *a: seen.append(a))
    assert seen == [(i + 1, 8, f"blocks.{i // 4}.{leaf}") for i, leaf in enumerate(["q", "out", "up", "down"] * 2)]
    assert not list(tmp_path.iterdir())


def test_an_override_of_how_one_member_is_solved(original):
    """Members of one group that differ only in how they are solved, not stored."""
    model, plain = copy.deepcopy(original), copy.deepcopy(original)
    only = {"skip": ["blocks.1", "up", "down"], "smooth": False}
    svdquant.quantize(model, config(**only, overrides={"blocks.0.k": {"gptq": False}}), calibrate)
    svdquant.quantize(plain, config(**only), calibrate)
    assert not torch.equal(model.blocks[0].k.qweight, plain.blocks[0].k.qweight)


def test_sana_with_its_convolutions():
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32,
        sample_size=8, patch_size=1, mlp_ratio=2.5,
    ).eval()  # fmt: skip
    dense = copy.deepcopy(model)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 10),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "timestep": torch.ones(1),
    }
    report = svdquant.quantize(model, config(rank=8, smooth=3), lambda m: m(**inputs))
    ff = model.transformer_blocks[0].ff
    assert type(ff.conv_inverted) is type(ff.conv_point) is SVDQuantConv2d
    assert {layer.name: layer.rows for layer in report.layers}["transformer_blocks.0.ff.conv_point"] == 80
    assert report.worst(1)[0].error < 0.15
    with torch.no_grad():
        error = reference64.relative(model(**inputs).sample, dense(**inputs).sample)
    assert error < 0.1
