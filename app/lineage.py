"""How the answers of `align why`, `align impact` and `align diff` look in a terminal."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from resources.artifact_store import short_id
from resources.lineage.index import Lineage

Answer = dict[str, Any]

_HASH = 8
_TEXT = 100
_KINDS = {
    "pretraining_row": "pretraining rows",
    "training_row": "training rows",
    "preference_pair": "preference pairs",
    "rollout": "prompts of rollouts",
}
_LEARNED_HOW = {
    "pretraining_row": "pretrained on the row",
    "training_row": "trained on the row",
    "preference_pair": "trained on pairs on its prompt",
    "rollout": "trained on its own responses to the prompt",
}
_LEARNED_PAIR = {"preference_pair": "trained on the pair"}


def print_json(console: Console, answer: Answer) -> None:
    """An answer for a program; times are ISO 8601 in UTC."""
    text = json.dumps(answer, indent=2, ensure_ascii=False, default=lambda value: value.isoformat())
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def note_missing_index(console: Console, lineage: Lineage) -> None:
    """Say so before a missing index is made again, which takes a while in a large home."""
    if not lineage.path.exists():
        console.print(f"{lineage.path} is missing; it is made again from the home folder.", style="dim", soft_wrap=True)


def print_why(console: Console, answer: Answer) -> None:
    """A number, what it was counted from, and the tree of what is behind it."""
    number = f"{answer['metric']} of {answer['policy']} in {answer['recipe']} is {answer['value']:.4g}"
    if answer["interval"]:
        number += " [{:.4g}, {:.4g}]".format(*answer["interval"])
    run = "" if answer["run"] == "current" else f", run {answer['run'][:_HASH]}"
    console.print(f"[bold]{number}[/bold]{run}", highlight=False)
    if answer["examples"]:
        console.print(_counted(answer["examples"]), highlight=False, soft_wrap=True)
    console.print(_tree(answer["artifacts"], answer["artifact"]))
    for line in _environments(answer["artifacts"].values()):
        console.print(line, style="dim", highlight=False, soft_wrap=True)


def print_impact(console: Console, answer: Answer) -> None:
    """What was found, who learned from it, and what else that reached."""
    for row in _distinct(answer["found"]):
        where = f", line {row['source_line']} of {row['source']}" if row.get("source_line") else ""
        line = f"{row['kind'].capitalize()} {row['row_id']} ({row['split'] or 'not split'}{where}): {_shortened(row)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for refused in answer["quarantined"]:
        line = f"Quarantined in {refused['artifact_id']}: {refused['reason']} ({refused['detail']})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if answer["learned"]:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("model", no_wrap=True)
        released = any(entry["releases"] for entry in answer["learned"])
        for column in ("learned from it", "is now", *(["released as"] if released else [])):
            table.add_column(column, overflow="fold")
        words = _LEARNED_PAIR if all(row["kind"] == "pair" for row in answer["found"]) else _LEARNED_HOW
        for entry in answer["learned"]:
            through = sorted({artifact.split("/")[0] for artifact in entry["through"]})
            how = "; ".join(words[kind] for kind in entry["kinds"]) or f"through {', '.join(through)}"
            releases = [_listed(entry["releases"])] if released else []
            table.add_row(short_id(entry["artifact_id"]), how, _listed(entry["assets"]), *releases)
        console.print(table)
        if not released:
            console.print("None of them is released.")
    else:
        console.print("No model has learned from it.")
    for title, entries in (("Made from those models", answer["derived"]), ("Asked its prompt", answer["asked"])):
        if entries:
            names = [
                _listed(entry["assets"]) if entry["assets"] else short_id(entry["artifact_id"]) for entry in entries
            ]
            console.print(f"{title}: {', '.join(names)}", highlight=False, markup=False)


def print_diff(console: Console, answer: Answer) -> None:
    """What differs, and which numbers moved by how much."""
    for letter, run in zip("AB", answer["runs"], strict=True):
        overrides = "".join(f" --set {line}" for line in run["overrides"])
        console.print(
            f"{letter}  {run['run_id'][:_HASH]}  {run['recipe']}{overrides}, {run['started_at']:%Y-%m-%d %H:%M} UTC, "
            f"{run['status']}",
            highlight=False,
        )
    if answer["differences"]:
        table = Table("what", "name", "A", "B", "assets", title="What differs", box=box.SIMPLE_HEAD)
        for entry in answer["differences"]:
            values = [_value(entry["kind"], entry["name"], entry[side]) for side in ("a", "b")]
            table.add_row(entry["kind"], entry["name"], *values, _listed(entry["assets"] or []))
        console.print(table)
    else:
        console.print("Configuration, data, code and environment are the same.")
    if answer["metrics"]:
        table = Table("of", "metric", title="What moved", box=box.SIMPLE_HEAD)
        for column in ("A", "B", "change"):
            table.add_column(column, justify="right")
        for entry in answer["metrics"]:
            a, b = entry["a"], entry["b"]
            change = f"{b - a:+.4g}" if a is not None and b is not None else "–"
            shown = ("–" if value is None else f"{value:.4g}" for value in (a, b))
            table.add_row(entry["policy"], entry["metric"], *shown, change)
        console.print(table)
    else:
        console.print("No number moved.")
    if answer["results"]:
        names = ", ".join(entry["asset"] for entry in answer["results"])
        console.print(f"Came out differently: {names}", highlight=False)


def _counted(examples: Answer) -> str:
    """What a number was counted from, and the number counted again."""
    if "won" in examples:
        return (
            f"{examples['count']} prompts against {examples['opponent']}: {examples['won']} won, {examples['tied']} "
            f"tied, {examples['lost']} lost; counted again from these rows: {examples['recomputed']:.4g}"
        )
    again = examples["recomputed"]
    return f"From {examples['count']} examples" + ("" if again is None else f"; averaged again from them: {again:.4g}")


def _tree(artifacts: Mapping[str, Answer], root: str) -> Tree:
    shown: set[str] = set()

    def grow(artifact_id: str, name: str) -> Tree:
        made = artifacts[artifact_id]
        label = Text.assemble("" if name == made["asset"] else f"{name}: ", (made["asset"], "bold"))
        if artifact_id in shown:
            return Tree(label.append(" (above)", "dim"))
        shown.add(artifact_id)
        tree = Tree(Group(label.append(f"  {_origin(artifact_id, made)}", "dim"), *_details(made)))
        for input_name, parent in made["inputs"].items():
            tree.children.append(grow(parent, input_name))
        return tree

    return grow(root, artifacts[root]["asset"])


def _origin(artifact_id: str, made: Answer) -> str:
    """Which artifact it is, and what of its making fits in a line."""
    name = short_id(artifact_id).removeprefix(f"{made['asset']}/")
    if not made["in_store"]:
        return f"{name}, its folder is gone and only its name is known"
    return f"{name}, seed {made['seed']}, code {made['code_version'][:_HASH]}, {made['created_at']:%Y-%m-%d %H:%M}"


def _details(made: Answer) -> Iterable[RenderableType]:
    for entry in made["rows"]:
        ids = ", ".join(entry["ids"])
        more = ", …" if entry["count"] > len(entry["ids"]) else ""
        yield Text(f"{entry['count']:,} {_KINDS[entry['kind']]}: {ids}{more}")
    for name, file in made["files"].items():
        yield Text(f"{name}: {file['path']} (sha256 {file['sha256'][:_HASH]}…)")
    settings = ", ".join(f"{name} {_spelled(value)}" for name, value in made["config"].items() if value is not None)
    if settings:
        yield Text(settings, style="dim")


def _environments(artifacts: Iterable[Answer]) -> Iterable[str]:
    """One line for each environment that artifacts were made in."""
    assets: dict[str, list[str]] = {}
    for made in artifacts:
        if made["in_store"]:
            packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
            line = f"git {made['git_commit']}, Python {made['python']}, {made['device']}; {packages}"
            assets.setdefault(line, []).append(made["asset"])
    for line, names in assets.items():
        yield f"Made with {line}" + (f": {', '.join(names)}" if len(assets) > 1 else "")


def _distinct(found: Sequence[Answer]) -> list[Answer]:
    """A row that stands in several artifacts, once for each split and place."""
    return list(
        {(row["row_id"], row["split"], row.get("source"), row.get("source_line")): row for row in found}.values()
    )


def _shortened(row: Answer) -> str:
    text = " ".join(f"{row['prompt']} {row['text']}".split())
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "–"


def _spelled(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(kind: str, name: str, value: str | None) -> str:
    if value is None:
        return "–"
    if name == "git_commit":
        return value[:_HASH] + "+" * value.endswith("+")
    return value[:_HASH] if kind in ("data", "code") else value
