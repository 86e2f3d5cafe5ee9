"""The planner: from what the model needs and what the machine was measured to do, to one `Plan`, plain data.

`make` decides, `load` reads a plan that was saved; `cost.predict` is the model of time and memory behind both.
"""

from dseek.plan.objective import Objective
from dseek.plan.plan import Plan, load, make, this_machine

__all__ = ["Objective", "Plan", "load", "make", "this_machine"]
