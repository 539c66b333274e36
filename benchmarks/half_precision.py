"""Share of the update lost in bfloat16 and float16, by the method of combining W and ΔW.

    python benchmarks/half_precision.py            # writes docs/speed/half_precision.json
    python benchmarks/half_precision.py --report   # docs/speed.md from the stored results

The error is that of the added update, ‖x·Ŵᵀ − x·Wᵀ − x·ΔWᵀ‖ / ‖x·ΔWᵀ‖, with sums in float32; excludes rounding of the
output itself, which affects every method.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import torch  # noqa: E402
from sections import table, with_section  # noqa: E402
from torch import Tensor  # noqa: E402

from lrlora.ops.phi import TransferSpec  # noqa: E402
from lrlora.ops.reference import reference_delta_weight  # noqa: E402
from lrlora.ops.transfer import Transfer  # noqa: E402

RESULTS = DOCS / "speed" / "half_precision.json"
PAGE = DOCS / "speed.md"
SIZE, TOKENS, R, GAIN = 768, 512, 8, 300.0
RATIOS = (0.003, 0.01, 0.03)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Record = dict[str, Any]


def layer(ratio: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(x, W, ΔW), x and W in `dtype` and ΔW float64, ‖ΔW‖ = ratio · ‖W‖."""
    torch.manual_seed(0)
    phi = Transfer(TransferSpec(num_basis=8))
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_(0, 0.3)
    x, W = torch.randn(TOKENS, SIZE, dtype=dtype), (torch.randn(SIZE, SIZE) / SIZE**0.5).to(dtype)
    A, B = torch.randn(R, SIZE, dtype=torch.float64), 0.002 * torch.randn(SIZE, R, dtype=torch.float64)
    with torch.no_grad():
        delta = reference_delta_weight(A, B, phi, scaling=1.0, input_gain=GAIN)
    return x, W, ratio * W.double().norm() / delta.norm() * delta


def products(x: Tensor, W: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Result of each method for x·(W + ΔW)ᵀ, float32 sums of operands in the dtype of x."""

    def times(weight: Tensor) -> Tensor:
        return x.float() @ weight.to(x.dtype).float().T

    total = W.double() + delta
    return {
        "one matmul, W + ΔW rounded": times(total),
        "two matmuls": times(W) + times(delta),
        "W + ΔW in float32": x.float() @ total.float().T,
    }


COSTS = {
    "one matmul, W + ΔW rounded": "1 matmul",
    "two matmuls": "2 matmuls",
    "W + ΔW in float32": "1 matmul in float32",
}


def measure() -> list[Record]:
    """One record per dtype, update size and method."""
    records = []
    for name, dtype in DTYPES.items():
        for ratio in RATIOS:
            x, W, delta = layer(ratio, dtype)
            exact = x.double() @ delta.T
            for way, product in products(x, W, delta).items():
                update = product.double() - (x.float() @ W.float().T).double()
                error = ((update - exact).norm() / exact.norm()).item()
                records.append({"dtype": name, "ratio": ratio, "way": way, "error": error})
    return records


def render(records: list[Record]) -> str:
    """The table."""
    columns = [(name, ratio) for name in DTYPES for ratio in RATIOS]
    errors = {(r["way"], r["dtype"], r["ratio"]): r["error"] for r in records}
    header = ["way", "cost", *(f"{name}, {100 * ratio:g} %" for name, ratio in columns)]
    rows = [
        [way, cost, *(f"{100 * errors[(way, *column)]:.2g} %" for column in columns)] for way, cost in COSTS.items()
    ]
    return table(header, rows)


def updated(page: str) -> str:
    """Page with the table of the stored results."""
    return with_section(page, "half-precision", render(json.loads(RESULTS.read_text(encoding="utf-8"))))


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only render docs/speed.md from the stored results")
    if not parser.parse_args().report:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
