"""Reading a dataset of the Hugging Face hub, at one commit, and knowing what was read by its content."""

import glob
import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from alignment_pipeline import rows
from alignment_pipeline.errors import DataError
from alignment_pipeline.rows import Values, value_chunks

_spelled = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr).encode
"""Canonical JSON, and the repr of what a dataset may hold beside JSON's values, such as a date."""


def read_hub_chunks(
    name: str, revision: str | None, split: str, config: str | None = None, data_dir: str | None = None
) -> tuple[Iterator[Values], str]:
    """Read a split of a hub dataset, from the local cache where there is no network.

    The repository's snapshot is fetched first and `datasets` reads that folder. `load_dataset(name, revision=...)`
    alone will not do: without a network it ignores the hub's file cache, and it falls back to whatever revision it
    prepared last, with a warning only.

    Args:
        name: Repository.
        revision: Commit or tag; None takes the main branch.
        split: Split to read.
        config: One of the configurations that the repository names; None takes its default.
        data_dir: Folder of the repository to read; None takes what the repository says. No other files are fetched.

    Returns:
        The rows in chunks, and the commit they come from.

    Raises:
        DataError: The dataset, revision, configuration or split does not exist, needs code to load, or cannot be
            reached and is not in the cache.
    """
    import datasets
    import huggingface_hub

    named = {"config": config, "data_dir": data_dir, "split": split}
    parts = ", ".join(f"{key} {value}" for key, value in named.items() if value)
    wanted = f"hub dataset {name}, revision {revision or 'main'}, {parts}"
    # Both libraries raise many unrelated classes (OSError, ValueError, httpx's, their own) for one problem here.
    try:
        snapshot = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=_needed(data_dir)
        )
        dataset = datasets.load_dataset(snapshot, config, data_dir=data_dir, split=split)
    except Exception as error:
        raise DataError(
            f"{wanted}: cannot be loaded ({type(error).__name__}: {error}). Check data.hub_name, data.hub_revision, "
            "data.hub_config, data.hub_data_dir and data.hub_split; without a network, download the file elsewhere and "
            "set --set data.path=FILE."
        ) from error
    step = rows.CHUNK_VALUES
    starts = range(0, len(dataset), step)
    selected = (dataset.select(range(start, min(start + step, len(dataset)))) for start in starts)
    return value_chunks(chain.from_iterable(part.to_list() for part in selected)), Path(snapshot).name


def _needed(data_dir: str | None) -> list[str] | None:
    """Patterns of the files to fetch: the folder to read, and what `datasets` reads about it; None is all of them."""
    if data_dir is None:
        return None
    folder = PurePosixPath(glob.escape(data_dir))
    return [str(folder / "*"), "README.md", ".huggingface.yaml", "dataset_infos.json"]


def note_content(chunks: Iterator[Values], source: dict[str, Any]) -> Iterator[Values]:
    """Hand the chunks on; once all were taken, `source` has `rows` and `content_sha256`, of the rows one a line."""
    content, count = hashlib.sha256(), 0
    for chunk in chunks:
        for value in chunk.values:
            content.update(f"{_spelled(value)}\n".encode("utf-8", "surrogatepass"))
        count += len(chunk.values)
        yield chunk
    source |= {"rows": count, "content_sha256": content.hexdigest()}
