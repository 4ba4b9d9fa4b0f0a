"""``.ci/run`` executes the README's own commands in a fresh clone and environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.wheels import ROOT

INSTALL_AND_RUN = "<!-- ci: install-and-run -->"
INSTALL_AND_TEST = "<!-- ci: install-and-test -->"

README = f"""# A repository

{INSTALL_AND_RUN}
```sh
echo the first block
```

{INSTALL_AND_TEST}
```sh
pwd
python -c 'import sys; print(sys.prefix)'
echo '2 failed, 31 passed in 4.20s'
false
echo never reached
```
"""


def ci(repository: Path, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a repository's ``.ci/run`` with its temporary folders in ``place``."""
    environment = {**os.environ, "TMPDIR": str(place)}
    command = [str(repository / ".ci" / "run"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def repository(root: Path) -> Path:
    """A small repository with our ``.ci/run`` and a README whose tests fail."""
    (root / ".ci").mkdir(parents=True)
    shutil.copy2(ROOT / ".ci" / "run", root / ".ci" / "run")
    (root / "README.md").write_text(README, encoding="utf-8")
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def test_a_failing_command_fails_the_run_and_nothing_is_left(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    ran = ci(repository(tmp_path / "repository"), place)
    assert ran.returncode == 1
    lines = ran.stdout.splitlines()
    clone, prefix = (Path(line) for line in lines if line.startswith(str(place)))
    assert clone.name == "clone"
    assert prefix.parent == clone.parent
    assert lines[-2:] == ["2 failed, 31 passed in 4.20s", "exit status 1"]
    assert "never reached" not in lines
    assert list(place.iterdir()) == []


def test_a_readme_without_the_block_is_an_error(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    ran = ci(repository(tmp_path / "repository"), place, "misspelt")
    assert ran.returncode == 2
    assert "no fenced block after the line '<!-- ci: misspelt -->'" in ran.stderr
    assert list(place.iterdir()) == []


def test_the_readme_marks_both_blocks() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for marker, word in ((INSTALL_AND_RUN, "install"), (INSTALL_AND_TEST, "pytest")):
        block = lines[lines.index(marker) + 1 :]
        assert block[0].startswith("```")
        commands = block[1 : block.index("```")]
        assert any(word in command for command in commands)
