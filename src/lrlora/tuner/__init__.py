"""LR-LoRA as a PEFT method. Importing this package registers it with PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

_NAME = "LRLORA"
if _NAME not in PeftType.__members__:  # PEFT's registry accepts only members of its enum
    _member = str.__new__(PeftType, _NAME)
    _member._name_ = _member._value_ = _NAME
    PeftType._member_map_[_NAME] = _member
    PeftType._member_names_.append(_NAME)
    PeftType._value2member_map_[_NAME] = _member
    type.__setattr__(PeftType, _NAME, _member)

from .config import LrLoraConfig  # noqa: E402 (needs PeftType.LRLORA)
from .layer import LrLoraLayer  # noqa: E402
from .layers import Linear, cached_weights  # noqa: E402
from .model import LrLoraModel  # noqa: E402

if PeftType(_NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="lrlora", config_cls=LrLoraConfig, model_cls=LrLoraModel)

__all__ = ["Linear", "LrLoraConfig", "LrLoraLayer", "LrLoraModel", "cached_weights"]
