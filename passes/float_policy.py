"""Which operators compute in bfloat16 or float16 without harm, and which stay in float32.

Three kinds of calls on float32 tensors:

    lower    products, convolutions, pointwise arithmetic: rounded results, float32 sums inside
    follow   what moves or selects values: exact in any dtype, takes that of its operands
    keep     norms, softmax, sums, means, exponentials, powers, losses: small differences of large
             numbers, or results beyond the dtype's range

The list of what stays is that of ``torch.autocast`` (``AT_FORALL_FP32`` and
``AT_FORALL_FP32_SET_OPT_DTYPE`` in ATen/autocast_mode.h), with means, variances, unfolded batch
norms and recurrent layers added. Beyond it stay:

    angles     what sine and cosine read, where it is computed from positions and constants alone:
               bfloat16 has no 257, and rotary embeddings count further
    in between arithmetic whose operands and readers all stay, such as ``mean(x**2) + eps``
    comparisons and indices, whose ties rounding would change
    operators of third parties
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program
from pruna_ir.quantization import MOVERS, PARTS

aten = torch.ops.aten

_KEEP = frozenset(
    {
        "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
        "reciprocal", "rsqrt", "sinh", "tan", "pow", "softplus", "layer_norm",
        "native_layer_norm", "rms_norm", "group_norm", "native_group_norm",
        "frobenius_norm", "nuclear_norm", "cosine_similarity", "poisson_nll_loss",
        "cosine_embedding_loss", "nll_loss", "nll_loss2d", "nll_loss_nd",
        "cross_entropy_loss", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss",
        "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss",
        "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "dist", "pdist",
        "cdist", "renorm", "logsumexp", "upsample_linear1d", "upsample_bilinear2d",
        "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d",
        "_upsample_bicubic2d_aa", "prod", "softmax", "_softmax", "log_softmax",
        "_log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm",
        "norm", "sum", "mean", "var", "std", "var_mean", "std_mean", "batch_norm",
        "instance_norm", "cos", "sin", "lstm", "gru", "rnn_tanh", "rnn_relu",
        "grid_sampler", "grid_sampler_2d",
    }
)  # fmt: skip
_FOLLOW = frozenset(
    {
        "relu", "neg", "abs", "hardtanh", "amax", "amin", "max", "min", "maximum",
        "minimum", "where", "masked_fill", "index", "gather", "index_select", "slice",
        "select", "narrow", "roll", "flip", "repeat", "repeat_interleave", "stack", "topk",
        "sort", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "tril",
        "triu", "diagonal", "unfold", "split", "split_with_sizes", "chunk", "unbind",
        "getitem",
    }
)  # fmt: skip
_ANGLES = (aten.cos.default, aten.sin.default)
_BETWEEN = frozenset(["add", "sub", "mul", "div", "sqrt"])


def short_name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    if node.target is operator.getitem:
        return "getitem"
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def float_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that are, or hold, float32 tensors."""
    return [source for source in node.all_input_nodes if is_float32(source)]


def is_float32(node: fx.Node) -> bool:
    """Whether a value is a float32 tensor, or holds one."""
    return any(value.dtype is torch.float32 for value in tensors_of(node))


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The tensors of a node's value."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def follows(node: fx.Node) -> bool:
    """Whether a call gives out values of its operands only, whatever their dtype."""
    if node.op != "call_function" or not is_float32(node):
        return False
    return node.target in MOVERS | PARTS or short_name(node) in _FOLLOW


def why_kept(node: fx.Node) -> str:
    """Why a call stays in float32 by itself; empty where it need not."""
    name = short_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in ("aten", "pruna"):
            return "its operator is not known to work in other dtypes"
        if bind_arguments(node).get("dtype") is not None or name in ("to", "_to_copy"):
            return "it asks for a dtype itself"
    if name in _KEEP:
        return f"{name} loses too much in a lower precision"
    if not is_float32(node):
        return "rounding would change what it compares"
    return ""


def lowered(program: Program) -> set[fx.Node]:
    """The calls that compute in the lower precision; those that follow are not among them."""
    candidates = [n for n in program.calls() if float_operands(n) and not follows(n)]
    chosen = {node for node in candidates if not why_kept(node)}
    chosen -= _angles(program)
    kept = set(candidates) - chosen
    for node in candidates:
        if node in chosen and short_name(node) in _BETWEEN and _between(node, kept):
            chosen.discard(node)
            kept.add(node)
    return chosen


def _between(node: fx.Node, kept: set[fx.Node]) -> bool:
    """Whether a call's operands and readers all stay in float32, and so it can stay as well."""
    makers = [s for s in float_operands(node) if s.op == "call_function"]
    readers = list(node.users)
    return bool(makers and readers) and all(n in kept for n in (*makers, *readers))


def _angles(program: Program) -> set[fx.Node]:
    """What sine and cosine read, as far as only positions and constants stand behind it."""
    found: set[fx.Node] = set()
    for node in program.calls(*_ANGLES):
        behind = set(_ancestors(node))
        if not any(_carries_data(n) for n in behind):
            found |= behind
    return found


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += current.all_input_nodes
            yield current


def _carries_data(node: fx.Node) -> bool:
    """Whether a node is a float input, or a look-up in an embedding."""
    if node.op == "placeholder":
        return is_float32(node)
    target: Any = node.target
    return node.op == "call_function" and target is aten.embedding.default
