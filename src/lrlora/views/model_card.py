"""Model card of a run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import EvalResult

from ..adapters.card import adapter_card, base_on_hub
from ..adapters.peft_folder import SavedAdapter
from ..checks import in_markdown
from ..files import write_whole
from ..ranks import MEASURES
from ..run_folder import PICTURE_FILE, shown_metrics, which_checkpoint
from .runs import Run, load_run


def write_card(folder: Path, metrics: dict[str, float] | None = None) -> None:
    """Write a run's model card and rank figure next to its adapter, replacing PEFT's card.

    The figure requires `pip install '.[plots]'` and is omitted without it.

    Args:
        folder: folder of the run, with the adapter.
        metrics: metrics of the run, if not yet saved.

    """
    run = load_run(str(folder), folder.resolve().name, metrics)
    picture = None
    if find_spec("altair") and find_spec("vl_convert"):
        from .figure import save_rank_figure

        picture = PICTURE_FILE
        save_rank_figure(run.report, folder / picture, title=f"Ranks of ΔW, {run.name}")
    saved = SavedAdapter.read(folder)
    run.facts["base model"] = base_on_hub(saved) or Path(run.facts["base model"]).name
    is_ours = run.facts["method"] == "LR-LoRA"
    tags = ["lrlora", "transformers"] + ["lora"] * (not is_ours)
    sections, results = ranks_card(run, picture), _results(run, metrics or {})
    write_whole(folder / "README.md", adapter_card(saved, tags, sections, needs_lrlora=is_ours, results=results))


def _results(run: Run, metrics: dict[str, float]) -> list[EvalResult]:
    """Validation metrics, as the hub shows them."""
    task, data = run.facts.get("task", "text"), Path(run.facts.get("data", "data")).name
    which = which_checkpoint(run.settings.get("training", {}))
    return [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            dataset_split="validation",
            metric_type=name,
            metric_name=f"{name} ({which})",
            metric_value=round(value, 4),
        )
        for name, value in shown_metrics(metrics).items()
    ]


def ranks_card(run: Run, picture: str | None = None) -> list[str]:
    """Paragraphs of a card: method, base, data, metrics, ranks by kind of module, and the figure, as Markdown.

    Args:
        run: the run.
        picture: path of the figure relative to the card, or None.

    """
    method = run.facts["method"]
    kinds = sorted({row.kind for row in run.report.rows})
    lines = [
        "| | " + " | ".join(f"{in_markdown(kind)}: min / mean / max" for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for measure in MEASURES:
        cells = []
        for kind in kinds:
            ranks = [getattr(row, measure) for row in run.report.rows if row.kind == kind]
            cells.append(f"{min(ranks):.3g} / {sum(ranks) / len(ranks):.3g} / {max(ranks):.3g}")
        lines.append(f"| {MEASURES[measure].label} | " + " | ".join(cells) + " |")
    return [
        f"# {in_markdown(run.name)}",
        f"An adapter of the method {method}, trained with lrlora.",
        "\n".join(f"- {name}: {in_markdown(value)}" for name, value in run.facts.items()),
        "## Ranks of ΔW",
        "\n".join(lines),
        *([f"![Ranks of ΔW by layer and module type]({picture})"] if picture else []),
    ]
