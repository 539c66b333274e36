"""Ranks that the loss decides: during training (`FittedRanks`), and after it (`shrink`)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..shrunk import Kept, Shrunk
    from .callback import FittedRanksCallback
    from .cut import Size
    from .directions import LossCurve, energy_curve
    from .fitted_ranks import FittedRanks
    from .gain import Gain
    from .moments import model_loss
    from .search import Point, smallest
    from .shrinking import shrink

# Public name → module, imported when the name is first used: the settings of a run, which the help of the command line
# shows, need `size` alone, without torch.
_MODULES = {
    "Gain": ".gain",
    "Kept": "..shrunk",
    "FittedRanks": ".fitted_ranks",
    "FittedRanksCallback": ".callback",
    "LossCurve": ".directions",
    "Point": ".search",
    "Shrunk": "..shrunk",
    "Size": ".cut",
    "energy_curve": ".directions",
    "model_loss": ".moments",
    "shrink": ".shrinking",
    "smallest": ".search",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


__all__ = [
    "FittedRanks",
    "FittedRanksCallback",
    "Gain",
    "Kept",
    "LossCurve",
    "Point",
    "Shrunk",
    "Size",
    "energy_curve",
    "model_loss",
    "shrink",
    "smallest",
]
