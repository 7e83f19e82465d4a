"""Fill in what README.md and docs/lineage.md show of commands, from runs of `tiny` by this checkout.

    .venv/bin/python benchmarks/document_outputs.py         (about four minutes)

Runs `tiny`, `tiny` with another beta, and `tiny` again, in an empty home folder or in one that is given; then every
command that a document marks with `output:` or `results:`. An output that ends with "…" is cut where it was cut.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from resources.home import REPOSITORY

DOCUMENTS = (REPOSITORY / "README.md", REPOSITORY / "docs" / "lineage.md")
RECIPE, CHANGE = "tiny", "dpo.beta=0.1"
MARKED = re.compile(r"(<!-- (?:output:|results: written by) `?align (.*?)`? -->\n```\n)(.*?)```", re.DOTALL)
COMPARED = re.compile(r"align diff ([0-9a-f]{8}) ([0-9a-f]{8})")
COLUMNS = {"results": "80"}  # others: 110


def main() -> None:
    """Run the recipe, ask every command, and write the documents."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="document_outputs_") as temporary:
        home = arguments.home or Path(temporary)
        first, second = _run(home), _run(home, "--set", CHANGE)
        _run(home)
        for path in DOCUMENTS:
            path.write_text(filled(path.read_text(encoding="utf-8"), home, (first, second)), encoding="utf-8")
            sys.stdout.write(f"{path}\n")


def filled(text: str, home: Path, runs: tuple[str, str]) -> str:
    """The document with the two runs named and every marked output as it is now."""
    for named in COMPARED.findall(text):
        for old, new in zip(named, runs, strict=True):
            text = text.replace(old, new)
    return MARKED.sub(lambda found: f"{found[1]}{_cut(_asked(home, found[2]), found[3])}```", text)


def _asked(home: Path, command: str) -> str:
    words = shlex.split(command)
    printed = _align(home, *words, columns=COLUMNS.get(words[0], "110")).replace(str(home), ".alignment")
    return "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())


def _cut(output: str, before: str) -> str:
    if not before.endswith("…\n"):
        return output
    lines = output.splitlines(keepends=True)[: before.count("\n") - 1]
    return "".join([*lines, "…\n"])


def _run(home: Path, *options: str) -> str:
    """The run's id, as `align run` prints it."""
    found = re.search(r"^Run ([0-9a-f]{8}) of", _align(home, "run", RECIPE, *options), re.MULTILINE)
    if found is None:
        raise SystemExit("found no run's id in what `align run` printed, expected a line `Run ID of …`")
    return found[1]


def _align(home: Path, *words: str, columns: str = "110") -> str:
    command = [sys.executable, "-c", "from app.cli import main; main()", *words]
    environment = os.environ | {"ALIGNMENT_HOME": str(home), "COLUMNS": columns, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"align {shlex.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="home folder to run in; what it has is reused")
    return parser.parse_args()


if __name__ == "__main__":
    main()
