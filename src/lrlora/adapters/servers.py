"""Servers of LoRA: the files that each computes right, and what it reserves for an adapter.

Read from their source, with versions and evidence in docs/servers.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..lora.factors import Factors

# Forms of the files. OWN: own ranks, and α = r for each module. ONE_ALPHA: own ranks, and one α, divided by the rank of
# each module. ONE_RANK: all modules padded with zeros.
OWN, ONE_ALPHA, ONE_RANK = "own ranks", "one alpha", "one rank"


@dataclass(frozen=True)
class Server:
    """How a server reads and holds a LoRA.

    Args:
        title: name in messages.
        form: OWN, ONE_ALPHA or ONE_RANK.
        form_of_experts: form of adapters of experts in one parameter; None: it does not read them.
        ranks: ranks that it holds, ascending; empty: any.
        reserves_largest: whether it holds all modules at the largest rank.
        option: option that sets this rank; empty: none.
        itemsize: bytes of a value.
        reads_all: whether it also reads DoRA, and heads, tokens and biases trained in full.
        reads: names of heads trained in full that it reads anyway.
        reserves_more: whether it also reserves memory for modules that are not adapted.

    """

    title: str
    form: str = OWN
    form_of_experts: str | None = ONE_RANK
    ranks: tuple[int, ...] = ()
    reserves_largest: bool = False
    option: str = ""
    itemsize: int = 2
    reads_all: bool = False
    reads: tuple[str, ...] = ()
    reserves_more: bool = False

    def rank(self, largest: int) -> int:
        """The rank that it holds for an adapter with this largest rank.

        Raises:
            ValueError: it is too large.

        """
        fitting = next((rank for rank in self.ranks if rank >= largest), None) if self.ranks else largest
        if fitting is None:
            raise ValueError(
                f"{self.title} takes ranks of at most {self.ranks[-1]}, and the largest is {largest}. Pass --max-rank."
            )
        return fitting

    def padded(self, factors: Sequence[Factors]) -> list[Factors]:
        """Factors as they are written: padded with zeros for ONE_RANK, those of rank 0 as well.

        Raises:
            ValueError: see `rank`.

        """
        rank = self.rank(max((pair.rank for pair in factors), default=0))
        has_experts = any(pair.layout.stack is not None for pair in factors)
        if (self.form_of_experts if has_experts else self.form) != ONE_RANK:
            return list(factors)
        return [pair.padded(rank) for pair in factors]

    def require_readable(self, config: Any, keys: Iterable[str] = ()) -> None:
        """Raise ValueError if it does not read all that was trained.

        Args:
            config: PEFT configuration of a LoRA.
            keys: of the weights besides the factors.

        """
        if self.reads_all:
            return
        extras = [name for name in config.modules_to_save or [] if name not in self.reads]
        options = {"DoRA": "use_dora", "token embeddings": "trainable_token_indices"}
        extras += [name for name, field in options.items() if getattr(config, field, None)]
        extras += ["experts in one parameter"] if self.form_of_experts is None and config.target_parameters else []
        extras += ["biases"] if getattr(config, "bias", "none") != "none" else []
        # PEFT also saves resized embeddings, which its configuration does not name.
        extras += [key for key in keys if not any(f".{name}." in key for name in (*self.reads, *extras))]
        if extras:
            names = ", ".join(dict.fromkeys(extras))
            raise ValueError(
                f"{self.title} reads the factors of LoRA alone, but the adapter also has {names}. Serve a "
                "merged model (model.merge_and_unload(safe_merge=True))."
            )

    def reserved(self, ranks: Sequence[tuple[int, int]]) -> str:
        """What it reserves for an adapter, in a sentence.

        Args:
            ranks: rank, and parameters per rank, of each module.

        Raises:
            ValueError: see `rank`.

        """
        used_bytes = sum(rank * cost for rank, cost in ranks) * self.itemsize
        precision = "bfloat16" if self.itemsize == 2 else "float32"
        if not self.reserves_largest:
            return f"{self.title} holds each module at its own rank: {used_bytes / 2**20:.1f} MiB in {precision}."
        rank = self.rank(max(rank for rank, _ in ranks))
        reserved_bytes = rank * sum(cost for _, cost in ranks) * self.itemsize
        option = f" ({self.option.format(rank=rank)})" if self.option else ""
        remark = " It reserves the same for each module that is not adapted." if self.reserves_more else ""
        return (
            f"{self.title} reserves r = {rank} in {len(ranks)} modules: {reserved_bytes / 2**20:.1f} MiB a slot in "
            f"{precision}{option}; the adapter has {used_bytes / 2**20:.1f} MiB.{remark}"
        )


VLLM = Server(
    "vLLM",
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    reserves_largest=True,
    option="--max-lora-rank {rank}",
    reads=("classifier", "score"),
    reserves_more=True,
)
SERVERS = {
    "peft": Server("PEFT", form_of_experts=OWN, itemsize=4, reads_all=True),
    "vllm": VLLM,
    "sglang": Server("SGLang", ONE_RANK, reserves_largest=True, option="--max-lora-rank {rank}", reserves_more=True),
    "llama.cpp": Server("llama.cpp", ONE_ALPHA, None, itemsize=4),
    "hot-swap": Server(
        "A hot-swap", ONE_RANK, reserves_largest=True, option="target_rank={rank}", itemsize=4, reads_all=True
    ),
}


def served(ranks: Sequence[tuple[int, int]], config: Any, server: str | None = None, keys: Iterable[str] = ()) -> str:
    """What a server reserves for an adapter, in a sentence; by default vLLM for a language model, else empty.

    Args:
        ranks: rank, and parameters per rank, of each module.
        config: its PEFT configuration; None for a single file.
        server: name in `SERVERS`.
        keys: of the weights besides the factors.

    """
    if server is not None:
        return SERVERS[server].reserved(ranks)
    if config is None or config.task_type != "CAUSAL_LM":
        return ""
    try:
        VLLM.require_readable(config, keys)
        return VLLM.reserved(ranks)
    except ValueError as error:
        return str(error)
