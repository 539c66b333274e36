"""Rank measures on known spectra, and the report against an SVD of what merging adds."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from lrlora import LrLoraConfig, RankReport, rank_report
from lrlora.adapters import factorize, read_updates
from lrlora.naming import module_kind
from lrlora.ranks import MEASURES
from lrlora.ranks.measures import curvature, effective_rank, energy_rank, spectrum, stable_rank

from ..conftest import ALIKE, EXPERTS, FAMILIES, TinyModel


def matrix_with(sigma: list[float], m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, len(sigma), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64))[0]
    return (left * torch.tensor(sigma, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (31, 31)])
def test_measures_on_a_known_spectrum(shape: tuple[int, int]) -> None:
    sigma = [4.0, 2.0, 1.0, 0.5]
    energies = spectrum(matrix_with(sigma, *shape))
    torch.testing.assert_close(energies[:4].sqrt(), torch.tensor(sigma).double(), rtol=1e-6, atol=0)
    assert stable_rank(energies) == pytest.approx(21.25 / 16, rel=1e-4)
    p = [s / 7.5 for s in sigma]
    assert effective_rank(energies) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-4)
    assert energy_rank(energies, 0.90) == 2  # 20 / 21.25 = 0.941
    assert energy_rank(energies, 0.99) == 4  # 21 / 21.25 = 0.988


def test_equal_singular_values_use_every_direction() -> None:
    energies = spectrum(matrix_with([0.3] * 10, 64, 20))
    assert stable_rank(energies) == pytest.approx(10, rel=1e-4)
    assert effective_rank(energies) == pytest.approx(10, rel=1e-4)
    assert energy_rank(energies, 0.90) == 9
    assert energy_rank(energies, 0.99) == 10


def test_rank_one_and_float32_input() -> None:
    energies = spectrum(matrix_with([1e-4], 300, 200).float())
    assert stable_rank(energies) == pytest.approx(1, rel=1e-4)
    assert effective_rank(energies) == pytest.approx(1, rel=1e-3)  # the rounding of float32 is itself of full rank
    assert energy_rank(energies, 0.99) == 1


def test_everything_is_zero_at_the_start() -> None:
    energies = spectrum(torch.zeros(5, 7))
    assert (stable_rank(energies), effective_rank(energies), energy_rank(energies, 0.9)) == (0, 0, 0)


def test_curvature_is_the_unexplained_share_of_variance() -> None:
    x = torch.linspace(-1, 1, 2001)
    assert curvature(x, 3 * x + 1) == pytest.approx(0, abs=1e-9)
    assert curvature(x, x**2) == pytest.approx(1, abs=1e-9)
    assert curvature(x, x + x**2) == pytest.approx(4 / 19, rel=1e-2)  # var x² = 4/45, var x = 1/3
    assert curvature(torch.zeros(9), torch.zeros(9)) == 0


def trained(tiny: TinyModel, config: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny.build(), config)
    tiny.train(model, 10)
    return model


def weight_of(model: Any, path: str) -> torch.Tensor:
    if "experts" in path:
        path, _, expert = path.rpartition(".")
        return model.get_parameter(path)[int(expert)].double()
    return model.get_submodule(path).weight.double()


CONFIGS = {
    "φ": lambda **targets: LrLoraConfig(r=3, form="sinc", **targets),
    "expansion": lambda **targets: LrLoraConfig(r=3, form="expansion", num_terms=4, **targets),
    "LoRA": lambda **targets: LoraConfig(r=3, lora_alpha=6, use_rslora=True, **targets),
    "LoRA on experts": lambda **targets: LoraConfig(r=3, target_parameters=EXPERTS, **targets),
    "DoRA": lambda **targets: LoraConfig(r=3, use_dora=True, **targets),
}


@pytest.mark.parametrize(
    ("tiny", "method"),
    [
        *((family, "φ") for family in FAMILIES if family not in ALIKE),
        *(("bert", method) for method in ("expansion", "LoRA")),
        ("mixtral", "LoRA on experts"),
    ],
    indirect=["tiny"],
)
def test_report_equals_the_svd_of_merged_minus_base(tiny: TinyModel, method: str) -> None:
    model = trained(tiny, CONFIGS[method](**tiny.targets))
    report = rank_report(model)
    base, merged = tiny.build(), model.merge_and_unload()
    for row in report.rows:
        weight = weight_of(base, row.module)
        delta = weight_of(merged, row.module) - weight
        sigma = torch.linalg.svdvals(delta)
        assert row.stable_rank == pytest.approx((sigma.square().sum() / sigma[0] ** 2).item(), rel=1e-3)
        assert row.relative_norm == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-3)


@pytest.mark.refused
def test_a_live_update_that_is_more_than_the_product_is_refused(tiny_bert: TinyModel) -> None:
    """The start of PiSSA has moved a part of W0 into BA."""
    model = get_peft_model(tiny_bert.build(), LoraConfig(r=2, init_lora_weights="pissa", **tiny_bert.targets))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*plain LoRA"):
        rank_report(model)


def test_report_describes_every_adapted_module(tiny_bert: TinyModel) -> None:
    report = rank_report(trained(tiny_bert, LrLoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS")))
    rows = {row.module: row for row in report.rows}
    assert len(rows) == 13
    query = rows["bert.encoder.layer.1.attention.self.query"]
    assert (query.layer, query.kind, query.m, query.n, query.r) == (1, "attention", 32, 32, 3)
    assert query.type == "bert.encoder.layer.attention.self.query"
    assert rows["bert.encoder.layer.0.intermediate.dense"].kind == "mlp"
    assert rows["bert.encoder.layer.0.output.dense"].kind == "mlp"
    assert (rows["bert.encoder.layer.0.intermediate.dense"].m, rows["bert.encoder.layer.0.intermediate.dense"].n) == (
        64,
        32,
    )
    assert (rows["bert.pooler.dense"].layer, rows["bert.pooler.dense"].kind) == (None, "other")
    assert all(1 <= row.stable_rank <= row.effective_rank + 1e-9 <= 33 for row in report.rows)
    assert set(report.curves) == set(rows)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.3.self_attn.o_proj", "attention"),
        ("model.layers.3.mlp.gate_proj", "mlp"),
        ("transformer.h.0.attn.c_proj", "attention"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attention"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "attention"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "mlp"),
        ("distilbert.transformer.layer.0.ffn.lin1", "mlp"),
        ("model.decoder.layers.0.fc1", "mlp"),
        ("lm_head", "other"),
    ],
)
def test_kinds_of_common_architectures(path: str, kind: str) -> None:

    assert module_kind(path) == kind


@pytest.mark.filterwarnings(r"ignore:target_parameters=.* no parameter was matched:RuntimeWarning:peft\.")
@pytest.mark.parametrize("method", CONFIGS)
def test_updates_of_low_rank_are_measured_as_their_product_would_be(
    tiny_bert: TinyModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_bert, CONFIGS[method](**tiny_bert.targets))
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    exact = {row.module: spectrum(layers[row.module].get_delta_weight("default")) for row in rank_report(model).rows}
    if method in ("expansion", "LoRA"):  # no m×n matrix is formed
        for row in rank_report(model).rows:
            monkeypatch.setattr(type(layers[row.module]), "get_delta_weight", lambda *_: 1 / 0)
    for row in rank_report(model).rows:
        energies = exact[row.module]
        assert row.stable_rank == pytest.approx(stable_rank(energies), rel=1e-6)
        assert row.effective_rank == pytest.approx(effective_rank(energies), rel=1e-4)
        assert row.energy99_rank == energy_rank(energies, 0.99)
        smaller = min(row.m, row.n)
        limits = {"φ": smaller, "expansion": min(12, smaller)}
        assert row.energy99_rank <= row.rank_limit == limits.get(method, min(3, smaller))


def test_tokens_trained_beside_an_adapter_are_no_module_of_it(tiny_bert: TinyModel, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[3, 4], init_lora_weights=False)
    model = get_peft_model(tiny_bert.build(), config)
    model.save_pretrained(tmp_path)
    rows = [row.module for row in rank_report(read_updates(tmp_path)).rows]
    assert [row.module for row in rank_report(model).rows] == rows
    assert [part.module for part in factorize(model, energy=1.0)] == rows


def test_several_active_adapters_are_told_apart_by_name(tiny_bert: TinyModel) -> None:
    model = get_peft_model(tiny_bert.build(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["key"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r": default, other\. .*adapter=NAME"):
        rank_report(model)
    assert {row.r for row in rank_report(model, "other").rows} == {3}


def test_report_at_the_start_is_defined(tiny: TinyModel) -> None:
    model = get_peft_model(tiny.build(), LrLoraConfig(r=3, **tiny.targets))
    for row in rank_report(model).rows:
        assert [getattr(row, measure) for measure in MEASURES] == [0, 0, 0, 0]
        assert (row.relative_norm, row.curvature, row.phi_zero) == (0, 0, 0)


def test_phi_zero_and_curvature_are_those_of_phi(tiny_bert: TinyModel) -> None:
    model = trained(tiny_bert, LrLoraConfig(r=3, target_modules=["query"], num_basis=8))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    row = rank_report(model).rows[0]
    phi, z = layer.lrlora_phi["default"], layer.get_transfer_input("default")
    assert row.phi_zero == pytest.approx(phi(torch.zeros(1)).item())
    assert row.curvature == pytest.approx(curvature(z, phi(z)), rel=1e-3)


def test_files_round_trip(tiny_bert: TinyModel, tmp_path: Path) -> None:
    report = rank_report(trained(tiny_bert, LrLoraConfig(r=3, target_modules=["query"])))
    report.to_json(tmp_path / "ranks.json")
    loaded = RankReport.from_json(tmp_path / "ranks.json")
    assert loaded.rows == report.rows
    assert loaded.curves.keys() == report.curves.keys()
    frame = report.to_frame()
    assert frame["stable_rank"].tolist() == [row.stable_rank for row in report.rows]
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.json"}
    assert {name: curve.start for name, curve in loaded.curves.items()} == {
        name: curve.start for name, curve in report.curves.items()
    }
    assert loaded.spectra == report.spectra
    (tmp_path / "other.json").write_text('{"rows": [{"module": 1}]}')
    with pytest.raises(ValueError, match=r"other\.json .*lrlora ranks"):
        RankReport.from_json(tmp_path / "other.json")
    json.loads((tmp_path / "ranks.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))


def test_scalars_for_a_logger_are_means_and_extremes(tiny_bert: TinyModel, capfd: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny_bert.build(), LoraConfig(r=3, init_lora_weights=False, target_modules="all-linear"))
    report = rank_report(model)
    assert capfd.readouterr().err == ""  # a bar only where it is asked for
    found = report.summary()
    ranks = {kind: [row.stable_rank for row in report.rows if row.kind == kind] for kind in ("attention", "mlp")}
    for kind, some in ranks.items():
        assert found[f"rank/stable_rank_{kind}"] == pytest.approx(sum(some) / len(some))
    everything = [row.stable_rank for row in report.rows]
    assert found["rank/stable_rank_mean"] == pytest.approx(sum(everything) / len(everything))
    assert (found["rank/stable_rank_min"], found["rank/stable_rank_max"]) == (min(everything), max(everything))


def test_a_merged_model_is_refused(tiny_bert: TinyModel) -> None:
    model = trained(tiny_bert, LrLoraConfig(r=3, target_modules=["query"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        rank_report(model)


def test_half_precision_factors_are_measured_as_the_layer_uses_them(tiny_bert: TinyModel) -> None:
    config = LrLoraConfig(r=3, target_modules=["query"], init_weights=False)
    model = get_peft_model(tiny_bert.build().bfloat16(), config, autocast_adapter_dtype=False)
    half = rank_report(model)
    exact = rank_report(model.float())
    for row, expected in zip(half.rows, exact.rows, strict=True):
        assert row.stable_rank == pytest.approx(expected.stable_rank, rel=1e-5)
        assert row.curvature == pytest.approx(expected.curvature, abs=1e-6)


def test_a_base_weight_that_is_not_at_hand_leaves_the_relative_norm_open(tiny_bert: TinyModel) -> None:
    model = trained(tiny_bert, LrLoraConfig(r=3, target_modules=["query"]))
    model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.to("meta")
    assert [row.relative_norm is None for row in rank_report(model).rows] == [True, False]


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_the_relative_norm_is_that_of_the_values_of_a_quantized_weight(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        plain.weight *= torch.linspace(0.1, 10, 64)[:, None]  # rows of unlike scales
    options = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
    base = getattr(bitsandbytes.nn, kind)(64, 64, bias=False, **options)
    base.load_state_dict(plain.state_dict())
    model = get_peft_model(
        torch.nn.Sequential(base).to("cpu"), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    delta = model.base_model.model[0].get_delta_weight("default")
    (row,) = rank_report(model).rows
    assert row.relative_norm == pytest.approx((delta.norm() / plain.weight.norm()).item(), rel=0.05)
    with torch.no_grad():
        model.eval()(torch.randn(3, 64))  # for which some CPUs pack the weight
    assert rank_report(model).rows[0].relative_norm == pytest.approx(row.relative_norm, rel=1e-3)


@pytest.mark.filterwarnings(r"ignore:Adapter default was active which is now deleted:UserWarning:peft\.")
def test_after_deleting_the_only_active_adapter_the_other_layers_are_left_out(tiny_bert: TinyModel) -> None:
    model = trained(tiny_bert, LrLoraConfig(r=3, target_modules=["query"]))
    model.add_adapter("other", LrLoraConfig(r=2, target_modules=["key"]))
    model.delete_adapter("default")
    assert {row.type.rpartition(".")[2] for row in rank_report(model, "other").rows} == {"key"}


def test_factors_of_a_large_layer_are_never_multiplied(tmp_path: Path) -> None:
    """Nor is the skeleton's weight made: a layer of 70B, whose update in float64 would take 1.9 GB."""
    m, n, r = 8192, 28672, 2
    path = "base_model.model.layers.0.mlp.down_proj.lora_"
    weights = {f"{path}A.weight": torch.randn(r, n), f"{path}B.weight": torch.randn(m, r)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=r, target_modules=["down_proj"]).save_pretrained(tmp_path)
    model = read_updates(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (row,) = rank_report(model).rows
    assert (row.m, row.n, row.energy99_rank, row.relative_norm) == (m, n, 2, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB


def test_a_printed_report_is_a_short_table(tiny_bert: TinyModel) -> None:
    (row, *_) = rank_report(get_peft_model(tiny_bert.build(), LrLoraConfig(r=2, **tiny_bert.targets))).rows
    rows = [
        replace(row, module=f"layers.{layer}.m{number}", layer=layer, type=f"m{number}", stable_rank=1.0 + layer)
        for layer in range(48)
        for number in range(30)
    ]
    lines = str(RankReport([*rows, replace(row, module="head", layer=None, type="m0", stable_rank=73.0)])).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100
    columns, first, second = (line.split() for line in lines[1:4])
    assert columns == ["layer", *(f"{start}-{min(start + 4, 47)}" for start in range(0, 48, 5)), "all"]
    assert first == ["m0", *(f"{1 + (start + min(start + 4, 47)) / 2:.2f}" for start in range(0, 48, 5)), "25.49"]
    assert second[-1] == "24.50"
    assert "10 types more" in lines[-1]
