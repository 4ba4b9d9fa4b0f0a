"""pruna-ir: a compiler for trained PyTorch models whose every pass states and proves its promise.

Names are imported on first use, so that ``import pruna_ir`` does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruna_ir.call import Call as Call
    from pruna_ir.capture import capture as capture
    from pruna_ir.data import Batch as Batch
    from pruna_ir.data import TensorData as TensorData
    from pruna_ir.data import load_data as load_data
    from pruna_ir.errors import PrunaError as PrunaError
    from pruna_ir.printer import print_program as print_program
    from pruna_ir.program import Program as Program
    from pruna_ir.program import TensorSpec as TensorSpec
    from pruna_ir.transform import (
        Context as Context,
    )
    from pruna_ir.transform import (
        Effect as Effect,
    )
    from pruna_ir.transform import (
        Pass as Pass,
    )
    from pruna_ir.transform import (
        Remark as Remark,
    )
    from pruna_ir.transform import (
        Rewrite as Rewrite,
    )
    from pruna_ir.transform import (
        apply as apply,
    )
    from pruna_ir.verify import verify as verify
    from pruna_ir.write_back import write_back as write_back

__version__ = "0.1.0"

_HOMES = {
    "Batch": "data",
    "Call": "call",
    "Context": "context",
    "Effect": "statements",
    "Pass": "transform",
    "Program": "program",
    "PrunaError": "errors",
    "Remark": "statements",
    "Rewrite": "rewrite",
    "TensorData": "data",
    "TensorSpec": "program",
    "apply": "transform",
    "capture": "capture",
    "load_data": "data",
    "print_program": "printer",
    "verify": "verify",
    "write_back": "write_back",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pruna_ir' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pruna_ir.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """This package: importing ``pruna_ir.capture`` must not hide the function ``capture``."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, unless it is a submodule under the name of something public."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
