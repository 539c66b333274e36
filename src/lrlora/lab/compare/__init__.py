"""Methods × tasks × seeds, each at the learning rate that suits it: does a learnable rank help?"""

from .jobs import Comparison
from .methods import METHODS, Method
from .queue import run_comparison
from .suites import SUITES, Suite, Task

__all__ = ["METHODS", "SUITES", "Comparison", "Method", "Suite", "Task", "run_comparison"]
