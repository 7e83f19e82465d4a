"""`ALIGNMENT_HOME`: the one folder that holds everything the product writes.

artifacts/  immutable results     work/     checkpoints           runs/      run records and their events
current/    what is current       leases/   who computes what     feedback/  people's preferences
pins/       runs to keep          releases/ what was released     wandb/     offline W&B runs
dagster/    the Dagster instance  lineage.duckdb  the index
"""

import os
import shutil
from pathlib import Path

from alignment_pipeline.errors import StoreError

REPOSITORY = Path(__file__).parent.parent
_ENVIRONMENT_VARIABLE = "ALIGNMENT_HOME"


def alignment_home() -> Path:
    """The home folder: `ALIGNMENT_HOME`, or `.alignment/` in the checkout."""
    configured = os.environ.get(_ENVIRONMENT_VARIABLE)
    return Path(configured).expanduser().resolve() if configured else REPOSITORY / ".alignment"


def prepare_home(home: Path) -> Path:
    """Create the home folder with its Dagster instance, and return it.

    Raises:
        StoreError: It cannot be created or written to.
    """
    if "?" in str(home):
        raise StoreError(
            f"{home}: found a ? in the path, which DuckDB takes for the end of a file's name. "
            f"Set {_ENVIRONMENT_VARIABLE} to another folder."
        )
    try:
        for name in ("artifacts", "work", "runs", "current", "leases", "dagster"):
            (home / name).mkdir(parents=True, exist_ok=True)
        probe = home / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        _install(REPOSITORY / "dagster.yaml", home / "dagster" / "dagster.yaml")
    except OSError as error:
        raise StoreError(
            f"{home} cannot be written to ({error.strerror}); expected a writable folder with free space. "
            f"Set {_ENVIRONMENT_VARIABLE} to another folder, or free some space."
        ) from error
    return home


def use_dagster_instance(home: Path) -> None:
    """Point this process and its children at the home's Dagster instance, and keep every tool quiet and offline."""
    os.environ["DAGSTER_HOME"] = str(home / "dagster")
    for variable, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


_QUIET_ENVIRONMENT = {
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a service of the hub to convert a .bin
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def _install(source: Path, target: Path) -> None:
    """Copy our configuration where it is missing; what a person changed there stays."""
    if not target.exists():
        shutil.copyfile(source, target)
