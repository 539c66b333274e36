"""LoRAs in single files: read as their libraries read them, compressed in the keys they came in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from lrlora import rank_report
from lrlora.adapters import factorize, read_updates, save_single_file
from lrlora.adapters.factorize import parameters_of_rank
from lrlora.cli import app
from lrlora.naming import layer_index, module_kind, module_type, place_in_layer, position_in_stack, stack_of

from .small_diffusion import outputs, pipeline, save_as_kohya, with_lora
from .test_peft_methods import METHODS, merged_differences, save_trained


def save(pipe: Any, path: Path, style: str) -> None:
    if style == "kohya":
        save_as_kohya(pipe, path, alpha=2.0)
    else:
        config = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
        state = {key: value.contiguous() for key, value in get_peft_model_state_dict(pipe.unet).items()}
        type(pipe).save_lora_weights(path.parent, state, weight_name=path.name, **config)


def effect_lost(file: Path, expected: torch.Tensor) -> float:
    """‖h − h′‖ / ‖h − h₀‖ of the file, loaded by diffusers."""
    pipe = pipeline()
    base = outputs(pipe)
    pipe.load_lora_weights(str(file))
    return ((outputs(pipe) - expected).norm() / (expected - base).norm()).item()


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_a_lora_of_diffusers(style: str, tmp_path: Path) -> None:
    pipe = with_lora()
    expected = outputs(pipe)
    save(pipe, tmp_path / "lora.safetensors", style)
    updates = read_updates(tmp_path / "lora.safetensors")
    layers = {name: layer for name, layer in pipe.unet.named_modules() if hasattr(layer, "get_delta_weight")}
    prefix = "lora_unet_" if style == "kohya" else "unet."
    named = {prefix + name.replace(".", "_" if style == "kohya" else "."): layer for name, layer in layers.items()}
    assert {update.module for update in updates} == set(named)
    for row in rank_report(updates).rows:
        energies = torch.linalg.svdvals(named[row.module].get_delta_weight("default").flatten(1).double()).square()
        assert row.stable_rank == pytest.approx((energies.sum() / energies[0]).item(), rel=1e-6)
    lost = []
    for energy in (0.5, 0.9, 1.0):
        file = tmp_path / f"{energy}.safetensors"
        save_single_file(factorize(updates, energy=energy), updates, file)
        lost.append(effect_lost(file, expected))
    assert lost[0] > lost[1] > 0.05
    assert lost[2] < 1e-5
    assert load_file(file).keys() == load_file(tmp_path / "lora.safetensors").keys()
    with pytest.raises(FileNotFoundError, match=r"\bno .*small\.safetensors "):
        save_single_file(factorize(updates, energy=0.5), updates, tmp_path / "no" / "small.safetensors")


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@pytest.mark.parametrize("pad", [False, True])
def test_diffusers_scales_modules_of_different_ranks_right(style: str, pad: bool, tmp_path: Path) -> None:
    save(with_lora(), tmp_path / "lora.safetensors", style)
    updates = read_updates(tmp_path / "lora.safetensors")
    factors = factorize(updates, energy=0.8)
    assert len({part.rank for part in factors}) > 1
    save_single_file(factors, updates, tmp_path / "small.safetensors", pad=pad)
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path / "small.safetensors"))
    layers = {name.replace(".", "_"): layer for name, layer in pipe.unet.named_modules() if hasattr(layer, "lora_A")}
    for part in factors:
        (layer,) = (layer for name, layer in layers.items() if part.module.replace(".", "_").endswith(name))
        (adapter,) = layer.lora_A
        torch.testing.assert_close(layer.get_delta_weight(adapter).flatten(1), part.B @ part.A, rtol=1e-4, atol=1e-6)


def test_what_kohya_notes_in_a_file_stays_true(tmp_path: Path) -> None:
    save_as_kohya(with_lora(), tmp_path / "lora.safetensors", alpha=2.0)
    updates = read_updates(tmp_path / "lora.safetensors")
    for pad, dim in ((False, "Dynamic"), (True, "3")):
        save_single_file(factorize(updates, energy=0.8, max_rank=3), updates, tmp_path / f"{pad}.safetensors", pad=pad)
        with safe_open(tmp_path / f"{pad}.safetensors", framework="pt") as file:
            assert file.metadata() == {"ss_network_dim": dim, "ss_network_alpha": "1.0"}
            assert {file.get_tensor(key).item() for key in list(file.keys()) if key.endswith(".alpha")} == {1.0}


def test_a_padded_file_has_all_modules(tmp_path: Path) -> None:
    save(with_lora(), tmp_path / "lora.safetensors", "kohya")
    updates = read_updates(tmp_path / "lora.safetensors")
    factors = factorize(updates, budget=parameters_of_rank(updates, 1) // 2)
    assert min(part.rank for part in factors) == 0
    save_single_file(factors, updates, tmp_path / "small.safetensors", pad=True)
    assert load_file(tmp_path / "small.safetensors").keys() == load_file(tmp_path / "lora.safetensors").keys()


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    pipe = with_lora(use_dora=True)
    expected = outputs(pipe)
    save(pipe, tmp_path / "lora.safetensors", "diffusers")
    updates = read_updates(tmp_path / "lora.safetensors")
    assert updates.method == "DoRA"
    assert re.search(r"DoRA: .*s·BA.*magnitude", updates.notes[0])
    save_single_file(factorize(updates, energy=1.0), updates, tmp_path / "small.safetensors")
    assert effect_lost(tmp_path / "small.safetensors", expected) < 1e-4


def test_a_budget_counts_the_rank_that_each_magnitude_needs(tmp_path: Path) -> None:
    generator, modules, tensors = torch.Generator().manual_seed(0), 12, dict[str, torch.Tensor]()
    for index in range(modules):
        name, size = f"lora_unet_down_blocks_{index}_attn1_to_q", (0.0, 1e-3, 1.0)[min(index, 2)]
        tensors[f"{name}.lora_down.weight"] = torch.randn(8, 40, generator=generator)
        tensors[f"{name}.lora_up.weight"] = size * torch.randn(48, 8, generator=generator)
        tensors |= {f"{name}.alpha": torch.tensor(8.0), f"{name}.dora_scale": torch.ones(48, 1)}
    save_file(tensors, tmp_path / "dora.safetensors")
    updates = read_updates(tmp_path / "dora.safetensors")
    budget = 20 * (40 + 48)
    factors = factorize(updates, budget=budget)
    save_single_file(factors, updates, tmp_path / "small.safetensors")
    written = load_file(tmp_path / "small.safetensors")
    stored = sum(tensor.numel() for key, tensor in written.items() if ".lora_" in key)
    assert min(pair.rank for pair in factors) == 1
    assert stored == sum(pair.parameters for pair in factors) == budget
    with pytest.raises(ValueError, match=f"minimum of {modules * (40 + 48):,}, one rank of each module"):
        factorize(updates, budget=1000)


@pytest.mark.parametrize("method", ["LoHa", "LoHa, wide", "LoKr", "LoKr, both sides"])
def test_loha_and_lokr_become_lora(method: str, tmp_path: Path) -> None:
    """The tensors that PEFT writes for them are LyCORIS's."""
    adapter = save_trained(tmp_path, METHODS[method])
    alpha, tensors = 8.0, {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix("base_model.model.").rpartition(".")
        tensors[f"lora_te_{module.replace('.', '_')}.{part}"] = tensor
        tensors[f"lora_te_{module.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "file.safetensors")
    updates = read_updates(tmp_path / "file.safetensors", base=tmp_path / "base")
    expected = merged_differences(tmp_path)
    assert updates.method == method.partition(",")[0]
    for update in updates:
        module = next(name for name in expected if name.replace(".", "_") == update.module.removeprefix("lora_te_"))
        torch.testing.assert_close(update.matrix().double(), expected[module], rtol=1e-4, atol=1e-7)
        assert update.weight_norm() is not None
    save_single_file(factorize(updates, energy=1.0), updates, tmp_path / "lora.safetensors")
    again = read_updates(tmp_path / "lora.safetensors")
    assert again.method == "LoRA"
    for update, first in zip(again, updates, strict=True):
        torch.testing.assert_close(update.matrix(), first.matrix().float(), rtol=1e-3, atol=1e-5)


def test_a_locon_with_a_core_and_a_difference_saved_whole(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 1, 1), (3, 3, 2, 2), (7, 3, 1, 1)))
    tensors = {
        "a.lora_down.weight": down,
        "a.lora_mid.weight": mid,
        "a.lora_up.weight": up,
        "a.alpha": torch.tensor(6.0),
    }
    tensors |= {
        "b.diff": torch.randn(4, 3, 3, 3, generator=generator),
        "b.diff_b": torch.ones(4),
        "c.diff": torch.ones(5),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    updates = read_updates(tmp_path / "file.safetensors")
    core, whole = updates
    x = torch.randn(1, 5, 4, 4, generator=generator)
    y = torch.nn.functional.conv2d(torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid), up) * 2
    torch.testing.assert_close(torch.nn.functional.conv2d(x, core.matrix().view(7, 5, 2, 2)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.matrix(), tensors["b.diff"].flatten(1))
    save_single_file(factorize(updates, energy=1.0), updates, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert out["a.lora_down.weight"].shape == (3, 5, 2, 2)
    assert out["b.lora_down.weight"].shape == (4, 3, 3, 3)
    assert torch.equal(out["b.diff_b"], torch.ones(4))
    assert torch.equal(out["c.diff"], torch.ones(5))
    up = out["b.lora_up.weight"] * out["b.alpha"] / 4
    merged = torch.einsum("mkab,knij->mnij", up, out["b.lora_down.weight"])
    torch.testing.assert_close(merged, tensors["b.diff"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "layer", "kind", "place"),
    [
        ("lora_te_layers_11_self_attn_q_proj", 11, "attention", "lora_te_layers.self_attn_q_proj"),
        ("lora_unet_double_blocks_3_img_mlp_0", 3, "mlp", "lora_unet_double_blocks.img_mlp"),
        ("unet.down_blocks.1.attentions.0.ff.net.0.proj", 1, "mlp", "unet.down_blocks.attentions.ff.net.proj"),
        ("lora_te2_text_projection", None, "other", "lora_te2_text_projection"),
    ],
)
def test_names_of_modules(module: str, layer: int | None, kind: str, place: str) -> None:
    assert (layer_index(module), module_kind(module), module_type(module)) == (layer, kind, place)


@pytest.mark.parametrize(
    ("module", "stack", "position", "place"),
    [
        ("lora_te1_text_model_encoder_layers_3_self_attn_q_proj", "te1", "3", "self_attn_q_proj"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj", "unet_input", "4.1.0", "ff_net.proj"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "unet.down", "1.0.0", "attn1.to_out"),
        ("text_encoder_2.text_model.encoder.layers.7.mlp.fc1", "text_encoder_2", "7", "mlp.fc1"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder", "0", "layer.DenseReluDense.wi"),
        ("model.layers.3.mlp.experts.7.up_proj", "model", "3", "mlp.experts.up_proj"),
        ("lora_te2_text_projection", None, None, "lora_te2_text_projection"),
    ],
)
def test_stack_position_and_place_of_a_module(module: str, stack: str | None, position: str | None, place: str) -> None:
    assert (stack_of(module), position_in_stack(module), place_in_layer(module)) == (stack, position, place)


def test_stacks_are_told_apart_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"lora_te{n}_text_model_encoder_layers_{i}_mlp_fc1" for n in (1, 2) for i in range(10)]
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 8) for name in names}
    save_file(tensors | {f"{name}.lora_up.weight": torch.randn(8, 2) for name in names}, "sdxl.safetensors")
    said = CliRunner().invoke(app, ["ranks", "sdxl.safetensors"], env={"COLUMNS": "60"}).output
    assert "te1 mlp_fc1 ×10 " in said
    assert "te2 mlp_fc1 ×10 " in said
    assert "text_model" not in said


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_as_kohya(with_lora(), Path("lora.safetensors"), alpha=2.0)

    def run(arguments: str) -> Any:
        return CliRunner().invoke(app, arguments.split(), env={"COLUMNS": "200"})

    result = run("ranks lora.safetensors")
    assert result.exit_code == 0, result.output
    assert re.search(r"Ranks .*\blora\.safetensors \(LoRA\)", result.output)
    result = run("export lora.safetensors --size 4MiB --output small.safetensors")
    assert result.exit_code == 0, result.output
    for budget, largest in (("4KiB", 4 * 1024), ("0.005MB", 5_000)):
        result = run(f"export lora.safetensors --size {budget} --dtype float16 --output {budget}.safetensors")
        assert result.exit_code == 0, result.output
        factors = [t for key, t in load_file(f"{budget}.safetensors").items() if not key.endswith(".alpha")]
        size = sum(tensor.numel() * tensor.itemsize for tensor in factors)
        assert 0.8 * largest < size <= largest


_LORA: dict[str, tuple[int, ...]] = {"a.lora_down.weight": (2, 8), "a.lora_up.weight": (4, 2)}


@pytest.mark.refused
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": (2, 2)}, r"no LoRA\..*: a\.weight"),
        (
            {"a.oft_blocks": (1, 2, 2), "a.alpha": ()},
            r"base weight.*\(a\.oft_blocks\)",
        ),
        ({"a.lora_up.weight": (2, 4)}, r"\ba lacks 'lora_A'\..*: lora_B"),
        ({"a.lora_down.weight": (0, 4), "a.lora_up.weight": (4, 0)}, r"factors of a .*no rows"),
        ({"base_model.model.a.lora_A.weight": (2, 4)}, r"file of a PEFT adapter\b"),
        ({"a.lora_down.weight": (2, 4)}, r"\ba lacks 'lora_B'\..*: lora_A"),
        ({"a.lora_down.weight": (2, 4), "a.lora_up.weight": (4, 3)}, r"lora_B has 3 .*lora_A has 2\b"),
        ({"a.hada_w1_a": (4, 2), "a.hada_w1_b": (2, 4)}, "a lacks 'hada_w2_a'"),
        (
            {"a.hada_w1_a": (4, 2), "a.hada_w1_b": (2, 4), "a.hada_w2_a": (3, 2), "a.hada_w2_b": (2, 4)},
            "a has incompatible tensors",
        ),
        ({"a.lokr_w1": (2, 2), "a.lokr_w2_a": (4, 2), "a.lokr_w2_b": (3, 4)}, "a has incompatible tensors"),
        ({"a.lokr_w1": (2, 2), "a.lokr_w2": (4,)}, "a has incompatible tensors: lokr_w2 has 1 dimensions"),
        (
            {"a.hada_w1_a": (4,), "a.hada_w1_b": (2, 4), "a.hada_w2_a": (4,), "a.hada_w2_b": (2, 4)},
            "a has incompatible tensors",
        ),
        # Parts of a module are never dropped.
        (_LORA | {"a.diff": (4, 8)}, "contains diff and lora tensors for a"),
        (_LORA | {"a.hada_w1_a": (4, 2)}, "contains hada and lora tensors for a"),
        (_LORA | {"a.lora_A.weight": (2, 8)}, r"two tensors .*\blora_A of a\b"),
        (_LORA | {"a.alpha": (2,)}, r"\ba\.alpha in .*number, .*shape \(2,\)"),
        (_LORA | {"b.lora_down.weight": ()}, r"\bb\.lora_down\.weight in .*matrix"),
    ],
)
def test_what_cannot_be_read(tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=message):
        read_updates(tmp_path / "file.safetensors")


def test_a_file_with_modules_called_like_embeddings_is_exported_unchecked(tmp_path: Path) -> None:
    tensors = {"context_embedder.alpha": torch.tensor(2.0)}
    for i in (1, 2):
        tensors |= {
            f"context_embedder.hada_w{i}_a": torch.randn(16, 2),
            f"context_embedder.hada_w{i}_b": torch.randn(2, 8),
        }
    save_file(tensors, tmp_path / "style.safetensors")
    command = ["export", str(tmp_path / "style.safetensors"), "--energy", "0.9", "--no-check", "--output"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "small.safetensors")])
    assert result.exit_code == 0, result.output


@pytest.mark.refused
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"unet_conv_in.hada_w{i}_{side}": (4, 1) if side == "a" else (1, 4) for i in (1, 2) for side in "ab"},
            r"unet_conv_in .*LoHa .*kernel size",
        ),
        (
            {"up.lora_down.weight": (2, 8), "up.lora_up.weight": (4, 2), "up.lora_up.bias": (4,), "up.alpha": ()},
            r"has a bias on B \(up\.lora_up\.bias\)",
        ),
    ],
)
def test_what_cannot_be_written(tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "file.safetensors")
    updates = read_updates(tmp_path / "file.safetensors")
    factors = factorize(updates, energy=1.0)
    with pytest.raises(ValueError, match=message):
        save_single_file(factors, updates, tmp_path / "out.safetensors")
    with pytest.raises(FileExistsError, match=r"file\.safetensors .*exists"):
        save_single_file(factors, updates, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"output .*\.safetensors, got "):
        save_single_file(factors, updates, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_numbers_of_eight_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator)
    small = {"a.lora_down.weight": down.to(torch.float8_e4m3fn), "a.lora_up.weight": up.to(torch.float8_e4m3fn)}
    save_file(small, tmp_path / "file.safetensors")
    updates = read_updates(tmp_path / "file.safetensors")
    (update,) = updates
    torch.testing.assert_close(update.matrix(), small["a.lora_up.weight"].float() @ small["a.lora_down.weight"].float())
    save_single_file(factorize(updates, energy=1.0), updates, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["a.lora_up.weight"].dtype == torch.bfloat16


def test_a_factor_beyond_half_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    large = {"a.lora_down.weight": torch.full((1, 8), 1e6), "a.lora_up.weight": torch.full((4, 1), 1e6)}
    save_file(large, "large.safetensors")
    asked = ["export", "large.safetensors", "--energy", "1", "--output"]
    refused = CliRunner().invoke(app, [*asked, "half.safetensors", "--dtype", "float16"], env={"COLUMNS": "200"})
    assert refused.exit_code == 1
    assert re.search(r"\ba exceeds .*\bfloat16\..*--dtype bfloat16", refused.output)
    assert not Path("half.safetensors").exists()
    assert CliRunner().invoke(app, [*asked, "wide.safetensors", "--dtype", "bfloat16"]).exit_code == 0


@pytest.mark.parametrize("narrow", [torch.float16, torch.float8_e4m3fn])
def test_the_widest_dtype_of_the_factors_counts(tmp_path: Path, narrow: torch.dtype) -> None:
    tensors = {
        "a.lora_down.weight": torch.randn(2, 8).to(narrow),
        "a.lora_up.weight": torch.randn(4, 2).to(narrow),
        "b.alpha": torch.tensor(2.0),
        "b.lora_down.weight": torch.randn(2, 8).bfloat16(),
        "b.lora_up.weight": torch.randn(4, 2).bfloat16(),
    }
    save_file(tensors, tmp_path / "mixed.safetensors")
    updates = read_updates(tmp_path / "mixed.safetensors")
    assert updates.origin.stored_dtype == (torch.float32 if narrow == torch.float16 else torch.bfloat16)
