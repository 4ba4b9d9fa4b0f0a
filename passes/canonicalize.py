"""The canonical form that every later pass relies on.

1. Functional operators only: in-place ones are rewritten (see ``functional_form``).
2. One spelling per operator (see ``spellings``).
3. Nothing that returns its operand unchanged: dropout outside training, copies, casts to the same
   dtype, reshapes to the same shape and the like (see ``identities``).
4. Nothing that nobody reads.

Every step keeps the outputs bit for bit, and a second run changes nothing. Randomness and
training-mode behaviour stay as they are. Kept as they are, too: assertions on sizes, and the
counter that batch norm increments in training programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from pruna_ir.passes.functional_form import functionalise, is_training
from pruna_ir.passes.identities import identity_source
from pruna_ir.passes.spellings import respell
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring a captured program into canonical form.

    Rewrite:
        y = relu_(x); z = dropout(y, 0.1, train=False); w = view(z, [2, -1])
          -->
        y = relu(x); w = reshape(y, [2, -1])

    In-place operators are rewritten in the whole program even inside ``submodule<...>``, since a
    write reaches every reader of the tensor.

    Raises:
        PassError: an in-place operator has no functional form, or the program keeps state
            between runs.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> model = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Dropout())
    >>> program = apply(Canonicalize(), capture(model, (torch.zeros(2, 3),))).program
    >>> [str(node.target) for node in program.calls()]
    ['aten.relu.default']
    """

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Functional form first, then spellings and identities in one sweep."""
        _drop_type_assertions(rw)
        functionalise(rw)
        training = is_training(rw)
        for node in rw.calls():
            if node.users:
                _simplify(rw, node, training=training)


def _drop_type_assertions(rw: Rewrite) -> None:
    """Remove the dtype and device checks that ``torch.export`` puts before casts."""
    for node in rw.calls(aten._assert_tensor_metadata.default):
        rw.erase(node)


def _simplify(rw: Rewrite, node: fx.Node, *, training: bool) -> None:
    current = respell(rw, node) or node
    source = identity_source(current, training=training)
    if source is not None:
        rw.replace(current, source)
