"""Remove what nobody reads: calls without effect, and tensors that no call reads any more.

Placeholders stay, read or not: they are the program's interface. So do writes into state, checks
on sizes, and random operators, whose removal would change the numbers that later ones draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruna_ir.transform import Effect, Pass, Rewrite, is_pure


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove nodes whose results nobody reads.

    Rewrite:
        a = relu(x); b = exp(x); return a
          -->
        a = relu(x); return a

    Equal subexpressions are not merged.

    >>> import torch
    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> program = capture(torch.nn.ReLU(), (torch.zeros(2, 3),))
    >>> apply(EliminateDeadCode(), program).modified
    False
    """

    name: ClassVar[str] = "eliminate-dead-code"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Erase from the end, so that the operands of a dead node die with it."""
        for node in reversed(list(rw.graph.nodes)):
            if not node.users and is_pure(node) and rw.in_scope(node):
                if node.op == "call_function":
                    rw.applied(node, "removed: nobody reads its result")
                rw.erase(node)
