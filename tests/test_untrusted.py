"""Regular expressions of an adapter's configuration: those that people write pass, those that never end do not."""

from __future__ import annotations

import re
import time

import pytest
from peft.utils.other import get_pattern_key

from lrlora.untrusted import pattern_key, require_quick_patterns

ATTENTION = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
PROJECTIONS = "k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj"
USUAL = [
    "all-linear",
    r".*\.(q_proj|v_proj)$",
    r"^(?!.*lm_head).*linear.*",
    r"model\.layers\.(0|1|2)\..*",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)",
    r"(?:.*?\.)?layers\.\d+\..*",
    r"^(?!.*(?:visual|patch_embed)).*(?:q_proj|k_proj|v_proj).*",
    r"(?i).*(attn|mlp)\.(?:c_attn|c_proj)",
    r"(?:model\.)?decoder\.layers\.(?:1[0-9]|2[0-3])\.[a-z_]+\.fc[12]",
    # What Unsloth writes into the adapters of models that see.
    rf"(?:.*?(?:language|text).*?(?:{ATTENTION}).*?(?:{PROJECTIONS}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{ATTENTION})\.(?:(?:{PROJECTIONS})))",
]
HOSTILE = [
    "((.+)+)+Z",
    "(a|a)*Z",
    "(?:a|aa)+Z",
    r"(\w+\s?)*Z",
    "(?:a?){50}Z",
    "(?:){4000000000}",
    "(a|a)" * 40 + "Z",
    "a?" * 40 + "a" * 40,
    "(?i)" + "(?:ka|\u212aa)" * 40 + "Z",  # the sign of kelvins, which is a K if case is ignored
    r"(?=(a|a)*Z).*",
    ".*.*.*.*.*.*Z",
    "(" * 3000 + ")" * 3000,
    "a" * 10**6,
    "[",
    "x+)+(Z",  # none by itself, and ((.*\.)?(x+)+(Z)$ where PEFT puts it
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_pass(pattern: str) -> None:
    require_quick_patterns({"target_modules": pattern, "exclude_modules": pattern}, "here")


@pytest.mark.parametrize("pattern", USUAL[:-1])
def test_usual_keys_pass(pattern: str) -> None:
    require_quick_patterns({"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 8}}, "here")


def test_the_names_of_a_large_model_pass() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(48) for j in range(64)]
    require_quick_patterns({"rank_pattern": dict.fromkeys(names, 4), "target_modules": names}, "here")
    require_quick_patterns({"target_modules": "|".join(map(re.escape, names[:1000]))}, "here")


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("field", ["rank_pattern", "target_modules", "modules_to_save", "layers_pattern"])
def test_hostile_patterns_are_refused_by_field(pattern: str, field: str) -> None:
    value = {"rank_pattern": {"q_proj": 1, pattern: 4}, "modules_to_save": ["score", pattern]}.get(field, pattern)
    with pytest.raises(ValueError, match=f"^{field} in its file contains"):
        require_quick_patterns({"r": 8, field: value}, "in its file")


def test_the_patterns_of_a_field_count_together() -> None:
    per_module = {f".*layers.{i}.*{name}": 4 for i in range(48) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    require_quick_patterns({"rank_pattern": per_module, "alpha_pattern": per_module}, "here")
    slow = {f".*{i}.*{i}.*{i}": 4 for i in range(100)}
    with pytest.raises(ValueError, match="rank_pattern here contains"):
        require_quick_patterns({"rank_pattern": slow}, "here")


def test_names_in_a_list_are_no_patterns() -> None:
    require_quick_patterns({"target_modules": ["odd[name"], "exclude_modules": ["(a|a)*"]}, "here")


@pytest.mark.parametrize("pattern", [".*(a|ab).*(a).*(a|ab).*(a)Z", "(?:ab|ab)" * 24 + "Z"])
def test_the_slowest_that_pass_come_to_an_end(pattern: str) -> None:
    require_quick_patterns({"target_modules": pattern}, "here")
    assert re.fullmatch(pattern, "ab" * 50) is None


@pytest.mark.parametrize("module", ["layers.0.q", "a.layers.1.q", "layers.10.q", "xlayers.0.q", "v", "a+b", "none", ""])
def test_the_pattern_of_a_module_is_that_of_peft(module: str) -> None:
    patterns = [r"layers\.0\.q", "q", r"layers\.\d.*", "a+b", "v|w", ""]
    assert pattern_key(patterns, module) == get_pattern_key(patterns, module)


def test_a_pattern_for_each_of_many_modules_is_found_soon() -> None:
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(1000)]
    began = time.process_time()
    assert [pattern_key(names, name) for name in names] == names
    assert time.process_time() - began < 10  # of which it needs one; compiled for each module it would be a minute
