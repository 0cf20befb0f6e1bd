"""The layers: storage, casts, their dense meaning, and the precision dial."""

import copy

import pytest
import reference64
import torch
import torch.nn.functional as F
from torch import nn

from svdquant import SVDQuantError, set_activations
from svdquant.config import LayerSpec
from svdquant.nn import (
    FIXED_DTYPE,
    SVDQuantConv2d,
    SVDQuantLinear,
    W4A16Linear,
    empty_layer,
    is_pointwise_conv,
    make_layer,
    quantized_layers,
    replace_module,
)
from svdquant.nn.linear import empty_tensors
from svdquant.ptq import LayerPlan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPECS = {
    "int4": LayerSpec(),
    "int4 rotated": LayerSpec(rotate=True, rank=16),
    "int4 unsigned": LayerSpec(unsigned=((0, 64),), rank=16),
    "int4 without extras": LayerSpec(rank=0, smooth=False),
    "int4 g32": LayerSpec(group_size=32, rank=8),
    "nvfp4": LayerSpec(weights="nvfp4", group_size=16),
    "nvfp4 without extras": LayerSpec(weights="nvfp4", group_size=16, rank=0, smooth=False),
    "int8": LayerSpec(weights="int8", group_size=0),
    "int8 rotated": LayerSpec(weights="int8", group_size=0, rotate=True, rank=4),
    "w4a16": LayerSpec("w4a16", "int4", 64, 0, "none", (), False, False),
}


@pytest.fixture(params=SPECS, ids=lambda name: name.replace(" ", "-"))
def spec(request):
    return SPECS[request.param]


def make(spec, k=130, n=48, bias=True, dtype=torch.bfloat16):
    return make_layer(nn.Linear(k, n, device="meta", dtype=dtype), reference64.random_tensors(spec, k, n, bias, dtype))


def equal(a, b):
    """Same type and bits."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(64, 32), (130, 47), (320, 96)])
def test_empty_storage_matches_the_record_and_the_plan(spec, k, n, bias, dtype):
    bias = bias or bool(spec.unsigned)
    empty = empty_tensors(k, n, bias, spec, dtype)
    full = reference64.random_tensors(spec, k, n, bias, dtype).named()
    assert {name: (t.shape, t.dtype) for name, t in empty.items()} == {
        name: (t.shape, t.dtype) for name, t in full.items()
    }
    plan = LayerPlan("x", spec.kind, k, n, bias, dtype.itemsize, "", "x", "", spec=spec)
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in empty.values())


def test_the_plan_counts_the_bias_that_the_shift_needs():
    spec = SPECS["int4 unsigned"]
    layer = empty_layer(nn.Linear(128, 48, bias=False, device="meta"), spec, torch.bfloat16)
    plan = LayerPlan("x", "svdquant", 128, 48, False, 2, "", "x", "", spec=spec)
    assert plan.bytes_after == sum(p.numel() * p.element_size() for p in layer.parameters())


def test_a_kept_layer_keeps_its_bytes():
    plan = LayerPlan("x", "keep", 128, 48, True, 2, "", "x", "")
    assert plan.bytes_after == plan.bytes_before == (128 * 48 + 48) * 2


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_empty_layer_follows_the_original(device, conv):
    original = nn.Conv2d(130, 47, 1, bias=False, device=device) if conv else nn.Linear(130, 47, False, device=device)
    layer = empty_layer(original, SPECS["nvfp4"], torch.float16)
    assert type(layer) is (SVDQuantConv2d if conv else SVDQuantLinear)
    assert layer.bias is None and layer.proj_up.dtype == torch.float16
    assert {p.device.type for p in layer.parameters()} == {device}
    shifted = empty_layer(original, SPECS["int4 unsigned"], torch.float16)
    assert shifted.bias.shape == (47,)


def test_weight_is_a_view_of_nothing(spec):
    layer = make(spec)
    weight = layer.weight
    assert weight.shape == (48, 130) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert weight.untyped_storage().nbytes() == weight.element_size()
    assert "weight" not in dict(layer.named_parameters()) and "weight" not in layer.state_dict()
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (130, 48)


def test_weight_of_a_convolution():
    layer = make_layer(
        nn.Conv2d(130, 48, 1, device="meta"), reference64.random_tensors(LayerSpec(), 130, 48, True, torch.half)
    )
    assert layer.weight.shape == (48, 130, 1, 1) and layer.weight.dtype == torch.half
    assert layer.weight.untyped_storage().nbytes() == 2
    assert isinstance(layer, nn.Conv2d) and (layer.in_channels, layer.out_channels) == (130, 48)
    assert layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float32), lambda m: m.double()])
def test_casts_leave_scales_alone(spec, cast):
    layer = make(spec)
    model = nn.Sequential(copy.deepcopy(layer), nn.LayerNorm(48))
    cast(model)
    target = model[1].weight.dtype
    for name, original in layer.named_parameters():
        now = getattr(model[0], name)
        if name in layer.fixed:
            assert equal(now, original), name
        else:
            assert now.dtype == target, name
            assert torch.equal(now, original.to(target))
        assert isinstance(now, nn.Parameter) and not now.requires_grad


def test_there_and_back_gives_the_same_scales(spec):
    layer = make(spec, dtype=torch.float32)
    cast = copy.deepcopy(layer).half().bfloat16().float()
    for name in FIXED_DTYPE:
        assert equal(getattr(cast, name), getattr(layer, name)), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_cast_is_refused_and_changes_nothing(spec, dtype):
    layer = make(spec)
    before = copy.deepcopy(layer)
    with pytest.raises(SVDQuantError, match="layerwise casting"):
        layer.to(dtype)
    for name, original in before.named_parameters():
        assert equal(getattr(layer, name), original), name


def test_to_meta_and_empty(spec):
    layer = make(spec)
    shapes = {name: (p.shape, p.dtype) for name, p in layer.named_parameters()}
    layer.to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"} and layer.weight.device.type == "meta"
    layer.to_empty(device="cpu")
    assert {name: (p.shape, p.dtype) for name, p in layer.named_parameters()} == shapes


@pytest.mark.parametrize("bias", [False, True])
def test_dequantize_equals_16_bit_activations(spec, bias):
    layer = make(spec, bias=bias, dtype=torch.float32)
    dense = layer.dequantize()
    assert type(dense) is nn.Linear and (dense.bias is None) == (layer.bias is None)
    x = reference64.random_inputs(spec, 9, 130, torch.float32)
    layer.activations = "none"
    assert reference64.relative(layer(x), dense(x)) < 1e-5
    weight, shift = reference64.layer(layer.tensors()).dense()
    assert reference64.relative(dense.weight, weight) < 1e-6
    assert reference64.relative(dense(x), x.double().numpy() @ weight.T + shift) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_has_the_compute_type(spec, dtype):
    layer = make(spec, dtype=dtype)
    assert layer.compute_dtype == dtype
    assert layer.dequantize().weight.dtype == dtype and layer.dequantize().weight.shape == (48, 130)


def test_forward_of_w4a16_ignores_the_dial():
    layer = make(SPECS["w4a16"], dtype=torch.float32)
    assert type(layer) is W4A16Linear
    x = reference64.random_inputs(layer.spec, 5, 130, torch.float32)
    expected, _ = reference64.layer(layer.tensors()).forward(x.double().numpy(), "none", torch.float32)
    for activations in ("auto", "int4", "int8"):
        layer.activations = activations
        assert reference64.relative(layer(x), expected) < 1e-5


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4", "none"])
def test_forward_uses_the_dial(activations):
    layer = make(LayerSpec(rank=16), dtype=torch.float32)
    x = reference64.random_inputs(layer.spec, 12, 130, torch.float32)
    layer.activations = activations
    expected, certain = reference64.layer(layer.tensors()).forward(x.double().numpy(), activations, torch.float32)
    assert reference64.relative(layer(x).numpy()[certain], expected[certain]) < 1e-5


@pytest.mark.parametrize("activations", ["int4", "int8", "none"])
@pytest.mark.parametrize("unsigned", [(), ((64, 130),)])
def test_convolution_is_a_linear_per_pixel(unsigned, activations):
    spec = LayerSpec(rank=16, unsigned=unsigned)
    tensors = reference64.random_tensors(spec, 130, 48, True, torch.float32)
    conv = make_layer(nn.Conv2d(130, 48, 1, device="meta"), tensors)
    linear = make_layer(nn.Linear(130, 48, device="meta"), tensors)
    conv.activations = linear.activations = activations
    pixels = reference64.random_inputs(spec, 2 * 3 * 5, 130, torch.float32).reshape(2, 3, 5, 130)
    x = pixels.movedim(-1, 1).contiguous()
    y = conv(x)
    assert y.shape == (2, 48, 3, 5)
    assert torch.equal(y, linear(pixels).movedim(-1, 1))
    assert torch.equal(conv(x.to(memory_format=torch.channels_last)), y)
    weight, bias = reference64.layer(tensors).dense()
    expected = F.conv2d(x.double(), torch.from_numpy(weight)[:, :, None, None], torch.from_numpy(bias))
    limit = {"none": 1e-5, "int8": 0.02, "int4": 0.25}[activations]
    assert reference64.relative(y, expected) < limit
    dense = conv.dequantize()
    assert type(dense) is nn.Conv2d and reference64.relative(dense(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(8, 8, 1), True),
        (nn.Conv2d(8, 8, 3, padding=1), False),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(8, 8, 1, groups=8), False),
        (nn.Conv2d(8, 8, 1, padding=1), False),
        (nn.Linear(8, 8), False),
    ],
)
def test_is_pointwise_conv(conv, expected):
    assert is_pointwise_conv(conv) is expected


def toy():
    return nn.ModuleDict(
        {
            "a": nn.ModuleList([make(LayerSpec(rank=4)), make(LayerSpec(rank=4))]),
            "b": make(SPECS["w4a16"]),
            "c": nn.Linear(4, 4),
        }
    )


def dial(model):
    return {name: layer.activations for name, layer in quantized_layers(model).items()}


def test_set_activations_of_all_and_of_some():
    model = toy()
    assert dial(model) == {"a.0": "auto", "a.1": "auto", "b": "auto"}
    assert set_activations(model, "int8") is model
    assert dial(model) == {"a.0": "int8", "a.1": "int8", "b": "int8"}
    set_activations(model, {"a.*": "int4", "a.1": "none"})
    assert dial(model) == {"a.0": "int4", "a.1": "none", "b": "int8"}
    set_activations(model, {"a": "fp8"})
    assert dial(model) == {"a.0": "fp8", "a.1": "fp8", "b": "int8"}


def test_set_activations_of_a_pipeline():
    class Pipeline:
        def __init__(self, **components):
            self.components = components

    pipe = Pipeline(transformer=nn.Sequential(make(LayerSpec(rank=4))), scheduler=object(), vae=nn.Linear(2, 2))
    assert set_activations(pipe, "none") is pipe
    assert dial(pipe.components["transformer"]) == {"0": "none"}


def test_set_activations_reaches_every_component_of_a_pipeline():
    class Pipeline:
        pass

    pipe = Pipeline()
    pipe.components = {name: nn.Sequential(make(LayerSpec(rank=4))) for name in ("transformer", "text_encoder")}
    set_activations(pipe, "none")
    assert [dial(model) for model in pipe.components.values()] == [{"0": "none"}, {"0": "none"}]


def test_set_activations_errors():
    with pytest.raises(SVDQuantError, match="Sequential has no quantized layers"):
        set_activations(nn.Sequential(nn.Linear(2, 2)), "int8")
    with pytest.raises(SVDQuantError, match="activations='int2' is not one of"):
        set_activations(toy(), "int2")
    with pytest.raises(SVDQuantError, match=r"pattern 'nothing\.\*' matches no quantized layer"):
        set_activations(toy(), {"nothing.*": "int8"})


def test_deepcopy_shares_nothing(spec):
    layer = make(spec)
    layer.activations = "int8"
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer) and twin.spec == layer.spec and twin.activations == "int8"
    for name, p in layer.named_parameters():
        other = getattr(twin, name)
        assert equal(other, p) and other.data_ptr() != p.data_ptr()
    x = reference64.random_inputs(spec, 3, 130, torch.bfloat16)
    assert torch.equal(twin(x), layer(x))


def test_state_dict_round_trip(spec):
    layer = make(spec)
    state = layer.state_dict()
    assert set(state) == set(layer.tensors().named())
    other = empty_layer(nn.Linear(130, 48, bias=layer.bias is not None), spec, torch.bfloat16)
    assert other.load_state_dict(state, strict=True)
    for name, value in state.items():
        assert equal(getattr(other, name).data, value), name
    x = reference64.random_inputs(spec, 3, 130, torch.bfloat16)
    assert torch.equal(other(x), layer(x))


def test_the_record_shares_the_parameters_storage(spec):
    layer = make(spec)
    for name, value in layer.tensors().named().items():
        assert value.data_ptr() == getattr(layer, name).data_ptr()


def test_nothing_trains(spec):
    assert not any(p.requires_grad for p in make(spec).parameters())


def test_constructor_makes_storage():
    layer = SVDQuantLinear(130, 48, bias=False, spec=LayerSpec(rank=8), dtype=torch.float16)
    assert layer.bias is None and layer.proj_down.shape == (8, 130) and layer.compute_dtype == torch.float16
    assert SVDQuantLinear(64, 64).spec == LayerSpec()


def test_replace_module():
    model = nn.Sequential(nn.ModuleDict({"inner": nn.Linear(130, 48)}), nn.Linear(130, 48))
    model.eval()
    replace_module(model, "0.inner", make(LayerSpec()))
    replace_module(model, "1", make(LayerSpec()))
    assert list(quantized_layers(model)) == ["0.inner", "1"]
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["0", "1.inner"])
def test_replace_module_keeps_the_training_flag(name):
    model = nn.Sequential(nn.Linear(130, 48), nn.ModuleDict({"inner": nn.Linear(130, 48)})).train()
    replace_module(model, name, make(LayerSpec()))
    assert model.get_submodule(name).training


def test_repr_says_how():
    text = repr(make(SPECS["int4 rotated"]))
    assert "int4 g64" in text and "rank=16" in text and "rotate" in text
    assert "int8 per row" in repr(make(SPECS["int8"]))
