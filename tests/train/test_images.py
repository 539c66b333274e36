"""Images told apart: trained, scored, predicted and handed on, from folders as users have them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from PIL import ExifTags, Image
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from lrlora.naming import layer_index
from lrlora.ranks import RankReport
from lrlora.train.inputs import Inputs
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks import TASKS

from ..cli import run, told
from .small import save_image_model, save_pictures

TRAINED = ("--steps", 20, "--learning-rate", 5e-3, "--batch-size", 8, "--rank", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures, and a run of LR-LoRA on them."""
    folder = tmp_path_factory.mktemp("images")
    save_image_model(folder / "vit")
    save_pictures(folder / "pictures" / "train")
    save_pictures(folder / "pictures" / "test", 16, seed=1)
    # One with no colours, and one with an alpha channel.
    Image.new("L", (30, 10), 128).save(folder / "pictures" / "train" / "red" / "gray.png")
    Image.new("RGBA", (30, 10), (0, 0, 255, 9)).save(folder / "pictures" / "train" / "blue" / "clear.png")
    model, data = ("--model", folder / "vit"), ("--data", folder / "pictures")
    result = run("train", *model, *data, "--task", "image-classify", *TRAINED, "--output", folder / "run")
    assert result.exit_code == 0, result.output
    assert "shape 3 × 16 × 16 → " in result.output
    return folder


def test_the_classes_are_learned_and_every_layer_has_its_rank(folder: Path) -> None:
    assert json.loads((folder / "run" / "metrics.json").read_text())["accuracy"] > 0.9
    rows = RankReport.from_json(folder / "run" / "ranks.json").rows
    places = {(row.kind, layer_index(row.module)) for row in rows}
    assert places == {(kind, layer) for kind in ("attention", "mlp") for layer in (0, 1)}
    assert all(row.stable_rank >= 1 for row in rows)


def test_a_run_knows_its_pictures_by_their_content_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    settings = {"model": str(folder / "vit"), "task": "image-classify"}

    def sums(pictures: Path) -> dict[str, str]:
        return Inputs.read(TrainConfig(**settings, data=str(pictures))).record.data_sums

    assert sums(tmp_path / "pictures") == sums(folder / "pictures")
    Image.new("L", (30, 10), 127).save(tmp_path / "pictures" / "train" / "red" / "gray.png")
    assert sums(tmp_path / "pictures") != sums(folder / "pictures")


def test_scores_are_those_of_the_predictions_and_plain_transformers_makes_the_same(folder: Path) -> None:
    written = folder / "predictions.jsonl"
    assert run("predict", folder / "run", "--data", folder / "pictures", "--output", written).exit_code == 0
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    right = [Path(line["image"]).parent.name for line in lines]
    guessed = [line["prediction"] for line in lines]
    scored = run("evaluate", folder / "run", "--data", folder / "pictures").output
    assert len(lines) == 32
    for metric in (accuracy_score, matthews_corrcoef):
        assert f"{metric(right, guessed):.4f}" in scored

    classes = {"config": AutoConfig.from_pretrained(folder / "run"), "ignore_mismatched_sizes": True}
    base = AutoModelForImageClassification.from_pretrained(folder / "vit", **classes)
    model = PeftModel.from_pretrained(base, folder / "run").merge_and_unload(safe_merge=True)
    processor = AutoImageProcessor.from_pretrained(folder / "run")
    image = Image.open(lines[0]["image"]).convert("RGB")
    with torch.no_grad():
        probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    for label, probability in lines[0]["probabilities"].items():
        assert probabilities[model.config.label2id[label]] == pytest.approx(probability, abs=1e-4)


def test_photographs_are_read_upright_and_16_bits_are_scaled(tmp_path: Path) -> None:
    """As `datasets` decodes them."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by 90° to the right where it is shown
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(gray).save(tmp_path / "deep.png")
    paths = [str(tmp_path / "photo.png"), str(tmp_path / "deep.png")]
    data = Dataset.from_dict({"image": paths, "label": [0, 1]}).cast_column("image", datasets.Image())
    task, seen = TASKS["image-classify"], []
    encoded = task.encode(
        task.as_read(data), lambda images, **options: (seen.extend(images), {"pixel_values": images})[1], None
    )
    assert len(encoded[:]["pixel_values"]) == 2
    assert np.array_equal(np.asarray(seen[0]), np.asarray(data[0]["image"].convert("RGB")))
    assert seen[0].size == (16, 24)
    assert np.array_equal(np.asarray(seen[1])[..., 0], np.arange(256).reshape(16, 16))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    floats = Dataset.from_dict({"image": [str(tmp_path / "float.tiff")]}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="8 or 16 bits"):
        task.check(task.as_read(floats), "data", with_label=False)


def test_the_code_in_the_card_loads_it(folder: Path) -> None:
    code = (folder / "run" / "README.md").read_text().split("```python")[1].split("```")[0]
    code = code.replace("this folder or hub name", str(folder / "run")).replace("the base model", str(folder / "vit"))
    names: dict[str, object] = {}
    exec(code, names)
    assert {"model", "processor"} <= set(names)


def test_it_is_exported_as_a_plain_lora(folder: Path) -> None:
    result = run("export", folder / "run", "--output", folder / "lora")
    assert result.exit_code == 0, result.output
    assert (folder / "lora" / "preprocessor_config.json").is_file()


@pytest.mark.refused
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-length", 8), "max_length=8 applies to text"),
        (("--adapter", "init_lora_weights=eva", "--method", "lora"), "a pass over the data before training"),
    ],
)
def test_what_is_for_texts_is_refused(folder: Path, tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    common = ("--model", folder / "vit", "--data", folder / "pictures", "--task", "image-classify")
    assert said in told("train", *common, "--steps", 1, *options, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.refused
def test_what_is_no_image_is_told_before_training(folder: Path, tmp_path: Path) -> None:
    data = save_pictures(tmp_path / "data", 4)
    (data / "red" / "2.png").write_bytes(b"no image")
    common = ("--model", folder / "vit", "--task", "image-classify", "--output", tmp_path / "out")
    said = told("train", *common, "--data", data)
    assert re.search(r"image .*\bsplit train .*\b1 row\b", said)
    (tmp_path / "table.csv").write_text("image,label\nred/1.png,red\nblue/1.png,blue\n")
    said = told("train", *common, "--data", tmp_path / "table.csv")
    assert re.search(r"column image .* got Value\(", said)
    assert not (tmp_path / "out").exists()
    assert re.search(r"needs image, .*text.*--data", told("predict", folder / "run", "--text", "red"))


def test_a_picture_that_ends_too_soon_is_named(folder: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures")
    whole = (pictures / "red" / "3.png").read_bytes()
    (pictures / "red" / "3.png").write_bytes(whole[: len(whole) // 2])
    model, data = ("--model", folder / "vit"), ("--data", pictures)
    said = told("train", *model, *data, "--task", "image-classify", *TRAINED, "--output", tmp_path / "run")
    assert f"The image {pictures / 'red' / '3.png'} cannot be decoded" in said
