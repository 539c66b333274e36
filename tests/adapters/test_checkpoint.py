"""The checkpoint of a base model, read one tensor at a time: for norms, and for DoRA's magnitudes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lrlora import rank_report
from lrlora.adapters import read_updates

from .test_peft_methods import METHODS, TINY, merged_differences, save_trained


def test_shards_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, METHODS["LoRA"])
    TINY.build().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, sharded = (rank_report(read_updates(adapter, base=tmp_path / name)).rows for name in ("base", "shards"))
    assert sharded == whole
    assert all(row.relative_norm for row in whole)


def test_dora_as_a_whole_and_relative_to_the_weights(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, METHODS["DoRA"])
    direction = read_updates(adapter)
    assert re.search(r"DoRA: .*s·BA.*magnitude", direction.notes[0])
    assert all(update.limit == 4 for update in direction)
    whole = read_updates(adapter, base=tmp_path / "base")
    assert max(row.energy99_rank for row in rank_report(whole).rows) > 4
    expected = merged_differences(tmp_path)
    for update in whole:
        torch.testing.assert_close(update.matrix(), expected[update.module], rtol=1e-5, atol=1e-10)


@pytest.mark.refused
def test_what_is_no_adapter_or_no_base_model(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, METHODS["LoRA"])
    with pytest.raises(ValueError, match=r"base is a full model.*mergekit-extract-lora"):
        read_updates(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no model .*nothing"):
        read_updates(adapter, base=tmp_path / "nothing")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pickled .*: model\.safetensors "):
        read_updates(adapter, base=tmp_path / "pickled")
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors contains no LoRA"):
        read_updates(tmp_path / "other.safetensors")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"base\S* is damaged"):
        read_updates(adapter, base=tmp_path / "base")
