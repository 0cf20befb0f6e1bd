"""`--recipe`: TOML in place of flags; flags win, mistakes are one sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import standins

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.recipe import merged

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def planned(command: Callable, *arguments: object) -> dict[str, dict]:
    result = command("plan", *arguments, "--json")
    assert result.code == 0, result.err
    return {layer["name"]: layer for layer in json.loads(result.out)["layers"]}


def stored(folder: Path, part: str = "transformer") -> dict:
    return json.loads((folder / part / "config.json").read_text())["quantization_config"]


TEXT = """
rank = 16
modulation = "none"
skip = ["*.to_add_out"]

[overrides."*.ff.net.2"]
weights = "int8"
rank = 8
"""


def test_every_field_reaches_the_plan(command: Callable, source: Path, recipe: Callable) -> None:
    layers = planned(command, source, "--recipe", recipe(TEXT))
    block = "transformer_blocks.0."
    assert layers[block + "attn.to_q"]["rank"] == 16 and layers[block + "attn.to_q"]["weights"] == "int4"
    assert layers[block + "ff.net.2"]["rank"] == 8 and layers[block + "ff.net.2"]["weights"] == "int8"
    assert layers[block + "attn.to_add_out"]["kind"] == "keep"
    assert layers[block + "norm1.linear"]["kind"] == "keep"


def test_options_of_the_denoiser_alone(command: Callable, source: Path, recipe: Callable, tmp_path: Path) -> None:
    file = recipe("rank = 16\n[components.transformer]\nrank = 8\n")
    assert planned(command, source, "--recipe", file)["transformer_blocks.0.attn.to_q"]["rank"] == 8
    assert command("quantize", source, "-o", tmp_path / "out", "--recipe", file, "--data-free").code == 0
    assert stored(tmp_path / "out")["rank"] == 8


def test_flags_win_and_lists_are_joined(command: Callable, source: Path, recipe: Callable) -> None:
    file, block = recipe(TEXT), "transformer_blocks.0."
    # A flag counts as given even if its value is the default.
    more = ["--rank", "32", "--modulation", "int4", "--skip", "*.to_out.0", "--override", '*.ff.net.2={"rank": 4}']
    layers = planned(command, source, "--recipe", file, *more)
    assert layers[block + "attn.to_q"]["rank"] == 32
    assert layers[block + "norm1.linear"]["kind"] == "w4a16"
    assert layers[block + "attn.to_add_out"]["kind"] == layers[block + "attn.to_out.0"]["kind"] == "keep"
    # The flag replaces the recipe's table of that pattern as a whole.
    assert layers[block + "ff.net.2"]["rank"] == 4 and layers[block + "ff.net.2"]["weights"] == "int4"


def test_help_shows_the_defaults(command: Callable) -> None:
    text = " ".join(command("quantize", "--help").out.replace("│", " ").split())
    for flag in ("--recipe", "[default: int4]", "[default: 32]", "[default: 4096]"):
        assert flag in text


def test_run_stores_and_resumes_what_the_recipe_says(
    command: Callable, source: Path, recipe: Callable, tmp_path: Path
) -> None:
    out, flags = tmp_path / "out", ["--data-free", "--seed", "3"]
    file = recipe(TEXT)
    # Stopped after solving, by a limit that may change without solving again.
    assert "exceed" in command("quantize", source, "-o", out, "--recipe", file, *flags, "--max-error", "1e-9").err
    changed = recipe(TEXT.replace("rank = 16", "rank = 12"))
    refusal = command("quantize", source, "-o", out, "--recipe", changed, *flags).refusal()
    assert "begun with other rank" in refusal
    file = recipe(TEXT)
    assert command("quantize", source, "-o", out, "--recipe", file, *flags).code == 0
    config = stored(out)
    assert (config["rank"], config["modulation"], config["seed"]) == (16, "none", 3)
    assert config["overrides"] == {"*.ff.net.2": {"weights": "int8", "rank": 8}}
    same = svdquant.read_recipe(file)
    assert all(config[name] == getattr(same, name) for name in ("rank", "skip", "overrides", "modulation"))


def test_seed_of_a_recipe(command: Callable, source: Path, recipe: Callable, tmp_path: Path) -> None:
    file = recipe("rank = 8\nseed = 5")
    for name, more, seed in (("own", [], 5), ("given", ["--seed", "0"], 0)):
        out = tmp_path / name
        assert command("quantize", source, "-o", out, "--data-free", "--recipe", file, *more).code == 0
        assert stored(out)["seed"] == seed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rnak = 32", "rnak is no field of a recipe; did you mean rank?"),
        ("[overrides.'*.ff.*']\nranks = 3", "ranks in [overrides.\"*.ff.*\"] is no field of a recipe; did you"),
        ("layers = {}", "layers is no field of a recipe"),
        ("quite_other = 1", "quite_other is no field of a recipe; there are weights, "),
        ("rank = '32'", "rank is '32'; it has to be a whole number"),
        ("rank = true", "rank is True; it has to be a whole number"),
        ("rank = 3.5", "rank is 3.5; it has to be a whole number"),
        ("gptq = 1", "gptq is 1; it has to be true or false"),
        ("skip = '*.x'", "skip is '*.x'; it has to be a list of patterns"),
        ("skip = [1]", "skip is [1]; it has to be a list of patterns"),
        ("[overrides]\n'*.ff.*' = false", "overrides.\"*.ff.*\" is False; it has to be a table of fields"),
        ("[components.vae.components.x]", "components in [components.\"vae\"] is no field of a recipe"),
        ("[components.vae]", "[components.vae]: vae is an AutoencoderKL, made of convolutions"),
        ("[components.transformer_2]\nrank = 8", "the pipeline has no transformer_2; its components are"),
        ("seed = 10000000000000000000", "seed=10000000000000000000 does not fit 64 bits"),
        ("rank = " + "[" * 5000, "has values within values too deep to read"),
        ("weights = 'int3'", "weights='int3' is not one of int4, nvfp4, int8"),
        ("[overrides.'*.ff.*']\nseed = 3", "holds for the whole model only"),
        ("rank = 300", "rank=300 is outside 0-256"),
        ("rank = \n", "is not valid TOML (Invalid value (at line 1, column 8)); correct that line"),
        ("rank = 1\nrank = 2\n", "is not valid TOML (Cannot overwrite a value (at line 2,"),
        ("skip = ['*.to_qq']", "the pattern '*.to_qq' fits no layer of "),
        ("[overrides.'*.ffn.*']\nrank = 3", "the pattern '*.ffn.*' fits no layer of "),
        (
            "[components.text_encoder_2.overrides.'*.to_q']\nweights = 'int8'",
            "the pattern '*.to_q' fits no layer of the text_encoder_2 of ",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    command: Callable, source: Path, recipe: Callable, tmp_path: Path, text: str, sentence: str
) -> None:
    file, out = recipe(text), tmp_path / "out"
    for arguments in (["plan", source], ["quantize", source, "-o", out, "--data-free"]):
        refusal = command(*arguments, "--recipe", file).refusal()
        assert refusal.startswith(f"svdquant: {file}: ") and sentence in refusal, refusal
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_missing_and_binary_files(command: Callable, source: Path, tmp_path: Path) -> None:
    refusal = command("plan", source, "--recipe", tmp_path / "none.toml").refusal()
    assert f"{tmp_path / 'none.toml'}: cannot be read (No such file or directory)" in refusal
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "is no UTF-8 text" in command("plan", source, "--recipe", tmp_path / "binary.toml").refusal()
    assert "cannot be read (Is a directory)" in command("plan", source, "--recipe", tmp_path).refusal()


def test_flags_that_do_not_go_with_it_name_the_recipe(command: Callable, source: Path, recipe: Callable) -> None:
    file = recipe("group_size = 64")
    refusal = command("plan", source, "--recipe", file, "--weights", "nvfp4").refusal()
    assert f"{file}, with the flags besides it: group_size=64 does not fit nvfp4 weights" in refusal


def test_read_recipe(recipe: Callable) -> None:
    assert svdquant.read_recipe(recipe("")) == SVDQuantConfig()
    # As Windows' editor saves it.
    assert svdquant.read_recipe(recipe("\ufeffrank = 16\r\n")) == SVDQuantConfig(rank=16)
    assert svdquant.read_recipe(recipe(TEXT)) == SVDQuantConfig(
        rank=16, modulation="none", skip=["*.to_add_out"], overrides={"*.ff.net.2": {"weights": "int8", "rank": 8}}
    )
    with pytest.raises(SVDQuantError, match=r"recipe\.toml: rnak is no field"):
        svdquant.read_recipe(recipe("rnak = 1"))


def test_later_patterns_win() -> None:
    both = merged({"overrides": {"a": {"rank": 1}, "*": {"rank": 2}}}, {"overrides": {"a": {"rank": 3}}})
    assert list(both["overrides"]) == ["*", "a"]
    assert SVDQuantConfig(**both).for_layer("a").rank == 3


def test_example_recipes(command: Callable, tmp_path: Path) -> None:
    source = standins.save("flux", tmp_path)
    files = sorted(EXAMPLES.glob("*.toml"))
    assert [file.stem for file in files] == ["flux_small_host", "quality", "smallest"]
    for file in files:
        default, layers = planned(command, source), planned(command, source, "--recipe", file)
        assert layers != default
    assert layers["transformer_blocks.0.attn.to_q"]["rank"] == 16
    layers = planned(command, source, "--recipe", EXAMPLES / "flux_small_host.toml")
    assert layers["transformer_blocks.0.attn.to_q"]["weights"] == "int8"
    assert layers["single_transformer_blocks.0.proj_mlp"]["weights"] == "int4"
    encoder = planned(command, source, "--recipe", EXAMPLES / "flux_small_host.toml", "--component", "text_encoder_2")
    weights = {name.rpartition(".")[2]: layer["weights"] for name, layer in encoder.items() if layer["kind"] != "keep"}
    assert weights["q"] == "int4" and weights["wo"] == "int8"
    # A class has no components, and is planned without them.
    assert planned(command, "FluxTransformer2DModel", "--recipe", EXAMPLES / "flux_small_host.toml")
    out = tmp_path / "out"
    few = ["--data-free", "--rank", "16", "--no-gptq"]
    assert command("quantize", source, "-o", out, "--recipe", EXAMPLES / "flux_small_host.toml", *few).code == 0
    assert stored(out)["rank"] == 16 and stored(out, "text_encoder_2")["weights"] == "int4"
