"""Rules of einsum, bilinear and outer: letters are dimensions, those summed are contracted."""

from __future__ import annotations

import string
from collections.abc import Sequence

from torch import fx

from pruna_ir.coupling.rule import Result, Rule, Site
from pruna_ir.coupling.value import Value


def parsed(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of every operand and of the result, an ellipsis spelt out.

    None where an operand repeats a letter (a diagonal).

    >>> parsed("...d,hd->...h", [3, 2])
    (['ABd', 'hd'], 'ABh')
    """
    text, arrow, output = equation.replace(" ", "").partition("->")
    operands = text.split(",")
    wide = [
        rank - len(operand.replace("...", "")) if "..." in operand else 0
        for operand, rank in zip(operands, ranks, strict=True)
    ]
    unused = (c for c in string.ascii_uppercase + string.ascii_lowercase if c not in equation)
    dots = "".join(next(unused) for _ in range(max(wide, default=0)))
    if not arrow:
        every = text.replace("...", "").replace(",", "")
        output = "..." + "".join(c for c in sorted(set(every)) if every.count(c) == 1)
    spelt = [o.replace("...", dots[len(dots) - w :]) for o, w in zip(operands, wide, strict=True)]
    if any(len(set(letters)) < len(letters) for letters in spelt):
        return None
    return spelt, output.replace("...", dots)


def _einsum(site: Site) -> Result:
    values = site.tensors("tensors")
    found = parsed(str(site.arg("equation")), [len(v.dims) for v in values])
    if found is None:
        for value in values:
            site.because("takes a diagonal of them").freeze(value)
        return site.untracked()
    operands, output = found
    _mark_rows(site, values, operands)
    value, letters = values[0], operands[0]
    for k in range(1, len(values)):
        later = output + "".join(operands[k + 1 :])
        value, letters = _joined(site, value, letters, values[k], operands[k], later)
    value, letters = _summed(site, value, letters, output, heads=False)
    return value.with_dims(value.dims[letters.index(letter)] for letter in output)


def _joined(
    site: Site, a: Value, a_letters: str, b: Value, b_letters: str, kept: str
) -> tuple[Value, str]:
    """The product of two operands with everything summed that nothing later reads."""
    b = b.renamed()
    common = [c for c in a_letters if c in b_letters]
    a_dims, b_dims = [a_letters.index(c) for c in common], [b_letters.index(c) for c in common]
    a, b = site.algebra.align(a, a_dims, b, b_dims)
    summed = [c for c in common if c not in kept]
    # Like attention: joint ids of a summed dimension and a shared batch dimension go by heads.
    heads = bool(summed) and len(summed) < len(common)
    pairs = {c: (a.dims[x], b.dims[y]) for c, x, y in zip(common, a_dims, b_dims, strict=True)}
    shared = {f for x, y in pairs.values() if x == y for f in x}
    if heads:
        for letter in summed:
            a = site.per_head(a, a_letters.index(letter))
            b = site.per_head(b, b_letters.index(letter))
        a, b = site.apart(a, b, shared)
    blocks = site.algebra.meet(a, b, shared)
    letters = a_letters + "".join(c for c in b_letters if c not in a_letters)
    dims = [
        (pairs[c][0] or pairs[c][1]) if c in pairs
        else a.dims[a_letters.index(c)] if c in a_letters
        else b.dims[b_letters.index(c)]
        for c in letters
    ]  # fmt: skip
    return _summed(site, Value(tuple(dims), blocks), letters, kept, heads=heads)


def _summed(
    site: Site, value: Value, letters: str, kept: str, *, heads: bool
) -> tuple[Value, str]:
    gone = [k for k, letter in enumerate(letters) if letter not in kept]
    if gone:
        value = site.algebra.contracted(value, gone, heads=heads)
    return value, "".join(letter for letter in letters if letter in kept)


def _mark_rows(site: Site, values: Sequence[Value], operands: Sequence[str]) -> None:
    """A parameter produces channels on the dimensions that no other operand has."""
    for k, source in enumerate(site.arg("tensors")):
        if isinstance(source, fx.Node) and source.op == "get_attr":
            others = "".join(letters for j, letters in enumerate(operands) if j != k)
            for dim, letter in enumerate(operands[k]):
                if letter not in others:
                    site.mark_rows(values[k], dim)


def _bilinear(site: Site) -> Result:
    """``einsum("...i,oij,...j->...o", input1, weight, input2) + bias``."""
    first, weight, second = (site.value(name) for name in ("input1", "weight", "input2"))
    site.mark_rows(weight, 0)
    lead = string.ascii_uppercase[: len(first.dims) - 1]
    half, letters = _joined(site, first, lead + "i", weight, "oij", lead + "oj")
    value, letters = _joined(site, half, letters, second, lead + "j", lead + "o")
    if (bias := site.maybe("bias")) is not None:
        value, _ = site.algebra.meet_dims(value, [len(lead)], bias.renamed(), [0])
    return value


def _outer(site: Site) -> Result:
    """``self[i] * vec2[j]``."""
    a, b = site.value("self"), site.value("vec2").renamed()
    return Value((*a.dims, *b.dims), (*a.blocks, *b.blocks))


RULES: dict[str, Rule] = {
    "aten::einsum": Rule(_einsum),
    "aten::bilinear": Rule(_bilinear),
    "aten::outer": Rule(_outer),
    "aten::ger": Rule(_outer),
}
