"""Methods × tasks × seeds, each at the learning rate that suits it: does a learnable rank help?"""

from .jobs import Comparison
from .methods import METHODS, Method
from .protocols import SUITES
from .queue import run_comparison
from .suites import Suite, Task

__all__ = ["METHODS", "SUITES", "Comparison", "Method", "Suite", "Task", "run_comparison"]
