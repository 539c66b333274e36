"""LR-LoRA as a PEFT method. Importing this package registers it with PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def _add_peft_type(name: str) -> None:
    """Add a member to the `PeftType` enum: PEFT's registry accepts only members and reads `.value`."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


_add_peft_type("LRLORA")

from .config import LrLoraConfig  # noqa: E402 (needs PeftType.LRLORA)
from .layer import LrLoraLayer  # noqa: E402
from .linear import Linear, cached_weights  # noqa: E402
from .model import LrLoraModel  # noqa: E402

if PeftType("LRLORA") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="lrlora", config_cls=LrLoraConfig, model_cls=LrLoraModel)

__all__ = ["Linear", "LrLoraConfig", "LrLoraLayer", "LrLoraModel", "cached_weights"]
