"""What is quantized, how, and what belongs together: from one traced forward, or from names alone."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from torch import nn

from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.config import LayerSpec
from svdquant.ptq import make_plan
from svdquant.ptq.example import trace_model

CONFIG = SVDQuantConfig(rank=16)
MODULATION = LayerSpec("w4a16", "int4", 64, 0, "none", (), False, False)


def linear(k=128, n=128, bias=True):
    return nn.Linear(k, n, bias)


class Attention(nn.Module):
    def __init__(self, width=128, text=None):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            linear(width, width),
            linear(text or width, width),
            linear(text or width, width),
        )
        self.to_out = linear(width, width)

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.to_out(
            torch.nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        )


class Block(nn.Module):
    """Self-attention, cross-attention, an MLP with GELU, and modulation by a 2-D embedding."""

    def __init__(self):
        super().__init__()
        self.emb = linear(128, 256)
        self.attn1, self.attn2 = Attention(), Attention(text=64)
        self.up, self.act, self.down = linear(128, 512), nn.GELU("tanh"), linear(512, 128, bias=False)

    def forward(self, x, text, temb):
        shift, scale = self.emb(temb).chunk(2, -1)
        h = x * (1 + scale[:, None]) + shift[:, None]
        x = x + self.attn1(h)
        x = x + self.attn2(x, text)
        return x + self.down(self.act(self.up(x)))


class Toy(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.embed = linear(64, 128)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = linear(128, 64)

    def forward(self, x, text, temb):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, text, temb)
        return self.head(x)


def run(model):
    device = next(model.parameters()).device
    return model(
        torch.zeros(2, 8, 64, device=device), torch.zeros(2, 5, 64, device=device), torch.zeros(2, 128, device=device)
    )


def members(plan):
    return [tuple(m.name for m in group.members) for group in plan.groups]


@pytest.fixture(scope="module")
def flux():
    with torch.device("meta"):
        model = FluxTransformer2DModel()
    return make_plan(model.bfloat16(), SVDQuantConfig())


def test_flux_groups(flux):
    assert (flux.model_class, flux.family, flux.traced) == ("FluxTransformer2DModel", "flux", True)
    groups = flux.groups
    # Two modulation linears and eight groups per double block, one and two per single block.
    assert len(groups) == 19 * (2 + 8) + 38 * (1 + 2) == 304
    assert sum(g.spec.kind == "w4a16" for g in groups) == 19 * 2 + 38
    double, single = "transformer_blocks.3.", "single_transformer_blocks.5."
    found = members(flux)
    for expected in (
        [double + "attn." + n for n in ("to_q", "to_k", "to_v")],
        [double + "attn." + n for n in ("add_q_proj", "add_k_proj", "add_v_proj")],
        [double + "attn.to_out.0"],
        [double + "attn.to_add_out"],
        [double + "ff.net.0.proj"],
        [double + "ff_context.net.2"],
    ):
        assert tuple(expected) in found
    four = next(g for g in found if single + "proj_mlp" in g)
    assert set(four) == {single + n for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def test_flux_after_gelu(flux):
    for layer in flux.layers.values():
        if layer.name.endswith(("ff.net.2", "ff_context.net.2")):
            assert layer.spec.unsigned == ((0, 12288),) and not layer.spec.rotate
        elif layer.name.endswith("proj_out") and layer.block:
            assert layer.segments == ((0, 3072), (3072, 15360))
            assert layer.spec.unsigned == ((3072, 15360),) and not layer.spec.rotate
        elif layer.kind == "svdquant":
            assert layer.spec.unsigned == () and layer.spec.rotate
            assert layer.segments == ((0, layer.in_features),)


def test_flux_modulation_and_kept_layers(flux):
    modulation = {n for n, layer in flux.layers.items() if layer.kind == "w4a16"}
    assert modulation == {
        *(f"transformer_blocks.{i}.{n}.linear" for i in range(19) for n in ("norm1", "norm1_context")),
        *(f"single_transformer_blocks.{i}.norm.linear" for i in range(38)),
    }
    assert all(flux.layers[n].spec == MODULATION for n in modulation)
    kept = {n for n, layer in flux.layers.items() if layer.kind == "keep"}
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= kept
    assert all(not flux.layers[n].block and flux.layers[n].spec is None for n in kept)
    assert set(flux.specs) == set(flux.layers) - kept


def test_flux_bytes(flux):
    assert flux.bytes_before == pytest.approx(23.78e9, rel=0.01)
    assert flux.bytes_after / flux.bytes_before == pytest.approx(0.28, abs=0.02)


def sana():
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=64,
        sample_size=8,
        patch_size=1,
        mlp_ratio=2.5,
    )


def test_sana_plans_its_pointwise_convolutions():
    with torch.device("meta"):
        model = sana()
    plan = make_plan(model, CONFIG)
    assert plan.family == "sana" and plan.traced
    for i in range(2):
        for leaf, k, n in (("conv_inverted", 128, 640), ("conv_point", 320, 128)):
            layer = plan.layers[f"transformer_blocks.{i}.ff.{leaf}"]
            assert (layer.kind, layer.conv, layer.in_features, layer.out_features) == ("svdquant", True, k, n)
            # Channels, not pixels.
            assert layer.segments == ((0, k),)
        assert f"transformer_blocks.{i}.ff.conv_depth" not in plan.layers
        assert plan.layers[f"transformer_blocks.{i}.attn2.to_k"].reason == "reads the text of a cross-attention"
        assert plan.layers[f"transformer_blocks.{i}.attn2.to_q"].kind == "svdquant"


@pytest.mark.parametrize("width", [4, 64, 640])
def test_a_convolution_after_gelu_is_unsigned_in_its_channels(width):
    model = nn.Sequential(nn.Conv2d(64, 192, 1), nn.GELU(), nn.Conv2d(192, 64, 1)).to("meta")
    plan = make_plan(model, CONFIG, lambda m: m(torch.zeros(1, 64, 2, width, device="meta")))
    assert plan.layers["0"].spec.unsigned == ()
    assert plan.layers["2"].spec.unsigned == ((0, 192),) and plan.layers["2"].segments == ((0, 192),)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_traced_toy(device):
    with torch.device(device):
        model = Toy()
    plan = make_plan(model, CONFIG, run)
    assert plan.family == "generic" and plan.traced
    for i in range(2):
        b = f"blocks.{i}."
        assert plan.layers[b + "emb"].spec == MODULATION
        assert plan.layers[b + "attn2.to_k"].kind == plan.layers[b + "attn2.to_v"].kind == "keep"
        assert plan.layers[b + "down"].spec.unsigned == ((0, 512),)
        assert plan.layers[b + "up"].spec.unsigned == ()
    assert plan.layers["embed"].kind == plan.layers["head"].kind == "keep"
    expected = []
    for i in range(2):
        names = (
            ("emb",),
            ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            ("attn1.to_out",),
            ("attn2.to_q",),
            ("attn2.to_out",),
        )
        expected += [tuple(f"blocks.{i}.{n}" for n in group) for group in (*names, ("up",), ("down",))]
    assert members(plan) == expected
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_names_alone():
    with torch.device("meta"):
        model = Toy()
    plan = make_plan(model, CONFIG)
    assert not plan.traced
    assert ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v") in members(plan)
    assert plan.layers["blocks.0.attn2.to_k"].kind == "keep"
    # Nothing tells that a GELU comes before.
    assert plan.layers["blocks.0.down"].spec.unsigned == () and plan.layers["blocks.0.down"].spec.rotate


@pytest.mark.parametrize(
    ("name", "modulation"),
    [
        ("norm1", True), ("adaln_single", True), ("img_mod", True), ("modulation", True), ("adaLN_modulation", True),
        ("model", False), ("to_q", False), ("modern", False), ("normal", False),
    ],
)  # fmt: skip
def test_modulation_by_name(name, modulation):
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({name: nn.ModuleDict({"linear": linear()}), "x": linear()})])}
    )
    layer = make_plan(model, CONFIG).layers[f"blocks.0.{name}.linear"]
    assert (layer.kind == "w4a16") is modulation


def test_modulation_may_be_kept():
    model = Toy()
    plan = make_plan(model, SVDQuantConfig(rank=16, modulation="none"), run)
    assert plan.layers["blocks.0.emb"].kind == "keep"


@pytest.mark.parametrize("traced", [False, True])
def test_plain_mlp(traced):
    model = nn.Sequential(linear(128, 256), nn.GELU(), linear(256, 128))
    plan = make_plan(model, CONFIG, (lambda m: m(torch.zeros(3, 128))) if traced else None)
    assert members(plan) == [("0",), ("2",)]
    assert plan.layers["2"].spec.unsigned == (((0, 256),) if traced else ())
    assert plan.layers["0"].spec == LayerSpec(rank=16, rotate=True)


class Concatenated(nn.Module):
    def __init__(self, left=64, right=192):
        super().__init__()
        self.a, self.b, self.c = linear(128, left), linear(128, right), linear(left + right, 128)

    def forward(self, x, dim=-1):
        return self.c(torch.cat([self.a(x), torch.nn.functional.gelu(self.b(x))], dim))


@pytest.mark.parametrize("dim", [-1, 2])
def test_concatenated_inputs(dim):
    plan = make_plan(Concatenated(), CONFIG, lambda m: m(torch.zeros(1, 4, 128), dim))
    assert plan.layers["c"].segments == ((0, 64), (64, 256))
    assert plan.layers["c"].spec.unsigned == ((64, 256),)
    assert members(plan) == [("a", "b"), ("c",)]


def test_ranges_off_the_groups_are_one_signed_range():
    plan = make_plan(Concatenated(72, 184), CONFIG, lambda m: m(torch.zeros(1, 4, 128)))
    assert plan.layers["c"].segments == ((0, 256),)
    assert plan.layers["c"].spec.unsigned == ()


def test_a_group_never_mixes_signed_and_unsigned_columns():
    """With groups of 128 a range that starts at 64 would clip the signed half of its first group."""
    plan = make_plan(Concatenated(), SVDQuantConfig(rank=16, group_size=128), lambda m: m(torch.zeros(1, 4, 128)))
    assert plan.layers["c"].spec.unsigned == ()
    whole = make_plan(
        Concatenated(128, 128), SVDQuantConfig(rank=16, group_size=128), lambda m: m(torch.zeros(1, 4, 128))
    )
    assert whole.layers["c"].spec.unsigned == ((128, 256),)


def test_nvfp4_and_int8_have_no_unsigned_codes():
    for weights in ("nvfp4", "int8"):
        plan = make_plan(Concatenated(), SVDQuantConfig(rank=16, weights=weights), lambda m: m(torch.zeros(1, 4, 128)))
        assert plan.layers["c"].spec.unsigned == () and not plan.layers["c"].spec.rotate


def test_a_gelu_whose_output_is_gated_is_signed():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = linear(), linear(), linear()

        def forward(self, x):
            return self.c(torch.nn.functional.gelu(self.a(x)) * self.b(x))

    assert make_plan(Gated(), CONFIG, lambda m: m(torch.zeros(2, 128))).layers["c"].spec.unsigned == ()


def test_skip_and_overrides():
    config = SVDQuantConfig(
        rank=16, skip=["attn1"], overrides={"*.up": {"rank": 4}, "*.down": None, "*.to_q": {"weights": "int8"}}
    )
    plan = make_plan(Toy(), config, run)
    assert (
        plan.layers["blocks.0.attn1.to_q"].reason
        == plan.layers["blocks.1.down"].reason
        == "skipped by the configuration"
    )
    assert plan.layers["blocks.1.up"].spec.rank == 4
    spec = plan.layers["blocks.0.attn2.to_q"].spec
    assert (spec.weights, spec.group_size) == ("int8", 0)


def test_members_that_are_stored_differently_form_no_group():
    plan = make_plan(Toy(1), SVDQuantConfig(rank=16, overrides={"*.attn1.to_v": {"rank": 8}}), run)
    assert ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k") in members(plan)
    assert ("blocks.0.attn1.to_v",) in members(plan)


def test_small_layers_stay():
    model = nn.Sequential(linear(64, 63), linear(63, 128), linear(64, 64))
    plan = make_plan(model, CONFIG)
    assert [layer.reason for layer in plan.layers.values()] == ["too small", "", ""]


@pytest.mark.parametrize("field", ["skip", "overrides"])
def test_a_pattern_that_matches_nothing(field):
    value = ["blocks.*.nothing"] if field == "skip" else {"blocks.*.nothing": {"rank": 1}}
    with pytest.raises(SVDQuantError, match=r"pattern 'blocks\.\*\.nothing' matches no linear"):
        make_plan(Toy(1), SVDQuantConfig(rank=16, **{field: value}))


def test_rank_too_large():
    with pytest.raises(SVDQuantError, match="rank 100 exceeds 0, which is 96×128; use --rank 96 or less"):
        make_plan(nn.Sequential(linear(128, 96)), SVDQuantConfig(rank=100))


def test_layers_narrower_than_the_rank_stay():
    model = nn.Sequential(linear(256, 20), linear(20, 256), linear(256, 256))
    plan = make_plan(model, SVDQuantConfig(rank=32))
    assert [layer.reason for layer in plan.layers.values()] == ["narrower than the rank"] * 2 + [""]
    assert make_plan(model, SVDQuantConfig(rank=20)).layers["1"].kind == "svdquant"


def test_every_layer_narrower_than_the_rank():
    """The widest decides what the rank may be; modulation, which has no branch, does not count."""
    block = nn.ModuleDict({"mod": linear(), "a": linear(128, 96), "b": linear(96, 64)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    with pytest.raises(SVDQuantError, match=r"rank 100 exceeds blocks.0.a, which is 96×128; use --rank 96 or less"):
        make_plan(model, SVDQuantConfig(rank=100))


@pytest.mark.parametrize(("stored", "group_size"), [("int8", 0), ("int4", 64)])
def test_text_keys_and_values(stored, group_size):
    plan = make_plan(Toy(), SVDQuantConfig(rank=16, text_kv=stored, overrides={"blocks.1.*": {"text_kv": "none"}}), run)
    for leaf in ("to_k", "to_v"):
        layer = plan.layers[f"blocks.0.attn2.{leaf}"]
        assert layer.spec == LayerSpec("w4a16", stored, group_size, 0, "none", (), False, False)
        assert (layer.kind, layer.reason) == ("w4a16", "text keys and values: weights only")
        assert plan.layers[f"blocks.1.attn2.{leaf}"].reason == "reads the text of a cross-attention"
    assert plan.layers["blocks.0.attn2.to_q"].kind == "svdquant"


def test_one_block_is_enough_to_know_the_text():
    """No second block reads it, but the queries of the same attention read something else."""
    assert make_plan(Toy(1), CONFIG, run).layers["blocks.0.attn2.to_k"].reason == "reads the text of a cross-attention"


def named(**names):
    """Three linears in a block, under these names; no forward can be run."""
    block = nn.ModuleDict({name: nn.ModuleDict({leaf: linear() for leaf in leaves}) for name, leaves in names.items()})
    return make_plan(nn.ModuleDict({"blocks": nn.ModuleList([block])}), CONFIG)


QKV = ("to_q", "to_k", "to_v")


@pytest.mark.parametrize(
    ("attention", "beside", "kept"),
    [("attn2", "attn1", True), ("audio_attn2", "audio_attn1", True), ("attn2", "attn", False),
     ("cross_attn", "attn", True), ("cross_attention", "self_attention", True), ("va_cross_attention", "attn", False)],
)  # fmt: skip
def test_text_by_names(attention, beside, kept):
    plan = named(**{beside: QKV, attention: QKV})
    kinds = [plan.layers[f"blocks.0.{attention}.{leaf}"].kind for leaf in QKV]
    assert kinds == ["svdquant"] + ["keep" if kept else "svdquant"] * 2
    assert tuple(f"blocks.0.{beside}.{leaf}" for leaf in QKV) in members(plan)


@pytest.mark.parametrize(("query", "both"), [("q_linear", "kv_linear"), ("to_q", "to_kv")])
def test_keys_and_values_of_the_text_in_one_linear(query, both):
    plan = named(attn=("qkv",), cross_attn=(query, both))
    assert plan.layers[f"blocks.0.cross_attn.{both}"].reason == "reads the text of a cross-attention"
    assert members(plan) == [("blocks.0.attn.qkv",), (f"blocks.0.cross_attn.{query}",)]


def test_by_names_only_inputs_of_one_width_are_shared():
    block = nn.ModuleDict({"joint": nn.ModuleDict({"to_q": linear(128), "to_k": linear(64), "to_v": linear(64)})})
    plan = make_plan(nn.ModuleDict({"blocks": nn.ModuleList([block])}), CONFIG)
    assert members(plan) == [("blocks.0.joint.to_q",), ("blocks.0.joint.to_k", "blocks.0.joint.to_v")]


@pytest.mark.parametrize(
    ("name", "shared"),
    [("time_proj", True), ("adaln_single.linear", True), ("stream_modulation.linear", True),
     ("time_embed.linear", True),
     ("time_embed.emb.linear", False), ("final_layer.modulation.1", False), ("norm_out.linear", False)],
)  # fmt: skip
def test_modulation_of_all_blocks_stays(name, shared):
    inner: nn.Module = linear(128, 768)
    for part in reversed(name.split(".")):
        inner = nn.ModuleDict({part: inner})
    inner["blocks"] = nn.ModuleList([nn.ModuleDict({"x": linear()})])
    reason = make_plan(inner, CONFIG).layers[name].reason
    assert reason == ("modulation shared by all blocks" if shared else "embedding, final norm or projection")


def test_shortcuts_around_convolutions_stay():
    block = nn.ModuleDict({"conv_shortcut": nn.Conv2d(128, 128, 1), "conv_inverted": nn.Conv2d(128, 256, 1)})
    plan = make_plan(nn.ModuleDict({"blocks": nn.ModuleList([block])}), CONFIG)
    assert plan.layers["blocks.0.conv_shortcut"].reason == "shortcut around convolutions"
    assert plan.layers["blocks.0.conv_inverted"].kind == "svdquant"


def test_nothing_left():
    for model, config in ((nn.Sequential(nn.ReLU()), CONFIG), (Toy(1), SVDQuantConfig(skip=["*"]))):
        with pytest.raises(SVDQuantError, match="has no linear left to quantize"):
            make_plan(model, config)


def test_calibrate_that_never_calls_the_model():
    model = Toy(1)
    with pytest.raises(SVDQuantError, match="calibrate returned without calling Toy"):
        make_plan(model, CONFIG, lambda m: None)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_error_of_calibrate_passes_and_leaves_no_hooks():
    model = Toy(1)

    def fail(m):
        raise OSError("no such prompts")

    with pytest.raises(OSError, match="no such prompts"):
        make_plan(model, CONFIG, fail)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_only_the_first_forward_is_traced():
    calls = []

    def calibrate(m):
        for _ in range(3):
            calls.append(1)
            run(m)

    make_plan(Toy(1), CONFIG, calibrate)
    assert len(calls) == 1


def test_what_chooses_among_experts_stays():
    """By what stands beside it: a gate of a feed-forward network is a linear like others."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared = linear(128, 128), linear()
            self.experts = nn.ModuleList(linear() for _ in range(2))

        def forward(self, x):
            return self.shared(x) + sum(
                w[..., None] * e(x) for w, e in zip(self.gate(x).unbind(-1), self.experts, strict=False)
            )

    class Glu(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = linear(), linear()

        def forward(self, x):
            return self.gate(x).sigmoid() * self.up(x)

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(Experts(), Glu())])
    plan = make_plan(model, CONFIG, lambda m: None, traces={})
    assert plan.layers["blocks.0.0.gate"].reason == "chooses among experts"
    assert {n for n, layer in plan.layers.items() if layer.kind == "keep"} == {"blocks.0.0.gate"}


@pytest.mark.parametrize("leaves", [QKV, ("to_query", "to_key", "to_value")])
def test_no_cross_attention_shares_its_inputs(leaves):
    """Neither of text nor of picture and sound: what names alone do not tell is not shared."""
    plan = named(va_cross_attention=leaves, attn=leaves)
    assert [len(group) for group in members(plan)] == [1, 1, 1, 3]


def test_experts_are_no_modulation():
    """They read tokens in one list, that is, in two dimensions."""

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mod = linear(), linear()
            self.experts = nn.ModuleList(linear() for _ in range(2))

        def forward(self, x, temb):
            tokens = (self.embed(x) + self.mod(temb)[:, None]).flatten(0, 1)
            return sum(expert(tokens[i::2]) for i, expert in enumerate(self.experts))

    model = nn.ModuleDict({"blocks": nn.ModuleList([Chosen()])})
    model.forward = lambda x, temb: model["blocks"][0](x, temb)
    plan = make_plan(model, CONFIG, lambda m: m(torch.zeros(1, 8, 128), torch.zeros(1, 128)))
    kinds = {name.partition("0.")[2]: layer.kind for name, layer in plan.layers.items()}
    assert kinds == {"embed": "svdquant", "mod": "w4a16", "experts.0": "svdquant", "experts.1": "svdquant"}


def test_layers_that_no_forward_reached_are_told():
    plan = make_plan(Toy(), CONFIG, run)
    assert plan.unreached == []
    traces = trace_model(Toy(), run)
    known = {name: trace for name, trace in traces.items() if not name.startswith("blocks.1.attn1")}
    plan = make_plan(Toy(), CONFIG, traces=known)
    assert plan.unreached == [f"blocks.1.attn1.{leaf}" for leaf in (*QKV, "to_out")]
