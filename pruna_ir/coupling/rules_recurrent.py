"""Rules of LSTM, GRU and plain recurrent layers, and of single steps of them.

A hidden unit is one row of every gate of both weight matrices, one column of the recurrent one,
and one index of the state and of the output. All layers and directions of one call have the same
number of hidden units, so they lose the same ones. A unit without weights stays at its initial
state of zero, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from pruna_ir.coupling.rule import Result, Rule, Site
from pruna_ir.coupling.value import Factor, Value


def _recurrent(gates: int) -> Callable[[Site], Result]:
    def couple(site: Site) -> Result:
        results = site.untracked()
        if not _plain(site):
            for value in site.operands():
                site.because("is a projected or a packed recurrent layer").freeze(value)
            return results
        assert isinstance(results, tuple)
        hidden = None
        source = _features(site)
        directions = 2 if site.arg("bidirectional") else 1
        for layer in _layers(site, directions):
            for parameters in layer:
                hidden = _cell(site, source, parameters, gates, hidden)
            assert hidden is not None
            source = _directed(hidden, directions)
        assert hidden is not None
        _meet_states(site, hidden)
        return _results(results, hidden, source)

    return couple


def _step(gates: int) -> Callable[[Site], Result]:
    """One step, as ``nn.LSTMCell``: the new state, of an LSTM both states."""

    def couple(site: Site) -> Result:
        named = ("w_ih", "w_hh", "b_ih", "b_hh")
        parameters = [value for name in named if (value := site.maybe(name)) is not None]
        hidden = _cell(site, _features(site), parameters, gates, None)
        _meet_states(site, hidden)
        results = site.untracked()
        if isinstance(results, Value):
            return _as_features(results, hidden)
        return tuple(_as_features(state, hidden) for state in results)

    return couple


def _meet_states(site: Site, hidden: Value) -> None:
    """The initial states have the hidden units last, and nothing else to remove."""
    for state in _states(site):
        last = len(state.dims) - 1
        units = site.because("is computed along them").whole_dims(state, range(last))
        site.algebra.meet_dims(units.renamed(), [last], hidden.renamed(), [0])


def _plain(site: Site) -> bool:
    """Whether it is the variant on padded inputs, with weights of the usual shapes."""
    params = site.arguments.get("params")
    per_cell = 4 if site.arg("has_biases") else 2
    cells = int(site.arg("num_layers") or 0) * (2 if site.arg("bidirectional") else 1)
    return "batch_first" in site.arguments and len(params or ()) == per_cell * cells


def _features(site: Site) -> Value:
    """The features of the input: its last dimension alone."""
    x = site.value("input")
    x = site.because("is computed along them").whole_dims(x, range(len(x.dims) - 1))
    return x.with_dims(x.dims[-1:])


def _layers(site: Site, directions: int) -> Iterator[list[list[Value]]]:
    """[direction][w_ih, w_hh, (b_ih, b_hh)] of every layer."""
    params = site.tensors("params")
    size = 4 if site.arg("has_biases") else 2
    cells = [params[k : k + size] for k in range(0, len(params), size)]
    for k in range(0, len(cells), directions):
        yield cells[k : k + directions]


def _cell(
    site: Site, source: Value, parameters: list[Value], gates: int, hidden: Value | None
) -> Value:
    """Link one direction of one layer; returns the hidden units, as a vector."""
    algebra = site.algebra
    inputs, recurrent, *biases = parameters
    site.mark_rows(inputs, 0)
    site.mark_rows(recurrent, 0)
    algebra.meet_dims(source.renamed(), [0], inputs.renamed(), [1])
    units = Value(recurrent.dims[1:], tuple(b for b in recurrent.blocks if b.touches(
        recurrent.dims[1])))  # fmt: skip
    hidden = units if hidden is None else algebra.meet_dims(hidden, [0], units.renamed(), [0])[0]
    size = int(units.sizes()[0])
    for value in (inputs, recurrent, *biases):
        rows = Value(value.dims[:1], tuple(b for b in value.blocks if b.touches(value.dims[0])))
        split = algebra.regroup(rows.renamed(), (gates, size))
        whole = site.because("is one of its gates").whole_dims(split, [0])
        hidden, _ = algebra.meet_dims(hidden, [0], whole.renamed(), [1])
    return hidden


def _directed(hidden: Value, directions: int) -> Value:
    """The output features: [directions, hidden]."""
    if directions == 1:
        return hidden
    return Value(((Factor(directions), *hidden.dims[0]),), hidden.blocks)


def _states(site: Site) -> list[Value]:
    given = site.arg("hx")
    nodes = given if isinstance(given, (list, tuple)) else [given]
    found = [site.values.get(node) for node in nodes if isinstance(node, fx.Node)]
    return [value for value in found if isinstance(value, Value)]


def _results(
    results: tuple[Value, ...], hidden: Value, features: Value
) -> tuple[Value, ...]:
    """The output, then the last states."""
    output = Value((*results[0].dims[:-1], features.dims[0]), features.blocks)
    return (output, *(_as_features(state, hidden) for state in results[1:]))


def _as_features(result: Value, hidden: Value) -> Value:
    """The result with the hidden units as its last dimension."""
    own = hidden.renamed()
    return Value((*result.dims[:-1], own.dims[0]), own.blocks)


RULES: dict[str, Rule] = {
    "aten::lstm": Rule(_recurrent(4)),
    "aten::gru": Rule(_recurrent(3)),
    "aten::rnn_tanh": Rule(_recurrent(1)),
    "aten::rnn_relu": Rule(_recurrent(1)),
    "aten::lstm_cell": Rule(_step(4)),
    "aten::gru_cell": Rule(_step(3)),
    "aten::rnn_tanh_cell": Rule(_step(1)),
    "aten::rnn_relu_cell": Rule(_step(1)),
}
