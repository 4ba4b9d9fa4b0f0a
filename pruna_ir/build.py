"""Building: from a Program to a verified artifact on disk, and back from disk to something to run.

    unsupported nodes? -> lower -> manifest -> load -> certify -> certificate -> rename

Everything happens in a temporary folder beside the destination, which is renamed at the very end:
no folder ever stands there without its manifest and certificate, and one that was there before
stays until the new one is whole. A folder that is no artifact is never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pruna_ir.certify import Certificate, certify, not_run
from pruna_ir.errors import ToolchainError, UnsupportedError, UsageError, VerificationError
from pruna_ir.lowering import (
    CERTIFICATE,
    MANIFEST,
    Backend,
    LoadOptions,
    Lowered,
    Manifest,
    Offender,
    Runner,
    Verdict,
    make_manifest,
    whole_folder,
    write_json,
)
from pruna_ir.options import make_backend
from pruna_ir.program import Program
from pruna_ir.registry import find_backend
from pruna_ir.transform import Context

SHOWN_OFFENDERS = 20


@dataclass(frozen=True)
class Artifact:
    """A whole artifact on disk."""

    folder: Path
    manifest: Manifest
    certificate: Certificate

    def load(self, options: LoadOptions | None = None) -> Runner:
        """The artifact, loaded to run.

        Raises:
            ToolchainError: it cannot be executed on this machine.
        """
        return find_backend(self.manifest.backend).load(self.folder, options or LoadOptions())

    def size(self) -> int:
        """The bytes of the artifact's files, without manifest and certificate."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)


def build(
    program: Program,
    backend: str | Backend,
    out: Path,
    context: Context | None = None,
    *,
    verify: bool = True,
    require_verified: bool = False,
    keep_failed: bool = False,
    options: LoadOptions | None = None,
) -> Artifact:
    """Lower a program into an artifact at ``out`` and certify it.

    Args:
        program: what to lower.
        backend: a backend, or its registered name, with options as in ``tvm{cpu=x86-64-v3}``.
        out: the artifact's folder; replaced where it is an artifact or empty.
        context: its data, where there is any, serves as stimulus as well.
        verify: load the artifact and compare it with the program.
        require_verified: a verdict of NOT_RUN is an error.
        keep_failed: leave an artifact whose certificate says FAILED at ``out`` and return it.
        options: how the artifact is loaded for the comparison.

    Raises:
        UsageError: ``out`` holds something that is no artifact, or the backend is unknown.
        ToolchainError: what the backend needs to build is missing, or the artifact cannot be
            verified here and ``require_verified`` is set.
        UnsupportedError: the backend cannot lower some nodes; all are named.
        LoweringError: the backend's tool refused the program or its own file.
        VerificationError: the artifact does not compute what the program does.
    """
    context = context or Context()
    chosen = make_backend(backend) if isinstance(backend, str) else backend
    if require_verified and not verify:
        raise UsageError("require_verified without verify can never hold; drop one of them")
    check_destination(out)
    _check_buildable(chosen, program)
    with whole_folder(out) as folder:
        lowered = chosen.lower(program, folder, context)
        manifest = make_manifest(chosen.name, program, folder, lowered)
        write_json(folder / MANIFEST, manifest)
        certificate = (
            _certificate(chosen, program, folder, lowered, context, options or LoadOptions())
            if verify
            else not_run(program, "verification was not asked for", seed=context.seed)
        )
        write_json(folder / CERTIFICATE, certificate.to_json())
        if not keep_failed:
            _enforce(chosen.name, certificate, require_verified=require_verified)
    return Artifact(out, manifest, certificate)


def open_artifact(folder: Path) -> Artifact:
    """An artifact from disk, every file checked against its sha256.

    Raises:
        LoweringError: there is no whole artifact in the folder.
    """
    return Artifact(folder, Manifest.read(folder), Certificate.read(folder))


def check_destination(out: Path) -> None:
    """Refuse a destination that holds anything but an artifact.

    Raises:
        UsageError: it is a file, or a folder of something else.
    """
    if out.is_dir():
        if not any(out.iterdir()) or _looks_like_artifact(out):
            return
        raise UsageError(
            f"{out} holds files that are no artifact of pruna-ir and will not be replaced; give "
            "another folder, or empty it"
        )
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} is not a folder; give a folder for the artifact")


def _looks_like_artifact(folder: Path) -> bool:
    """Whether a folder holds a manifest and nothing that the manifest does not name."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    ours = {*files, MANIFEST, CERTIFICATE}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return there <= ours


def _check_buildable(backend: Backend, program: Program) -> None:
    if missing := backend.availability().build:
        raise ToolchainError(f"backend '{backend.name}' cannot build here: {missing}")
    if offenders := backend.unsupported(program):
        raise UnsupportedError(describe_offenders(backend.name, offenders))


def describe_offenders(backend: str, offenders: Sequence[Offender]) -> str:
    """One screen that names the nodes which a backend cannot lower."""
    kinds = sorted({offender.operator for offender in offenders})
    lines = [
        f"backend '{backend}' cannot lower {len(offenders)} nodes of the program "
        f"({len(kinds)} operators: {', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''})",
        *(f"  {offender}" for offender in offenders[:SHOWN_OFFENDERS]),
    ]
    if len(offenders) > SHOWN_OFFENDERS:
        lines.append(f"  ... and {len(offenders) - SHOWN_OFFENDERS} more")
    lines.append("replace these operators in the model, or choose another backend")
    return "\n".join(lines)


def _certificate(
    backend: Backend,
    program: Program,
    folder: Path,
    lowered: Lowered,
    context: Context,
    options: LoadOptions,
) -> Certificate:
    """The certificate of freshly lowered files, at the highest level that can be reached here."""
    try:
        runner, level, reason = backend.load(folder, options), "executed", ""
    except ToolchainError as error:
        reason, level = str(error), "intermediate"
        load = getattr(backend, "load_intermediate", None)
        intermediate: Runner | None = load(folder, options) if load is not None else None
        if intermediate is None:
            return not_run(program, reason, seed=context.seed)
        runner = intermediate
    certificate = certify(
        program, runner, data=context.data, seed=context.seed, level=level, fixed=lowered.fixed
    )
    if level == "executed" or certificate.verdict is not Verdict.PASSED:
        return certificate
    # The artifact itself did not run: what it was built from is right, no more is known.
    return replace(
        certificate,
        verdict=Verdict.NOT_RUN,
        reason=f"{reason}; the file that it was built from was verified: {certificate.worst()}",
    )


def _enforce(backend: str, certificate: Certificate, *, require_verified: bool) -> None:
    if certificate.verdict is Verdict.FAILED:
        raise VerificationError(
            f"the {backend} artifact does not compute what the program computes: "
            f"{certificate.reason}; nothing was written (keep_failed leaves it for a look)"
        )
    if certificate.verdict is Verdict.NOT_RUN and require_verified:
        raise ToolchainError(
            f"the {backend} artifact cannot be verified here: {certificate.reason}; nothing was "
            "written"
        )
