"""Any transformer or UNet of diffusers is planned, most of them from a forward with guessed inputs."""

import inspect
import logging
import re

import diffusers
import pytest
import torch
from torch import nn

from svdquant import SVDQuantConfig
from svdquant.families import guess
from svdquant.families.candidates import ABSENT, candidates
from svdquant.ptq.linears import find_linears
from svdquant.ptq.plan import make_plan

DEPTH = re.compile(r"(^|_)(layers|blocks)$|^layers_per_block$")
DENOISERS = [
    name
    for name in dir(diffusers)
    if (("Transformer" in name and "Model" in name) or "UNet" in name) and isinstance(getattr(diffusers, name), type)
]
# Planned by names, because their forward does not run without values, or not here: why.
UNTRACED = {
    "AnyFlowFARTransformer3DModel": "flex attention, which compiles itself",
    "CosmosTransformer3DModel": "needs torchvision, where that is not installed",
    "Kandinsky6SRTransformer3DModel": "flex attention, which compiles itself",
}


# Classes without defaults, or with such as fit no published model.
FIELDS = {
    "DreamLiteTransformer2DModel": {"in_channels": 64, "cross_attention_dim": 128},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "caption_channels": [4096, 2048], "llama_layers": [0, 1, 1, 1],
        "axes_dims_rope": (64, 32, 32),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True,
    },
    "Kandinsky3UNet": {"layers_per_block": 3},
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "caption_channels": 4096, "norm_type": "ada_norm_single",
        "cross_attention_dim": 1408, "norm_elementwise_affine": False,
    },
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    },
    "Transformer2DModel": {"in_channels": 64, "cross_attention_dim": 128},
    "TransformerTemporalModel": {"in_channels": 64, "cross_attention_dim": 128},
    "UNet1DModel": {"extra_in_channels": 64},
    "WanVACETransformer3DModel": {"vace_layers": [0]},
}  # fmt: skip


def built(name):
    """By default but shallow, on the meta device; None where the class has no usable defaults."""
    cls = getattr(diffusers, name)
    defaults = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items()}
    deep = {key: value for key, value in defaults.items() if DEPTH.search(key) and isinstance(value, int)}
    shallow = {key: 1 if key == "layers_per_block" else min(value, 2) for key, value in deep.items()}
    with torch.device("meta"):
        try:
            return cls(**shallow | FIELDS.get(name, {}))
        except (TypeError, ValueError):
            return None


def test_every_denoiser_of_diffusers_is_planned():
    logging.disable(logging.WARNING)
    traced, untraced, unbuilt = [], [], []
    try:
        for name in DENOISERS:
            model = built(name)
            if model is None:
                unbuilt.append(name)
                continue
            made = make_plan(model, SVDQuantConfig(rank=16))
            (traced if made.traced else untraced).append(name)
            assert set(made.layers) == set(find_linears(model))
            assert all(layer.reason for layer in made.layers.values() if layer.kind == "keep"), name
            quantized = sum(layer.bytes_before for layer in made.layers.values() if layer.kind != "keep")
            assert quantized > 0 and made.bytes_after < made.bytes_before, name
    finally:
        logging.disable(logging.NOTSET)
    assert set(untraced) <= UNTRACED.keys() and not unbuilt, (untraced, unbuilt)
    assert len(traced) >= 68


def test_the_weights_are_neither_read_nor_moved():
    """A model in memory is traced as its skeleton, so that planning takes no forward of the real one."""
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(16, 24, 24)
    )
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model itself was called"))
    generator = torch.get_rng_state()
    made = make_plan(model, SVDQuantConfig(rank=16))
    assert made.traced and made.layers["transformer_blocks.0.img_mlp.net.2"].spec.unsigned
    assert torch.equal(generator, torch.get_rng_state())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_plan_is_the_same_in_inference_mode():
    with torch.device("meta"):
        model = diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1)
    planned = make_plan(model, SVDQuantConfig())
    with torch.inference_mode():
        again = make_plan(model, SVDQuantConfig())
    assert planned.traced and again == planned


class Counted(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Reads a value, a mask and a list, none of which a tensor without values has; then one linear after a GELU."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, in_channels: int = 64, text_dim: int = 128, gelu: bool = True):
        super().__init__()
        self.inner, self.outer, self.text = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(text_dim, 128)

    def forward(self, hidden_states, encoder_hidden_states, timestep, img_ids, unknown=None):
        if timestep.item() < 0 or len(img_ids.tolist()) != hidden_states.shape[1]:
            raise ValueError("values that no caller would pass")
        hidden = torch.nn.functional.gelu(self.inner(hidden_states))
        with torch.autocast(hidden_states.device.type, enabled=False):
            text = self.text(encoder_hidden_states)[:, torch.arange(8, device=hidden.device) < 4]
        seen = hidden[hidden.abs().sum(-1) > 0]
        if seen.shape[-1] != 128 or text.shape[1] != 4:
            raise ValueError("a mask picked something else")
        return self.outer(hidden)


def test_a_forward_that_reads_values():
    with torch.device("meta"):
        model = Counted()
    made = make_plan(model, SVDQuantConfig(rank=16))
    assert made.traced and made.layers["outer"].spec.unsigned == ((0, 128),)


def test_candidates_come_from_the_configuration():
    with torch.device("meta"):
        model = Counted(in_channels=96, text_dim=192)
    found = candidates(model)
    assert "unknown" not in found
    assert found["hidden_states"][0].shape == (1, 16, 96) and found["hidden_states"][0].is_meta
    assert found["encoder_hidden_states"][0].shape == (1, 8, 192)
    assert not found["timestep"][0].is_meta and ABSENT not in found["timestep"]


def test_trials_end(monkeypatch):
    """A forward that no candidate suits is given up after so many trials, or so many calls of torch."""
    with torch.device("meta"):
        model = Counted()
    seen = []

    def refuse(inputs):
        seen.append(inputs)
        torch.zeros(len(seen))
        raise ValueError("not this either")

    with pytest.raises(ValueError, match="not this either"):
        guess.guess_inputs(model, refuse)
    assert len(seen) <= guess.MAX_TRIALS

    def endless(_inputs):
        while True:
            torch.zeros(1)

    monkeypatch.setattr(guess, "MAX_CALLS", 100)
    with pytest.raises(RuntimeError, match="no trials left"):
        guess.guess_inputs(model, endless)


def test_what_fails_is_planned_by_names():
    class Refusing(Counted):
        def forward(self, hidden_states):
            raise NotImplementedError

    with torch.device("meta"):
        model = Refusing()
    made = make_plan(model, SVDQuantConfig(rank=16))
    assert not made.traced and made.layers["outer"].kind == "svdquant"
