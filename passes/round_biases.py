"""round-biases: biases of quantised layers become what integer kernels store.

A kernel adds up integers, q_y = sum q_w q_x + q_b, and so its bias counts in the steps that a
product of its operands has (Jacob et al., CVPR 2018, section 2.4):

    b' = s * clamp(round(b / s), -2^31, 2^31 - 1)      with s = s_x * s_w, per output channel

ONNX Runtime rounds so on its own, with the scales multiplied in float32. Then the program, which
keeps float biases, is no longer what runs: on a trained CIFAR-10 ResNet-20 the artifact stands at
37 dB from the program, and at 47 dB, which is float32's own noise there, once the program has the
rounded ones. OpenVINO adds float biases; to it these are as good as any.

Last of all passes that change scales, weights or biases: after correct-bias and train-quantized.

Promise (checked): every output keeps ``sqnr_db`` to the program before; every rounded bias is a
whole number of steps, at most half a step from what it was; nothing else changed.

Limits: layers whose input has one scale, and whose weight has one or one per bias; batched
products have no bias here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.call import Call
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.linear_layers import FORMS, Form
from pruna_ir.passes.promises import Untouched
from pruna_ir.program import Program
from pruna_ir.transform import Context, Effect, Finding, Pass, Rewrite

INT32 = 2**31
_FORMS: dict[Any, Form] = {
    **{operator: form for operator, form in FORMS.items() if form.bias is not None},
    CONV_ACT.op: Form("x", "weight", "bias"),
}


@dataclass(frozen=True)
class RoundBiases(Pass):
    """Round the bias of every quantised layer to a multiple of its scales' product.

    Options:
        sqnr_db: the lowest signal-to-noise ratio of any output, against the program before, that
            the pipeline accepts: a net for spoiled layers. A step is about 1/1000 of a rounding
            step of the result at 8 bits, and up to a tenth at 4.

    >>> from pruna_ir import Context, TensorData, capture
    >>> from pruna_ir.pipeline import Pipeline
    >>> context = Context(data=TensorData((torch.randn(64, 3),)), target="onnx")
    >>> program = capture(torch.nn.Linear(3, 2).eval(), (torch.zeros(2, 3),))
    >>> low = Pipeline.parse("insert-fake-quant,round-biases").run(program, context).program
    >>> step = low.tensor("input_1_scale") * low.tensor("weight_scale")
    >>> steps = low.tensor("bias") / step
    >>> bool((steps - steps.round()).abs().max() < 1e-3)
    True
    """

    name: ClassVar[str] = "round-biases"
    effect: ClassVar[Effect] = Effect.BOUNDED

    sqnr_db: float = 10.0

    @property
    def min_sqnr_db(self) -> float:  # type: ignore[override]  # an option decides
        """The budget of the pipeline's check."""
        return self.sqnr_db

    def rewrite(self, rw: Rewrite) -> None:
        """Round, layer by layer; a bias that others read too gets a copy."""
        rounded: list[str] = []
        for node, bias in _biased(rw.program):
            if not rw.in_scope(node):
                continue
            step = _step(rw.program, node)
            if isinstance(step, str):
                rw.skip(node, step)
                continue
            old = rw.program.tensor(str(bias.target)).detach()
            new = _on_steps(old, step)
            if new is None:
                rw.skip(node, "its bias exceeds 32 bits in steps of the scales' product")
            elif not torch.equal(new, old):
                _set_bias(rw, node, rw.derive(bias, new, node))
                rounded.append(node.name)
                moved = float(((new.double() - old.double()) / step.double()).abs().max())
                rw.applied(node, f"bias moved by up to {moved:.3g} of its steps")
        rw.set_origin(rw.before.origin)
        if rounded:
            rw.assure(OnSteps(tuple(rounded)))
            rw.assure(Untouched(tuple(_names(rw.program, rounded))))


def _set_bias(rw: Rewrite, node: fx.Node, bias: fx.Node) -> None:
    name = _FORMS[node.target].bias
    assert name is not None
    if rw.call(node).producer(name) is not bias:
        rw.update(node, **{name: bias})


def _biased(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The layers with a quantised weight and a stored bias, and the node of the bias."""
    for node in list(program.calls(*_FORMS)):
        form, call = _FORMS[node.target], Call(program, node)
        assert form.bias is not None
        bias, weight = call.producer(form.bias), call.producer(form.weight)
        stored = bias is not None and bias.op == "get_attr"
        if stored and weight is not None and weight.target is FAKE_QUANT.op:
            assert bias is not None
            yield node, bias


def _step(program: Program, node: fx.Node) -> Tensor | str:
    """What one unit of a layer's integer bias is worth, [] or [out], or why it has none."""
    form, call = _FORMS[node.target], Call(program, node)
    assert form.bias is not None
    source, weight = call.producer(form.input), call.producer(form.weight)
    bias = call.parameter(form.bias)
    assert weight is not None
    assert bias is not None
    if source is None or source.target is not FAKE_QUANT.op:
        return "its input is not quantised"
    scales = [Call(program, fake).parameter("scale") for fake in (source, weight)]
    if scales[0] is None or scales[1] is None:
        return "its scales are computed"
    if scales[0].numel() != 1:
        return "its input has a scale per channel"
    if bias.dim() != 1 or scales[1].numel() not in (1, len(bias)):
        return (
            f"its bias has shape {list(bias.shape)}, its weight {scales[1].numel()} scales: they "
            "do not belong to the same channels"
        )
    # In float32, as runtimes multiply stored scales.
    step = scales[0].detach().reshape(()) * scales[1].detach().flatten()
    return step.reshape(()) if step.numel() == 1 else step


def _on_steps(bias: Tensor, step: Tensor) -> Tensor | None:
    """The nearest multiples, in the bias's dtype; None where they do not fit into int32."""
    integers = torch.round(bias.double() / step.double())
    if not bool((integers.abs() < INT32).all()):
        return None
    return (integers * step.double()).to(bias.dtype)


def _names(program: Program, layers: list[str]) -> Iterator[str]:
    """The names of the biases of some layers."""
    for node, bias in _biased(program):
        if node.name in layers:
            yield str(bias.target)


@dataclass(frozen=True)
class OnSteps:
    """The biases of some layers are whole numbers of steps, and the nearest to what they were.

    Attributes:
        layers: node names.
    """

    layers: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """Two figures: the largest distance from a multiple, and from the old bias, in steps."""
        old = {n.name: before.tensor(str(bias.target)).detach() for n, bias in _biased(before)}
        apart = moved = 0.0
        stored = 1e-9  # in steps
        for node, bias in _biased(after):
            if node.name not in self.layers:
                continue
            step, new = _step(after, node), after.tensor(str(bias.target)).detach()
            assert isinstance(step, Tensor)
            steps = new.double() / step.double()
            apart = max(apart, float((steps - steps.round()).abs().max()))
            moved = max(moved, float(((new.double() - old[node.name]) / step).abs().max()))
            # Large ones are stored to a few digits only: half a unit in the last place.
            stored = max(stored, float(steps.abs().max()) * torch.finfo(new.dtype).eps)
        return [
            Finding("distance of biases from whole numbers of steps", apart, stored),
            Finding("steps that biases moved", moved, 0.5 + stored),
        ]
