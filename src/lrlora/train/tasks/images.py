"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, default_data_collator
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from ..row_checks import require_rows
from .texts import Classify

Cell = dict[str, Any]  # an image in `datasets`: its `bytes`, or the `path` of its file
_UNKNOWN_RANGE = ("I", "F")  # modes of PIL with pixels of 32 bits


class ImageClassify(Classify):
    """Classification of an image."""

    name = "image-classify"
    roles: ClassVar[tuple[str, ...]] = ("image", "label")
    optional_roles: ClassVar[tuple[str, ...]] = ("group",)
    text_roles: ClassVar[tuple[str, ...]] = ()
    reads_text = False
    adapter_fields: ClassVar[Mapping[str, Any]] = {"modules_to_save": ["classifier"]}  # unknown to PEFT
    model_class: ClassVar[Any] = AutoModelForImageClassification
    pipeline = "image-classification"
    architectures = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    collator: ClassVar[Any] = staticmethod(lambda processor: default_data_collator)

    def as_read(self, data: Dataset) -> Dataset:
        if not isinstance(data.features["image"], datasets.Image):
            raise ValueError(
                f"The column image must contain images, got {data.features['image']}. Pass a folder with one folder "
                "of images per class, or data with a column of type Image."
            )
        return data.cast_column("image", datasets.Image(decode=False))  # decoded per batch, not cached

    def check(self, data: Dataset, where: str, *, with_label: bool) -> None:
        rule = f"image must be an image of 8 or 16 bits a channel in {where} (--skip-empty skips empty examples)"
        require_rows(map(_is_image, data["image"]), rule)

    def load_processor(self, source: str | Path) -> Any:
        return AutoImageProcessor.from_pretrained(source)

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            images = [_decode(cell) for cell in batch["image"]]
            labels = {"labels": batch["label"]} if "label" in batch else {}
            return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], **labels}

        return data.with_transform(encode)

    def trainer(self, processor: Any, **arguments: Any) -> Trainer:
        arguments["args"].remove_unused_columns = False  # batches need a column that the model does not read
        return super().trainer(processor, **arguments)

    def shown(self, row: dict[str, Any], processor: Any, labels: list[str]) -> str:
        size = " × ".join(map(str, row["pixel_values"].shape))
        return f"Example, as the model reads it: an image of shape {size} → {labels[row['labels']]}"

    def described(self, example: dict[str, Any]) -> dict[str, Any]:
        return {**example, "image": example["image"]["path"]}


def _open(cell: Cell) -> Image.Image:
    return Image.open(BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def _is_image(cell: Cell | None) -> bool:
    """Check for an image by its first bytes: decoding all images takes as long as training on them."""
    if cell is None:
        return False
    try:
        with _open(cell) as image:
            return image.mode not in _UNKNOWN_RANGE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def _decode(cell: Cell) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says."""
    try:
        with _open(cell) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # which `convert` would clip to white
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"The image {cell['path'] or ''} cannot be decoded: {error}") from None
