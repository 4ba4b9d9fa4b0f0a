"""Dead elements under elementwise operators, layout operators, indexing and windows over space.

An elementwise result is alive where all operands are. An operator that gives elements another
place gives their masks that place too, whatever axis they are dead along (``flip``, ``roll``).
A window over space keeps the channels' masks, and refuses space that is dead in part.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.masked_operators import (
    Handler,
    Masked,
    Operands,
    all_alive,
    lift,
    masked,
    tensors,
    uniform,
    whole,
    wrap,
)

aten = torch.ops.aten

# -- elementwise -----------------------------------------------------------------------------


def elementwise(operands: Operands) -> Any:
    """Alive where all operands are."""
    alive = torch.ones((), dtype=torch.bool)
    for operand in tensors(operands):
        alive = alive & operand.mask
    return all_alive(operands.call(), alive)


def first(operands: Operands) -> Masked:
    """Only the first tensor's elements count (``to``, ``type_as``, ``fill``)."""
    return masked(lift(operands.call()), tensors(operands)[0].mask)


def _last(operands: Operands) -> Masked:
    """The second tensor's elements in the place of the first's (``copy``)."""
    return masked(lift(operands.call()), tensors(operands)[-1].mask)


def _created(operands: Operands) -> Any:
    """A new tensor that takes no more than the dtype of its operand."""
    return wrap(operands.call())


def _glu(operands: Operands) -> Masked:
    a, b = operands["self"].mask.chunk(2, operands["dim"])
    return masked(lift(operands.call()), a & b)


def _view_as_complex(operands: Operands) -> Masked:
    """Real and imaginary part are one element: both must be alive, or none."""
    alive = uniform(operands, operands["self"].mask, [-1]).squeeze(-1)
    return masked(lift(operands.call()), alive)


def _view_as_real(operands: Operands) -> Masked:
    return masked(lift(operands.call()), operands["self"].mask.unsqueeze(-1))


# -- places ----------------------------------------------------------------------------------


def _masks(value: Any) -> Any:
    """The masks of a tensor or of a list of tensors, as tensors that are alive themselves."""
    if isinstance(value, (tuple, list)):
        return [_masks(item) for item in value]
    return Masked(value.mask) if isinstance(value, Masked) else value


def _moved(operands: Operands, changed: dict[str, Any]) -> Any:
    """The operator on values, and on masks in the place of some arguments."""
    values, alive = operands.call(), operands.call(changed=changed)
    if isinstance(values, (tuple, list)):
        return tuple(masked(lift(v), a) for v, a in zip(values, alive, strict=True))
    return masked(lift(values), alive)


def layout(operands: Operands) -> Any:
    """The operator moves the elements of its first argument: it moves their masks alike."""
    name, moved = next(iter(operands.arguments.items()))
    whole(operands, "index", "repeats")
    return _moved(operands, {name: _masks(moved)})


def _placed(operands: Operands) -> Any:
    """Elements of one tensor put among those of another (``slice_scatter``, ``index_put``)."""
    whole(operands, "index", "indices", "mask")
    if operands.get("accumulate") or operands.get("reduce"):
        raise operands.refuse("adds to removed channels, and what that gives is not defined")
    changed = {
        name: _masks(operands[name])
        for name in ("self", "src", "source", "values", "value")
        if isinstance(operands.get(name), Masked)
    }
    if not isinstance(operands.get("value"), Masked):
        changed["value"] = True
    return _moved(operands, changed)


def _gather(operands: Operands) -> Masked:
    """The element that each index names: alive where it is and where the index is."""
    value, alive = operands.call(), operands.call(changed={"self": _masks(operands["self"])})
    return masked(lift(value), alive & operands["index"].mask)


def _take_along(operands: Operands) -> Any:
    whole(operands, "indices")
    return _moved(operands, {"self": _masks(operands["self"])})


def _index(operands: Operands) -> Masked:
    whole(operands, "indices")
    value = operands.call()
    indices = [i.value if isinstance(i, Masked) else i for i in operands["indices"]]
    return masked(lift(value), aten.index.Tensor(operands["self"].mask, indices))


def _embedding(operands: Operands) -> Masked:
    whole(operands, "indices")
    return masked(
        lift(operands.call()), operands["weight"].mask[operands["indices"].value]
    )


def _pad(operands: Operands) -> Masked:
    value = lift(operands.call())
    if operands.get("mode") not in (None, "constant"):
        # Reflected and repeated elements take their masks along.
        moved = operands.call(lambda m: m.mask.to(torch.float64))
        return masked(value, moved > 0.5)
    alive, pad = operands["self"].mask, operands["pad"]
    for k in range(0, len(pad), 2):
        # A line of which nothing is alive is not there to be padded.
        dim = alive.dim() - 1 - k // 2
        line, sides = alive.any(dim, keepdim=True), [0] * k + list(pad[k : k + 2])
        alive = aten.constant_pad_nd.default(alive, sides, True) & line  # noqa: FBT003
    return masked(value, alive)


# -- windows over space ----------------------------------------------------------------------


def _windowed(spatial: int) -> Handler:
    """A window over the last dimensions, along which all or nothing is alive."""

    def handler(operands: Operands) -> Any:
        x = tensors(operands)[0]
        return all_alive(operands.call(), uniform(operands, x.mask, range(-spatial, 0)))

    return handler


def _grid_sampler(operands: Operands) -> Masked:
    """Samples of [N, C, ...space]: the channels' masks stay, the grid must be alive."""
    whole(operands, "grid")
    x = operands["input"]
    alive = uniform(operands, x.mask, range(2, x.value.dim()))
    return masked(lift(operands.call()), alive)


def _im2col(operands: Operands) -> Masked:
    """[.., C, H, W] to [.., C * taps, positions]: each channel becomes its taps."""
    alive = uniform(operands, operands["self"].mask, [-2, -1]).squeeze(-1)
    taps = _taps(operands)
    return masked(lift(operands.call()), alive.repeat_interleave(taps, -2))


def _col2im(operands: Operands) -> Masked:
    """[.., C * taps, positions] to [.., C, H, W]: a channel's taps live or die together."""
    alive = uniform(operands, operands["self"].mask, [-1])
    split = alive.reshape(*alive.shape[:-2], -1, _taps(operands), 1)
    line = uniform(operands, split, [-2]).squeeze(-2)
    return masked(lift(operands.call()), line.unsqueeze(-1))


def _taps(operands: Operands) -> int:
    kernel = operands["kernel_size"]
    return int(kernel[0]) * int(kernel[-1])


_LAYOUT = (
    "reshape view _unsafe_view unflatten flatten permute transpose swapaxes swapdims t mT numpy_T "
    "movedim slice narrow select index_select split split_with_sizes chunk tensor_split "
    "unsafe_split unbind cat concat stack squeeze unsqueeze expand expand_as broadcast_to repeat "
    "tile repeat_interleave flip roll ravel channel_shuffle native_channel_shuffle pixel_shuffle "
    "pixel_unshuffle unfold diagonal reshape_as view_as"
)
_PLACED = (
    "slice_scatter select_scatter diagonal_scatter masked_scatter scatter index_put index_copy"
)
_ELEMENTWISE = (
    "hardswish dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout clone "
    "contiguous alias detach lift_fresh lift_fresh_copy __and__ __or__ __xor__ bitwise_not where "
    "masked_fill zeros_like ones_like full_like empty_like rand_like randn_like nan_to_num "
    "hardsigmoid log_sigmoid real imag complex polar _weight_norm fake_quantize_per_tensor_affine"
)
_FIRST = "to _to_copy type_as fill"
_CREATED = "new_zeros new_ones new_full new_empty"
_WINDOWS = {
    1: "max_pool1d max_pool1d_with_indices avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d "
       "upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d reflection_pad1d "
       "replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d "
       "_adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d upsample_bicubic2d "
       "_upsample_nearest_exact2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
       "reflection_pad2d replication_pad2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d "
       "_adaptive_avg_pool3d upsample_trilinear3d upsample_nearest3d _upsample_nearest_exact3d "
       "reflection_pad3d replication_pad3d",
}  # fmt: skip

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": layout for name in _LAYOUT.split()},
    **{f"aten::{name}": _placed for name in _PLACED.split()},
    **{f"aten::{name}": elementwise for name in _ELEMENTWISE.split()},
    **{f"aten::{name}": first for name in _FIRST.split()},
    **{f"aten::{name}": _created for name in _CREATED.split()},
    **{f"aten::{name}": _windowed(n) for n, names in _WINDOWS.items() for name in names.split()},
    "aten::copy": _last,
    "aten::glu": _glu,
    "aten::view_as_complex": _view_as_complex,
    "aten::view_as_real": _view_as_real,
    "aten::gather": _gather,
    "aten::take_along_dim": _take_along,
    "aten::index": _index,
    "aten::embedding": _embedding,
    "aten::pad": _pad,
    "aten::constant_pad_nd": _pad,
    **dict.fromkeys(
        ("aten::grid_sampler", "aten::grid_sampler_2d", "aten::grid_sampler_3d"), _grid_sampler
    ),
    "aten::im2col": _im2col,
    "aten::col2im": _col2im,
}
"""Operator name without overload to what it computes where elements are dead."""
