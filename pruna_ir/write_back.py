"""Write-back: a program's tensors into the user's own ``nn.Module``, so that its class stays.

Tensors go where their names say; the size attributes of the modules that own them follow
(``in_channels``, ``num_features``, ``num_heads``...). All of it is done to a copy first, which
then runs on the program's inputs, both lifted to float64. Only when outputs agree is the module
itself changed. What a module's class cannot express (a folded batch norm, fake-quant parameters,
shapes written into ``forward``) is thereby an error and never a module that computes
something else.

Limits: a configuration that the module keeps beside its sizes (``model.config``) stays as it was;
save the module's ``state_dict`` with the program rather than rebuild the class from it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pruna_ir.call import bind_arguments
from pruna_ir.equivalence import LIFTED_TOLERANCE, differences, run_float64
from pruna_ir.errors import PassError, VerificationError
from pruna_ir.program import Program
from pruna_ir.stimuli import stimuli

_SHOWN = 5
_IN_THE_CODE = re.compile(r"(.*\.)?lifted_tensor_\d+")
"""torch.export's names of constants that stand in ``forward``, as ``x[0] = 1`` has in torch 2.14.

The class holds them itself; where a pass changed one, the module computes something else.
"""


def write_back(
    program: Program,
    module: nn.Module,
    *,
    kwargs: Mapping[str, Any] | None = None,
    call: Callable[[nn.Module, Sequence[torch.Tensor]], Any] | None = None,
) -> None:
    """Give a module the tensors of a program that was made from it.

    Args:
        program: pruned, trained or otherwise changed in ways that the module's class can express.
        module: the module that was captured, or one of its class; changed in place, or not at
            all where an error is raised. It keeps its train or eval mode.
        kwargs: further arguments that are no tensors, as given at capture (``use_cache=False``).
        call: how to call the module with the program's inputs, where they are not its arguments
            one by one (lists or dicts of tensors).

    Raises:
        PassError: the program has tensors for which the module has no place; they are listed.
        VerificationError: with the program's tensors, the module computes something else.

    >>> from pruna_ir import capture
    >>> net = nn.Linear(3, 2)
    >>> program = capture(net, (torch.ones(2, 3),))
    >>> other = nn.Linear(3, 2)
    >>> write_back(program, other)
    >>> torch.equal(net.weight, other.weight)
    True
    """
    trial = copy.deepcopy(module)
    _put(program, trial)
    _verify(program, trial, call or partial(_call, program, kwargs=dict(kwargs or {})))
    _put(program, module)


def _put(program: Program, module: nn.Module) -> None:
    held = program.tensors()
    tensors = {name: held[name] for name in held if not _IN_THE_CODE.fullmatch(name)}
    homeless = [name for name in tensors if not _has_place(module, name)]
    if homeless:
        raise PassError(
            f"{type(module).__name__} has no place for {_listed(homeless)}; write the program "
            "back before passes that add tensors (fold-batch-norm, insert-fake-quant), or keep "
            "the program"
        )
    changed: dict[str, None] = {}
    shared: dict[int, nn.Parameter] = {}
    others = _other_names(module)
    for name, tensor in tensors.items():
        for alias in [name, *(n for n in others.get(name, ()) if n not in tensors)]:
            owner, leaf = _owner(module, alias)
            if tuple(getattr(owner, leaf).shape) != tuple(tensor.shape):
                changed[alias.rpartition(".")[0]] = None
            _assign(owner, leaf, tensor, shared)
    grouped = _groups(program)
    for path in changed:
        _update_sizes(module.get_submodule(path), grouped.get(path))
    for child in module.modules():
        _update_attention(child)


def _other_names(module: nn.Module) -> dict[str, list[str]]:
    """The names under which a module has the tensor of a name once more (tied weights); a
    program reads it under one of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return {name: [n for n in same if n != name] for same in names.values() for name in same}


def _has_place(module: nn.Module, name: str) -> bool:
    try:
        owner, leaf = _owner(module, name)
    except AttributeError:
        return False
    return isinstance(getattr(owner, leaf, None), torch.Tensor)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _assign(
    owner: nn.Module, leaf: str, tensor: torch.Tensor, shared: dict[int, nn.Parameter]
) -> None:
    """Put a copy of a tensor; a parameter stays one, tied ones stay tied."""
    old = getattr(owner, leaf)
    if not isinstance(old, nn.Parameter):
        setattr(owner, leaf, tensor.detach().clone().to(old.device))
        return
    if id(tensor) not in shared:
        value = tensor.detach().clone().to(old.device)
        shared[id(tensor)] = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, leaf, shared[id(tensor)])


def _groups(program: Program) -> dict[str, int]:
    """The ``groups`` argument of each convolution (or of group norms), by its module's path."""
    found: dict[str, int] = {}
    for node in program.calls():
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        bound = bind_arguments(node)
        groups = bound.get("groups", bound.get("num_groups"))
        weight = bound.get("weight")
        if isinstance(groups, int) and isinstance(weight, fx.Node) and weight.op == "get_attr":
            found[str(weight.target).rpartition(".")[0]] = groups
    return found


# -- size attributes -----------------------------------------------------------------------


def _update_sizes(module: Any, groups: int | None) -> None:
    """Set the size attributes of a module whose tensors have new shapes."""
    for kinds, update in _SIZES:
        if isinstance(module, kinds):
            update(module, groups)
            return
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        # transformers' Conv1D is a linear layer with its weight the other way round.
        sizes = module.weight.shape
        _set(module, nx=sizes[0], nf=sizes[1])


def _set(module: nn.Module, **sizes: Any) -> None:
    for name, value in sizes.items():
        if hasattr(module, name):
            setattr(module, name, value)


def _conv(module: Any, groups: int | None) -> None:
    groups = groups or module.groups
    out, inner = module.weight.shape[:2]
    _set(module, groups=groups, out_channels=out, in_channels=inner * groups)


def _conv_transpose(module: Any, groups: int | None) -> None:
    groups = groups or module.groups
    inner, out = module.weight.shape[:2]
    _set(module, groups=groups, in_channels=inner, out_channels=out * groups)


def _linear(module: Any, _groups: int | None) -> None:
    out, inner = module.weight.shape
    _set(module, in_features=inner, out_features=out)


def _norm(module: Any, _groups: int | None) -> None:
    affine = module.weight if module.weight is not None else module.running_mean
    _set(module, num_features=affine.shape[0])


def _layer_norm(module: Any, _groups: int | None) -> None:
    _set(module, normalized_shape=tuple(module.weight.shape))


def _group_norm(module: Any, groups: int | None) -> None:
    _set(module, num_channels=module.weight.shape[0], num_groups=groups or module.num_groups)


def _embedding(module: Any, _groups: int | None) -> None:
    rows, columns = module.weight.shape
    _set(module, num_embeddings=rows, embedding_dim=columns)


def _multihead(module: Any, _groups: int | None) -> None:
    width = module.out_proj.weight.shape[0]
    _set(module, embed_dim=width, kdim=width, vdim=width, head_dim=width // module.num_heads)


def _prelu(module: Any, _groups: int | None) -> None:
    _set(module, num_parameters=module.weight.shape[0])


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_SIZES: tuple[tuple[tuple[type, ...], Callable[[Any, int | None], None]], ...] = (
    (_TRANSPOSED, _conv_transpose),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    ((nn.Linear,), _linear),
    (_NORMS, _norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.MultiheadAttention,), _multihead),
    ((nn.PReLU,), _prelu),
)


def _update_attention(module: Any) -> None:
    """Head counts of attention classes, from the width of their projections."""
    if isinstance(module, nn.MultiheadAttention):
        return
    for names, update in _ATTENTION:
        if all(hasattr(module, name) for name in names):
            update(module)
            return


def _bert(module: Any) -> None:
    width = module.query.weight.shape[0]
    heads = width // module.attention_head_size
    _set(module, all_head_size=width, num_attention_heads=heads)


def _gpt2(module: Any) -> None:
    width = module.c_attn.weight.shape[1] // 3
    _set(module, split_size=width, num_heads=width // module.head_dim)


def _llama(module: Any) -> None:
    queries, keys = module.q_proj.weight.shape[0], module.k_proj.weight.shape[0]
    _set(module, num_key_value_groups=queries // keys)


def _timm(module: Any) -> None:
    width = module.qkv.weight.shape[0] // 3
    _set(module, num_heads=width // module.head_dim, attn_dim=width)


def _swin(module: Any) -> None:
    _set(module, num_heads=module.relative_position_bias_table.shape[-1])


# The attributes by which an attention class is known, and what sets its numbers of heads.
_ATTENTION: tuple[tuple[tuple[str, ...], Callable[[Any], None]], ...] = (
    (("query", "attention_head_size", "num_attention_heads", "all_head_size"), _bert),
    (("c_attn", "split_size", "num_heads", "head_dim"), _gpt2),
    (("q_proj", "k_proj", "num_key_value_groups"), _llama),
    (("qkv", "num_heads", "head_dim"), _timm),
    (("qkv", "num_heads", "relative_position_bias_table"), _swin),
)


# -- verification --------------------------------------------------------------------------


def _verify(
    program: Program,
    module: nn.Module,
    call: Callable[[nn.Module, Sequence[torch.Tensor]], Any],
) -> None:
    module.eval().double()
    for child in module.modules():
        if isinstance(child, nn.RMSNorm) and child.eps is None:
            # Its default would follow the precision; the program has that of float32.
            child.eps = torch.finfo(torch.float32).eps
    for stimulus in stimuli(program):
        truth = run_float64(program, stimulus.inputs)
        lifted = [x.double() if x.is_floating_point() else x for x in stimulus.inputs]
        try:
            with torch.no_grad(), _InFloat64():
                actual = _tensors(call(module, lifted))
        except Exception as error:
            lines = str(error).splitlines() or [""]
            raise VerificationError(
                f"with the program's tensors, {type(module).__name__} does not run "
                f"({type(error).__name__}: {lines[0]}); shapes are written into its code. "
                "Nothing was changed; keep the program, or adapt the class"
            ) from error
        measured = max(differences(actual, truth))
        if not measured <= LIFTED_TOLERANCE:
            raise VerificationError(_difference(program, module, measured, stimulus.kind))


_LOW = (torch.float32, torch.bfloat16, torch.float16)


class _InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 where a module asks for a lower precision, as the program does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator with float64 for every lower floating-point dtype."""
        named = {
            key: torch.float64 if value in _LOW else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **named)


def _difference(program: Program, module: nn.Module, error: float, kind: str) -> str:
    read = set(program.tensors())
    unread = [name for name, _ in module.named_parameters() if name not in read]
    why = (
        f"; the program no longer reads {_listed(unread)}: what folds or fuses them has no form "
        "in the module's class, so write back before it"
        if unread
        else "; the passes since capture changed more than tensors"
    )
    return (
        f"with the program's tensors, {type(module).__name__} computes something else (relative "
        f"error {error:.3g} on stimulus '{kind}'){why}. Nothing was changed"
    )


def _call(
    program: Program, module: nn.Module, inputs: Sequence[torch.Tensor], kwargs: dict[str, Any]
) -> Any:
    parameters = inspect.signature(module.forward).parameters
    names = [spec.name for spec in program.inputs]
    if all(name in parameters for name in names):
        return module(**dict(zip(names, inputs, strict=True)), **kwargs)
    return module(*inputs, **kwargs)


def _tensors(returned: Any) -> list[torch.Tensor]:
    leaves: Any = returned
    with suppress(AttributeError):
        # A ModelOutput of transformers; its empty fields are left out.
        leaves = tuple(returned.to_tuple())
    return [leaf for leaf in pytree.tree_leaves(leaves) if isinstance(leaf, torch.Tensor)]


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{', '.join(found[:_SHOWN])}{more}"
