"""Methods × tasks × seeds, each at the learning rate that suits it: does a learnable rank help?"""

from .jobs import Comparison, run_comparison
from .methods import METHODS, Method
from .suites import SUITES, Suite, Task

__all__ = ["METHODS", "SUITES", "Comparison", "Method", "Suite", "Task", "run_comparison"]
