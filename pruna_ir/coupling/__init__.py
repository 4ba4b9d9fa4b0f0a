"""Channel coupling: which channels must be removed together, and how to remove them.

    coupling = couple(program)                     # units, groups, reasons
    plan = coupling.plan(coupling.groups[0].units[:8])
    remove(rw, coupling, plan)                     # inside a pass

`Rule` and `ELEMENTWISE` are what a third party needs to teach the analysis an operator.
"""

from pruna_ir.coupling.analysis import Coupling, Group, Member, couple
from pruna_ir.coupling.links import ATTENTION, Reason
from pruna_ir.coupling.plan import RemovalPlan
from pruna_ir.coupling.removal import remove
from pruna_ir.coupling.rule import Edit, Rule, Site
from pruna_ir.coupling.rules_elementwise import ELEMENTWISE, UNARY
from pruna_ir.coupling.value import Block, Factor, Value

__all__ = [
    "ATTENTION",
    "ELEMENTWISE",
    "UNARY",
    "Block",
    "Coupling",
    "Edit",
    "Factor",
    "Group",
    "Member",
    "Reason",
    "RemovalPlan",
    "Rule",
    "Site",
    "Value",
    "couple",
    "remove",
]
