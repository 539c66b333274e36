"""Print the required packages at their lowest versions, except torch, whose wheels differ by platform."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
DEPENDENCIES = re.search(r"^dependencies = \[(.*?)^\]", TEXT, re.DOTALL | re.MULTILINE)
assert DEPENDENCIES is not None
for requirement in re.findall(r'"(.+?)"', DEPENDENCIES[1]):
    if not requirement.startswith("torch"):
        print(requirement.replace(">=", "==", 1))
