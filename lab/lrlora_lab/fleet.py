"""Memory of a fleet of adapters on servers, by their own rules; a calculation, not a measurement.

    python -m lrlora_lab.fleet

100 LoRAs of r = 16 on all linear layers of Llama 3.1 8B in bfloat16, whole and cut as two adapters that were measured:
SmolLM2's of the README, and that of the film reviews. All are held at once. On a server that reserves the largest rank,
the reservation covers all of these modules; on the others, each module has its own rank.
"""

from __future__ import annotations

from typing import NamedTuple

from lrlora.adapters.servers import SERVERS

from .sections import table

ADAPTERS, LAYERS, R = 100, 32, 16
# In and out sizes: query and output, key and value, gate and up, down.
MODULES = ((4096, 4096),) * 2 + ((4096, 1024),) * 2 + ((4096, 14336),) * 2 + ((14336, 4096),)
PER_RANK = LAYERS * sum(m + n for m, n in MODULES)


class Cut(NamedTuple):
    """An adapter after a cut: share of its parameters, largest rank, and equal rank with the same share of the gain."""

    name: str
    share: float
    largest: int
    equal: int


CUTS = (
    Cut("whole, r = 16", 1.0, R, R),
    Cut("cut to 99 %, as on SmolLM2", 0.16, 7, 3),
    Cut("cut to 99 %, as on film reviews", 0.49, 16, R),
)


def gib(name: str, cut: Cut, *, is_equal: bool = False) -> float:
    """Memory of all adapters on a server."""
    server = SERVERS[name]
    if server.reserves_largest:
        parameters = server.rank(cut.equal if is_equal else cut.largest) * PER_RANK
    else:
        parameters = round((cut.equal / R if is_equal else cut.share) * R * PER_RANK)
    return ADAPTERS * parameters * server.itemsize / 2**30


def rows() -> list[list[str]]:
    """A row per server and cut."""
    return [
        [SERVERS[name].title, cut.name, f"{gib(name, cut):.1f}", f"{gib(name, cut, is_equal=True):.1f}"]
        for name in ("vllm", "sglang", "llama.cpp", "peft")
        for cut in CUTS
    ]


if __name__ == "__main__":
    print(table(["server", "100 adapters", "GiB, own ranks", "GiB, equal ranks"], rows()))
