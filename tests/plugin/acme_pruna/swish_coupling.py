"""How the channels of ``acme::swish`` hang together, so that models with it can be pruned.

Element i of the result depends on element i of ``x`` and of ``beta``, broadcast: a channel that
goes from one goes from all three. No argument states a size, so there is nothing to resize.
"""

from __future__ import annotations

from pruna_ir.coupling.rule import Result, Rule, Site


def _couple(site: Site) -> Result:
    return site.algebra.elementwise([site.value("x"), site.value("beta")])


SWISH = Rule(couple=_couple, masked="elementwise")
