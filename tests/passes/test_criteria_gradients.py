"""Criteria of the loss against loops over samples and units, written from the formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.passes.calibration_loss import sample_losses
from pruna_ir.passes.calibration_runs import runs
from pruna_ir.passes.criteria_gradients import MOVEMENT_RATE, gauss_newton
from pruna_ir.passes.differentiable import differentiable
from pruna_ir.passes.importance import scores
from pruna_ir.passes.scored_members import Candidates, parameters
from pruna_ir.transform import Context
from tests.passes.scored_networks import Scored, assert_same, shared

NETWORKS = ("images", "language")
PER_DATA = ("taylor", "gradient", "snip", "fisher", "gauss-newton")


def raw(scored, criterion, batch_size=3):
    return scores(
        scored.program, scored.coupling, scored.groups, criterion,
        context=scored.context(batch_size), aggregate="sum", normalise="none",
    )  # fmt: skip


def sample_gradients(scored, loss=None):
    """For every sample, the gradient of its loss by each parameter."""
    loss = loss or scored.sample_loss
    found = []
    for number in range(len(scored.inputs)):
        scored.module.zero_grad()
        loss(scored.module, number).backward()
        found.append({id(p): p.grad.clone() for p in scored.module.parameters()})
    return found


def over_members(scored, entry):
    """The sum over members and entries of entry(weight), by unit."""
    parameter = scored.module.get_parameter
    return [
        [
            sum(
                float(scored.unit_entries(m, u, entry(parameter(m.tensor))).sum())
                for m in scored.members(group)
            )
            for u in range(len(group.units))
        ]
        for group in scored.groups
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_fisher_sums_squares_sample_by_sample(network):
    scored = shared(network)
    grads = sample_gradients(scored)
    assert_same(
        raw(scored, "fisher"),
        over_members(
            scored,
            lambda w: 0.5 * sum(w.detach() ** 2 * g[id(w)] ** 2 for g in grads) / len(grads),
        ),
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_is_the_magnitude_of_the_mean(network):
    scored = shared(network)
    grads = sample_gradients(scored)
    mean = {key: sum(g[key] for g in grads) / len(grads) for key in grads[0]}
    assert_same(raw(scored, "gradient"), over_members(scored, lambda w: mean[id(w)].abs()))


@pytest.mark.parametrize("network", NETWORKS)
def test_snip_is_the_share_of_the_sensitivity_of_all_scored_weights(network):
    scored = shared(network)
    grads = sample_gradients(scored)
    mean = {key: sum(g[key] for g in grads) / len(grads) for key in grads[0]}
    weights = {
        m.tensor: scored.module.get_parameter(m.tensor)
        for group in scored.groups
        for m in scored.members(group)
    }
    total = sum(float((w.detach() * mean[id(w)]).abs().sum()) for w in weights.values())
    assert_same(
        raw(scored, "snip"),
        over_members(scored, lambda w: (w.detach() * mean[id(w)]).abs() / total),
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_gauss_newton_draws_labels_from_the_model(network):
    scored = shared(network)

    def loss(module, number):
        """The loss with labels that the program's own logits draw; the formula is the same."""
        (batch,) = runs(scored.program, TensorData((scored.inputs[number : number + 1],)))
        logits = module(*batch.inputs)
        return sample_losses(scored.program, batch, logits, seed=3, sampled=True)[0]

    grads = sample_gradients(scored, loss)
    assert_same(
        raw(scored, "gauss-newton"),
        over_members(
            scored,
            lambda w: 0.5 * sum(w.detach() ** 2 * g[id(w)] ** 2 for g in grads) / len(grads),
        ),
    )


def test_gauss_newton_approaches_the_exact_diagonal_of_a_linear_classifier():
    """G = E_x sum_y p_y (p - e_y)^2 x^2 for logits W x, summed over many samples."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3, bias=False)).double()
    program = capture(module, (torch.randn(2, 2).double(),))
    coupling = couple(program)
    x = torch.randn(3000, 2).double()
    group = coupling.groups[0]
    context = Context(data=TensorData((x,), None, 500))
    last = module[1].weight.detach()
    hidden = module[0](x).detach()
    chances = torch.softmax(hidden @ last.T, 1)
    exact = [0.0] * 3
    for y in range(3):
        error = chances - torch.eye(3)[y]
        for u in range(3):
            share = chances[:, y, None] * error**2 * hidden[:, u, None] ** 2 * last[:, u] ** 2
            exact[u] += 0.5 * float(share.sum(1).mean())
    parts = gauss_newton(Candidates(program, coupling, [group], context))
    members = parameters(program, group)
    place = next(k for k, m in enumerate(members) if m.tensor == "1.weight")
    np.testing.assert_allclose(parts[0][place], exact, rtol=0.1)


@pytest.mark.parametrize("network", NETWORKS)
def test_taylor_squares_the_first_order_change_of_each_input(network):
    """Weights of each consumer, sample by sample: sum w g over the columns that go."""
    scored = shared(network)
    grads = sample_gradients(scored)
    inputs_of = {}
    for layer, x in scored.reads().items():
        inputs_of[layer] = (tuple(x.shape), float(x.sum()))
    expected = []
    for group in scored.groups:
        totals = [0.0] * len(group.units)
        by_input = {}
        for layer, channels in scored.readers(group):
            by_input.setdefault(inputs_of[layer], []).append((layer, channels))
        for together in by_input.values():
            for g in grads:
                for u in range(len(group.units)):
                    change = sum(
                        first_order(layer, g[id(layer.weight)], channels[u])
                        for layer, channels in together
                    )
                    totals[u] += change**2 / len(grads)
        expected.append(totals)
    if network == "language":
        # The head is tied to the embedding, whose gradient the parameter's own would include.
        width = next(k for k, g in enumerate(scored.groups) if len(g.units) == 12)
        expected[width] = taylor_by_taps(scored, scored.groups[width])
    assert_same(raw(scored, "taylor"), expected)


def first_order(layer, gradient, channels):
    """sum w g over columns; a grouped convolution's input channel c meets its own group's rows."""
    product = layer.weight.detach() * gradient
    if isinstance(layer, nn.Linear) or layer.groups == 1:
        return sum(float(product[:, c].sum()) for c in channels)
    local, rows = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return sum(
        float(product[(c // local) * rows : (c // local + 1) * rows, c % local].sum())
        for c in channels
    )


def taylor_by_taps(scored, group):
    """x * dL/dx for every input of a linear layer, by hooks that give each its own copy."""
    inputs_of = {layer: float(x.sum()) for layer, x in scored.reads().items()}
    totals = [0.0] * len(group.units)
    for number in range(len(scored.inputs)):
        copies = {}

        def tap(layer, args, copies=copies):
            copies[layer] = args[0].clone()
            copies[layer].retain_grad()
            return (copies[layer],)

        layers = [layer for layer, _ in scored.readers(group)]
        hooks = [layer.register_forward_pre_hook(tap) for layer in layers]
        scored.sample_loss(scored.module, number).backward()
        for hook in hooks:
            hook.remove()
        for same in {inputs_of[layer] for layer in layers}:
            for u in range(len(group.units)):
                change = sum(
                    float((copies[layer].detach() * copies[layer].grad)[..., u].sum())
                    for layer in layers
                    if inputs_of[layer] == same
                )
                totals[u] += change**2 / len(scored.inputs)
    return totals


def test_taylor_predicts_what_removal_does_to_the_loss():
    """Units of which little is read: the loss changes by sum x dL/dx, to first order."""
    scored = Scored("images")
    layer = scored.module.head
    with torch.no_grad():
        layer.weight *= 1e-4
    scored = rebuilt(scored)
    before = [float(scored.sample_loss(scored.module, n)) for n in range(7)]
    group = next(k for k, g in enumerate(scored.groups) if len(g.units) == 7)
    expected = []
    for u in range(7):
        damaged = copy.deepcopy(scored.module)
        with torch.no_grad():
            damaged.head.weight[:, u] = 0
        after = [float(scored.sample_loss(damaged, n)) for n in range(7)]
        expected.append(sum((a - b) ** 2 for a, b in zip(after, before, strict=True)) / 7)
    np.testing.assert_allclose(raw(scored, "taylor")[group], expected, rtol=1e-3)


def rebuilt(scored):
    """The program of the module as it now is."""
    fresh = Scored("images")
    fresh.module.load_state_dict(scored.module.state_dict())
    fresh.program = capture(fresh.module, (fresh.inputs[:2],))
    fresh.coupling = couple(fresh.program)
    fresh.groups = [
        g for g in fresh.coupling.groups if g.reason is None and any(m.produced for m in g.members)
    ]
    return fresh


@pytest.mark.parametrize("network", NETWORKS)
def test_movement_sums_over_steps_of_sgd(network):
    scored = shared(network)
    module = copy.deepcopy(scored.module)
    moved = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for start in range(0, 7, 3):
        numbers = range(start, min(start + 3, 7))
        module.zero_grad()
        (sum(scored.sample_loss(module, n) for n in numbers) / len(numbers)).backward()
        with torch.no_grad():
            for name, p in module.named_parameters():
                moved[name] -= p * p.grad
                p -= MOVEMENT_RATE * p.grad
    names = {id(p): name for name, p in scored.module.named_parameters()}
    assert_same(raw(scored, "movement"), over_members(scored, lambda w: moved[names[id(w)]]))


@pytest.mark.parametrize("criterion", PER_DATA)
@pytest.mark.parametrize("network", NETWORKS)
def test_no_split_into_batches_changes_the_scores(network, criterion):
    scored = shared(network)
    whole = raw(scored, criterion, 7)
    for batch_size in (1, 2, 5):
        assert_same(raw(scored, criterion, batch_size), whole, 1e-11)


def test_a_program_of_fixed_batch_size_takes_its_runs_for_samples():
    scored = Scored("images")
    program = capture(scored.module, (scored.inputs[:2],), dynamic_batch=False)
    coupling = couple(program)
    groups = [g for g in coupling.groups if g.reason is None]
    found = scores(
        program, coupling, groups, "fisher", context=scored.context(4), aggregate="sum",
        normalise="none",
    )  # fmt: skip
    # Batches of 4 and 3 make two runs of 2 and one of 2; a rest of one sample is left out.
    runs_of = [(0, 1), (2, 3), (4, 5)]
    total = 0.0
    weight = scored.module.head.weight
    for numbers in runs_of:
        scored.module.zero_grad()
        sum(scored.sample_loss(scored.module, n) for n in numbers).backward()
        total = total + 0.5 * weight.detach() ** 2 * weight.grad**2 / 3
    group = next(k for k, g in enumerate(groups) if g.name == "hidden.weight[0]")
    assert (found[group] >= total.sum(0).numpy() * (1 - 1e-9)).all()


def test_an_infinite_loss_is_refused():
    scored = Scored("images")
    scored.inputs[0] = torch.inf
    with pytest.raises(UsageError, match="the loss on the calibration data is nan; repair"):
        raw(scored, "fisher")


@pytest.mark.parametrize("criterion", [*PER_DATA, "movement"])
def test_the_program_stays_as_it_is(criterion):
    scored = Scored("language")
    before = {name: (t.clone(), t._version) for name, t in scored.program.tensors().items()}
    raw(scored, criterion)
    for name, tensor in scored.program.tensors().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]
        assert tensor.grad is None


def test_a_program_captured_in_training_mode_keeps_its_statistics():
    scored = shared("images")
    program = capture(scored.module, (scored.inputs[:2],), train=True)
    names = ("bn.running_mean", "bn.running_var")
    before = [program.tensor(name).clone() for name in names]
    module = differentiable(program, ["stem.weight"])
    module(scored.inputs)[0].sum().backward()
    for name, value in zip(names, before, strict=True):
        assert torch.equal(program.tensor(name), value)
