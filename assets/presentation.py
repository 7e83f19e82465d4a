"""How an artifact looks on its asset page: numbers, plots inline, tables as Markdown, links."""

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg

from alignment_pipeline.graph import StageNode
from alignment_pipeline.identity import EXTRAS, read_jsonl
from alignment_pipeline.plots import telling_curves
from alignment_pipeline.statistics import mean
from resources.artifact_store import ArtifactRef, short_id
from resources.compute import Outcome

_CELL_CHARS = 160
_ROWS = 5
_TABLE_ROWS = 20  # of `table.jsonl`, which is a result and no sample
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 32
_FIRST_COLUMNS = (
    "policy",
    "setting",
    "judge_score",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "bleu",
    "kl_nats",
    "changed_from",
    "judge_change",
    "judge_change_low",
    "judge_change_high",
    "instruction",
    "input",
    "output",
    "prompt",
    "chosen",
    "rejected",
    "response",
    "completion",
    "reason",
)


def asset_metadata(
    outcome: Outcome, recipe: str, node: StageNode, tables: Sequence[str], wandb_run: str | Path | None
) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata of a materialization; keys of metrics are the metrics' own names."""
    manifest = outcome.manifest
    metadata: dict[str, dg.MetadataValue[Any]] = {
        name: dg.MetadataValue.float(float(value)) for name, value in manifest["metrics"].items()
    }
    metadata["reused"] = dg.MetadataValue.bool(outcome.reused)
    if outcome.reasons:
        metadata["computed because"] = dg.MetadataValue.text("; ".join(outcome.reasons))
    if manifest["inputs"]:
        metadata["made from"] = dg.MetadataValue.md(made_from(manifest["inputs"], recipe, node))
    metadata["artifact"] = dg.MetadataValue.path(str(outcome.folder))
    metadata["artifact id"] = dg.MetadataValue.text(outcome.ref.artifact_id)
    metadata["data_version"] = dg.MetadataValue.text(outcome.ref.data_version)
    metadata["key"] = dg.MetadataValue.text(outcome.ref.key)
    metadata["manifest"] = dg.MetadataValue.json(_brief(manifest))
    if curves := sparklines(outcome.folder / EXTRAS / "progress.jsonl"):
        metadata["curves at a glance"] = dg.MetadataValue.md(curves)
    for picture in sorted((outcome.folder / EXTRAS).glob("*.png")):
        metadata[picture.stem.replace("_", " ")] = dg.MetadataValue.md(_picture(picture))
    for name in tables:
        path, count = outcome.folder / name, _TABLE_ROWS if name == "table.jsonl" else _ROWS
        metadata[name] = dg.MetadataValue.md(markdown_table(read_jsonl(path, count)) if path.is_file() else "(none)")
    if isinstance(wandb_run, Path):
        metadata["W&B run (offline)"] = dg.MetadataValue.path(str(wandb_run))
    elif wandb_run:
        metadata["W&B run"] = dg.MetadataValue.url(wandb_run)
    return metadata


def made_from(inputs: Mapping[str, Mapping[str, str]], recipe: str, node: StageNode) -> str:
    """A manifest's inputs as a table: parents as links to their asset pages, with shortened ids.

    The links begin at the web UI's own address, as it has no path prefix.
    """
    rows = []
    for name, entry in inputs.items():
        if name in node.inputs:
            key = f"{recipe}/{node.inputs[name]}"
            parent = ArtifactRef(**entry)
            source, artifact, version = f"[{key}](/assets/{key})", short_id(parent.artifact_id), parent.data_version
        else:
            source, artifact, version = Path(entry["path"]).name, "(a file)", entry["sha256"]
        rows.append({"input": name, "made from": source, "data version": version[:8], "artifact id": artifact})
    return markdown_table(rows)


def sparklines(progress_log: Path) -> str:
    """The telling metrics of a progress log as a table with a line of blocks each, or nothing.

    The web UI shows Markdown of under a thousand characters in place, and pictures only in a dialog.
    """
    rows = []
    for name, points in (telling_curves(progress_log) if progress_log.is_file() else {}).items():
        values = [value for _, value in points]
        low, high = min(values), max(values)
        count = min(_SPARKS, len(values))
        bounds = [len(values) * number // count for number in range(count + 1)]
        means = [mean(values[start:end]) for start, end in pairwise(bounds)]
        blocks = "".join(_BLOCKS[round((value - low) / (high - low or 1) * (len(_BLOCKS) - 1))] for value in means)
        rows.append({"metric": name, "curve": blocks, "first": values[0], "last": values[-1]})
    return markdown_table(rows) if rows else ""


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; long cells are cut, numbers shortened."""
    if not rows:
        return "(no rows)"
    columns = sorted(rows[0], key=lambda name: _FIRST_COLUMNS.index(name) if name in _FIRST_COLUMNS else 99)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _CELL_CHARS else text[: _CELL_CHARS - 1] + "…"
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
    return escaped.replace("\r", "").replace("\n", "<br>")


def _picture(path: Path) -> str:
    return f"![{path.stem}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"


def _brief(manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = ("stage", "key", "data_version", "code_version", "config", "seed", "inputs", "timings", "environment")
    return {name: manifest[name] for name in names}
