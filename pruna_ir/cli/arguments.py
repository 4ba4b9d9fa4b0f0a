"""The arguments of ``pruna-opt``. Nothing heavy is imported here: ``--help`` must be quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruna_ir import __version__
from pruna_ir.cli.exit_codes import exit_code_table

_MODEL_HELP = (
    "file.pt2, file.py:factory, package.module:factory, torchvision:NAME, timm:NAME, "
    "hf:NAME{field=value}, or hf:FOLDER"
)

_EXAMPLES = """examples:
  pruna-opt run torchvision:resnet18 --preset int8 --target onnx --target openvino -o out
  pruna-opt run net.py:make --weights net.safetensors -p 'canonicalize,fold-batch-norm' -o out
  pruna-opt verify out/onnx out/program-onnx.pt2
  pruna-opt explain prune-channels
  pruna-opt explain-groups torchvision:resnet50 -o coupling.html
  pruna-opt explain-quantization out/program.pt2 --data images.npz
"""

_QUANTIZATION_EXAMPLES = """\
Two figures say what to do about a layer. Its own noise is what its rounded
weights and inputs cost on the spot: the culprits come first. Its accumulated
noise is against the float program, with what all layers before it cost. Six
decibels are one bit. Remedies for a culprit: other ranges (ranges=kl), leaving
it float (exclude=NAME), equalize-layers for weights, smooth-activations for
inputs with outliers.

examples:
  pruna-opt run net.py:make --preset int8 --data images.npz --target onnx -o out
  pruna-opt explain-quantization out/program.pt2 --data images.npz
  pruna-opt explain-quantization out/program.pt2 --data images.npz \\
      --artifact out/onnx -o noise.html

exit codes: see pruna-opt --help
"""

_GROUP_EXAMPLES = """A group holds channels that can only go together: filters, attention heads,
neurons, the residual width. The map shows for each what makes and what reads
its channels, and why channels stay where they must.

examples:
  pruna-opt explain-groups torchvision:resnet50
  pruna-opt explain-groups torchvision:vit_b_16 --kind heads --format json
  pruna-opt explain-groups net.py:make --filter 'layer3.*' -o coupling.html

exit codes: see pruna-opt --help
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="pruna-opt",
        description="A compiler for trained PyTorch models whose every pass proves its promise.",
        epilog=f"{_EXAMPLES}\nexit codes:\n{exit_code_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pruna-opt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_run, _verify, _list, _explain, _explain_groups, _explain_quantization, _replay,
                _bisect, _doctor):  # fmt: skip
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print data as JSON")
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


_Commands = argparse._SubParsersAction


def _command(
    commands: _Commands[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=text,
        epilog="exit codes: see pruna-opt --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=_MODEL_HELP)
    group = command.add_argument_group("the model")
    group.add_argument("--weights", type=Path, help=".safetensors or .pt file; tensors only")
    group.add_argument("--input-shape", action="append", default=[], metavar="NAME=2x3x224x224",
                       help="the shape of an example input, or NAME=2x64:int64")  # fmt: skip
    group.add_argument("--dynamic", action="append", default=[], metavar="NAME:AXIS=DIM",
                       help="a further dynamic dimension")  # fmt: skip
    group.add_argument("--static-batch", action="store_true", help="fix the batch size")
    group.add_argument("--seed", type=int, default=0, help="of everything random")


def _pipeline(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the pipeline")
    one = group.add_mutually_exclusive_group()
    one.add_argument("-p", "--pipeline", default="", metavar="TEXT",
                     help="passes, such as 'canonicalize,prune-channels{ratio=0.5}'")  # fmt: skip
    one.add_argument("--preset", help="a named pipeline; see pruna-opt list presets")
    group.add_argument("--data", type=Path, metavar="FILE.npz",
                       help="calibration data: one array per input, by name")  # fmt: skip
    group.add_argument("--batch-size", type=_positive, default=8, help="of data; default 8")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _run(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(commands, "run", "Run passes over a model and lower it to artifacts.")
    _model(command)
    _pipeline(command)
    command.add_argument("--no-check", action="store_true",
                         help="do not check what passes promise")  # fmt: skip
    command.add_argument("--stop-after", type=_positive, metavar="N", help="run N passes only")
    command.add_argument("--dump-ir", nargs=2, metavar=("before|after|changed", "FOLDER"),
                         help="write the IR around each pass, or what it changed")  # fmt: skip
    command.add_argument("--timing", action="store_true", help="log the seconds of each pass")
    command.add_argument(
        "--statistics", action="store_true", help="log which operators each pass added and removed"
    )
    command.add_argument("--remarks", action="store_true",
                         help="log what passes did, and near misses")  # fmt: skip
    group = command.add_argument_group("artifacts")
    group.add_argument("--target", action="append", default=[], metavar="BACKEND",
                       help="lower to this backend; repeatable; with options: "
                       "'tvm{cpu=x86-64-v3}'")  # fmt: skip
    group.add_argument("-o", "--out", type=Path, metavar="FOLDER",
                       help="artifacts, the program and report.json go here")  # fmt: skip
    group.add_argument("--require-verified", action="store_true",
                       help="exit with 8 where an artifact cannot be executed here")  # fmt: skip
    group.add_argument("--eval-data", type=Path, metavar="FILE.npz",
                       help="inputs and 'labels' for accuracy")  # fmt: skip
    group.add_argument("--repeats", type=int, default=100,
                       help="rounds of the latency measurement; 0 for none, "
                       "nor of layers")  # fmt: skip
    group.add_argument("--latency-batch", type=_positive, default=1,
                       help="the batch size whose latency is measured; default 1")  # fmt: skip
    group.add_argument("--threads", type=int, default=0,
                       help="threads of the runtimes; 0 leaves it to them")  # fmt: skip
    group.add_argument("--keep-program", action="store_true",
                       help="also write the captured program, as original.pt2")  # fmt: skip
    return command


def _verify(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "verify",
        "Compare an artifact with a saved program, or with another artifact.",
    )
    command.add_argument("artifact", type=Path, help="the folder of an artifact")
    command.add_argument("reference", type=Path, help="a .pt2 file, or an artifact's folder")
    command.add_argument("--data", type=Path, metavar="FILE.npz", help="inputs to compare on")
    command.add_argument("--batch-size", type=_positive, default=8, help="of data; default 8")
    command.add_argument("--seed", type=int, default=0, help="of the inputs")
    command.add_argument("--require-verified", action="store_true",
                         help="exit with 8 where an artifact cannot be executed here")  # fmt: skip
    return command


def _list(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(commands, "list", "List passes, backends and presets; imports none.")
    command.add_argument("what", nargs="?", choices=("passes", "backends", "presets"))
    return command


def _explain(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(
        commands, "explain", "Explain a pass, backend or preset, or 'exit-codes'."
    )
    command.add_argument("name")
    return command


def _explain_groups(
    commands: _Commands[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    command = _command(
        commands, "explain-groups", "Show which channels of a model must be pruned together."
    )
    command.epilog = _GROUP_EXAMPLES
    _model(command)
    command.add_argument(
        "-p", "--pipeline", default="canonicalize", metavar="TEXT",
        help="passes to run before, unchecked; default canonicalize",
    )  # fmt: skip
    group = command.add_argument_group("what is shown, and how")
    group.add_argument("--filter", action="append", default=[], metavar="GLOB",
                       help="groups with a tensor or layer of this name; repeatable")  # fmt: skip
    group.add_argument("--kind", action="append", default=[], metavar="KIND",
                       help="groups of this kind: conv, heads, head-size, ffn, width, other; "
                       "repeatable")  # fmt: skip
    group.add_argument("--format", choices=("table", "json", "html"),
                       help="default: by the ending of FILE, else a table")  # fmt: skip
    group.add_argument("-o", "--out", type=Path, metavar="FILE",
                       help="write here; .html is a drawing to open in a browser")  # fmt: skip
    return command


def _explain_quantization(
    commands: _Commands[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "explain-quantization",
        "Show what quantisation costs at each layer of a program, the worst first.",
    )
    command.epilog = _QUANTIZATION_EXAMPLES
    command.add_argument("program", type=Path, help="a quantised program that was saved as .pt2")
    command.add_argument("--data", type=Path, required=True, metavar="FILE.npz",
                         help="inputs to run it on: one array per input, by name")  # fmt: skip
    command.add_argument("--batch-size", type=_positive, default=8, help="of data; default 8")
    command.add_argument("--samples", type=_positive, default=32,
                         help="how many samples to run at most; default 32")  # fmt: skip
    command.add_argument("--reference", type=Path, metavar="FLOAT.pt2",
                         help="the program right before its quantisation; default: this one "
                         "without its fake-quants")  # fmt: skip
    command.add_argument("--artifact", type=Path, metavar="FOLDER",
                         help="an artifact of the program: what its kernels run in")  # fmt: skip
    command.add_argument("--format", choices=("table", "json", "html"),
                         help="default: by the ending of FILE, else a table")  # fmt: skip
    command.add_argument("-o", "--out", type=Path, metavar="FILE",
                         help="write here; .html is a page to open in a browser")  # fmt: skip
    return command


def _replay(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "replay",
        "Repeat a failure from a reproducer folder; exits as the failure does.",
    )
    command.add_argument("folder", type=Path)
    return command


def _bisect(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "bisect",
        "Find the first pass whose promise does not hold, and its first diverging node.",
    )
    _model(command)
    _pipeline(command)
    command.add_argument("--target", default="", metavar="BACKEND",
                         help="the backend that passes are to quantise for")  # fmt: skip
    return command


def _doctor(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    return _command(
        commands,
        "doctor",
        "Show what is installed, what each backend lacks and how to get it.",
    )
