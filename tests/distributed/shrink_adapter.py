"""One of several processes that shrink a trained adapter: shrink_adapter.py WAY ADAPTER FOLDER; started by torchrun.

WAY is alone, ddp, fsdp or zero2. Trains a step at rate 0, so that the adapter is the same for all ways. Writes the
small adapter to FOLDER/small, the record of the shrinking to FOLDER/out/whole.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from lrlora import FittedRanksCallback
from tests.conftest import TinyModel
from tests.distributed.accelerate_on_cpu import shard_on_cpu
from tests.distributed.train_sharded import gather
from tests.learned.test_shrinking import Pairs

WAYS: dict[str, dict[str, Any]] = {
    "fsdp": {
        "fsdp": "full_shard",
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    },
    "zero2": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    },
}


def shrunk(way: str, adapter: Path, folder: Path) -> Trainer:
    """Trainer with the small adapter, which is also saved."""
    if way == "fsdp":
        shard_on_cpu()
    arguments = TrainingArguments(
        str(folder / "out"),
        **{"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "per_device_train_batch_size": 8},
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True},
        **WAYS.get(way, {}),
    )
    model: Any = PeftModel.from_pretrained(TinyModel("llama").build(), adapter, is_trainable=True)
    trainer = Trainer(model, arguments, train_dataset=Pairs(512, 0), eval_dataset=Pairs(301, 1))  # not a multiple
    trainer.add_callback(FittedRanksCallback(keep=0.9, trainer=trainer))
    trainer.train()
    if way == "fsdp":  # accelerate gathers on GPUs alone
        state = gather(model, way)
        model.save_pretrained(str(folder / "small"), state_dict=state, is_main_process=not trainer.args.process_index)
    else:
        trainer.save_model(str(folder / "small"))
    return trainer


def main() -> None:
    """Shrink, save, and leave."""
    way, adapter, folder = sys.argv[1:]
    torch.manual_seed(0)
    shrunk(way, Path(adapter), Path(folder))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in learn_ranks.py


if __name__ == "__main__":
    main()
