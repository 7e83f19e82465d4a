"""`align`: run recipes, show results, chat with a policy, hand it on, check the algorithms, open the web UI.

Imports happen inside commands, so that `align --help`, questions and mistakes answer at once.
"""

import atexit
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, overload

import typer
from rich.console import Console
from rich.table import Table

from alignment_pipeline.errors import AlignmentError
from resources.home import REPOSITORY, alignment_home, prepare_home, use_dagster_instance

if TYPE_CHECKING:
    from resources.lineage.index import Lineage

app = typer.Typer(
    help="From a base model and data to an aligned, evaluated policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
lineage_app = typer.Typer(help="The index behind why, impact and diff.", no_args_is_help=True)
app.add_typer(lineage_app, name="lineage")
_console = Console()
_errors = Console(stderr=True)

INTERRUPTED_EXIT_CODE = 130
RecipeArgument = Annotated[str, typer.Argument(help="Name of a recipe; `align recipes` lists them.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
PolicyArgument = Annotated[str, typer.Argument(help="base_model, sft_model, dpo_policy or ppo_policy.")]
RunOption = Annotated[
    str | None, typer.Option("--run", help="A run's id or its beginning; the current artifacts if left out.")
]


@app.command()
def run(
    recipe: RecipeArgument,
    select: Annotated[
        list[str] | None, typer.Option("--select", help="Make this asset only, from what is current; repeatable.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a recipe's value: section.key=value; repeatable.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say of each asset: reused, or why not.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be reused or computed, and why.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Print the logs of every stage.")] = False,
) -> None:
    """Make a recipe's assets; what exists already is reused."""
    from app.explain import explain_forecast, explain_run
    from app.recipes import find_recipe
    from app.results import load_results, print_results, result_asset

    loaded = find_recipe(recipe, overrides or [])
    if dry_run:
        explain_forecast(_console, alignment_home(), loaded, select or [])
        return
    from app.run import execute_run

    outcome = execute_run(_console, loaded, select or [], overrides or [], verbose=verbose)
    if explain:
        explain_run(_console, alignment_home(), outcome.run_id, outcome.assets)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
    result = result_asset(outcome.assets)
    if result:
        print_results(_console, load_results(alignment_home(), recipe, outcome.run_id))
    use = f"score {recipe} FILE" if result == "reward_model" else f"chat {recipe} {_last_policy(recipe)}"
    _console.print(f"Next: `make dev` for the web UI · `align {use}` · `align results --json`", highlight=False)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from alignment_pipeline.graph import build_graph
    from app.recipes import all_recipes

    table = Table("recipe", "description", "assets")
    for recipe in all_recipes():
        table.add_row(recipe.name, recipe.description, str(len(build_graph(recipe))))
    _console.print(table)


@app.command()
def results(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; all that have results if left out.")] = None,
    run_id: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the table of results."""
    from app.recipes import all_recipes, find_recipe
    from app.results import load_results, print_results, result_asset
    from resources.runs import RunRecords

    home = alignment_home()
    run_id = _whole_id(run_id)
    if recipe is not None:
        names = [find_recipe(recipe).name]
    else:
        names = [each.name for each in all_recipes() if result_asset(RunRecords(home).current(each.name))]
    if run_id is not None:
        names = [RunRecords(home).read(run_id)["recipe"]]
    if not names:
        raise AlignmentError("No recipe has results yet. Run `align run tiny` first.")
    found = [load_results(home, name, run_id) for name in names]
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for each in found:
        print_results(_console, each)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete model bytes and work folders that no pinned run, release, running run or current asset needs."""
    from app.garbage import collect_garbage

    collect_garbage(_console, alignment_home(), dry_run=dry_run, as_json=as_json)


@app.command()
def pin(
    run_id: Annotated[
        str | None, typer.Argument(help="A run's id or its beginning; lists the pins if left out.")
    ] = None,
) -> None:
    """Keep a run's models and checkpoints from `align gc`."""
    from app.garbage import list_pins, pin_run

    if run_id is None:
        list_pins(_console, alignment_home())
    else:
        pin_run(_console, alignment_home(), run_id)


@app.command()
def unpin(run_id: Annotated[str, typer.Argument(help="A pinned run's id or its beginning.")]) -> None:
    """Give a pinned run's models and checkpoints up to `align gc` again."""
    from app.garbage import unpin_run

    unpin_run(_console, alignment_home(), run_id)


@app.command()
def chat(
    recipe: RecipeArgument,
    policy: PolicyArgument,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, tokens.")] = 64,
    min_new_tokens: Annotated[int, typer.Option(help="Shortest response, tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most probable tokens that have this share together.")
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Beams of a beam search, with temperature 0; 1 is none.")] = 1,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that were there before are less probable.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0)] = 0,
) -> None:
    """Talk to a policy; a line is an instruction, or a text's beginning. Ends with an empty line or Ctrl-D."""
    from app.chat import chat_with, decoding_of
    from app.recipes import find_recipe

    decoding = decoding_of(
        temperature=temperature, top_k=top_k, top_p=top_p, num_beams=num_beams, repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    use_dagster_instance(alignment_home())
    chat_with(_console, find_recipe(recipe), policy, decoding, seed)


@app.command()
def score(
    recipe: RecipeArgument,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="JSON lines {prompt, response}; or {prompt, response_a, response_b}, or {prompt, chosen, rejected}, "
            "to compare; else standard input."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines for a program.")] = False,
) -> None:
    """Score responses by a recipe's reward model or classifier; prompts go into the recipe's template."""
    from app.recipes import find_recipe
    from app.score import score_file

    use_dagster_instance(alignment_home())
    score_file(_console, find_recipe(recipe), file, as_json=as_json)


@app.command()
def card(recipe: RecipeArgument, policy: PolicyArgument, run_id: RunOption = None) -> None:
    """Print a policy's model card, made from its lineage."""
    from app.export import card_of

    typer.echo(card_of(recipe, policy, _whole_id(run_id)), nl=False)


@app.command()
def export(
    recipe: RecipeArgument,
    policy: PolicyArgument,
    folder: Annotated[Path, typer.Argument(help="Folder to write; it has to be new or empty.")],
    run_id: RunOption = None,
) -> None:
    """Write a policy to a folder that transformers loads, with its model card."""
    from app.export import export_policy

    use_dagster_instance(alignment_home())
    export_policy(recipe, policy, _whole_id(run_id), folder)
    _console.print(f"{policy} of {recipe} is in {folder}; its README.md is the model card.", highlight=False)


@app.command()
def oracle(
    betas: Annotated[
        list[float] | None, typer.Option("--beta", help="Strength of the KL penalty; repeatable. Default: 1, 2, 4.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the reference policy, of sampling and of training.", min=0)] = 0,
    updates: Annotated[int, typer.Option(help="PPO's updates; too few and it does not arrive.", min=1)] = 100,
) -> None:
    """Check PPO and DPO against the exact optimum of a tiny model, with tables and plots. About a minute and a half."""
    from app.oracle import DEFAULT_BETAS, check_betas, run_oracle

    chosen = list(dict.fromkeys(betas or DEFAULT_BETAS))
    check_betas(chosen)
    home = prepare_home(alignment_home())
    use_dagster_instance(home)
    folder = home / "oracle"
    folder.mkdir(exist_ok=True)
    if not run_oracle(_console, chosen, seed, updates, folder):
        raise AlignmentError("A claim marked ✗ above does not hold.")


@app.command()
def why(
    recipe: RecipeArgument,
    metric: Annotated[str, typer.Argument(help="For example eval/win_rate, or the name alone.")],
    policy: Annotated[str | None, typer.Option(help="What the number is about, for example ppo_policy.")] = None,
    run_id: RunOption = None,
    all_ids: Annotated[bool, typer.Option("--all-ids", help="List the id of every training row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a number is made of: examples, policy, parents, settings, code, training rows."""
    from app.lineage import print_json, print_why
    from resources.lineage.questions import why as ask

    answer = ask(_lineage(), recipe, metric, policy, _whole_id(run_id), all_ids)
    (print_json if as_json else print_why)(_console, answer)


@app.command()
def impact(
    thing: Annotated[
        str, typer.Argument(metavar="ROW_ID|FILE:LINE", help="A row, a pair or a prompt, by id or place.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show every model and release that learned from a row, and what else it touched."""
    from app.lineage import print_impact, print_json
    from resources.lineage.questions import impact as ask

    (print_json if as_json else print_impact)(_console, ask(_lineage(), thing))


@app.command()
def diff(
    run_a: Annotated[str, typer.Argument(help="A run's id, or its beginning.")],
    run_b: Annotated[str, typer.Argument(help="Another's.")],
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two runs, and how the numbers moved."""
    from app.lineage import print_diff, print_json
    from resources.lineage.questions import diff as ask

    (print_json if as_json else print_diff)(_console, ask(_lineage(), _whole_id(run_a), _whole_id(run_b)))


@lineage_app.command()
def rebuild() -> None:
    """Make lineage.duckdb again from the home folder; needed after the file was damaged."""
    index = _lineage()
    artifacts = index.rebuild()
    _console.print(
        f"{index.path}: {artifacts} artifacts, content {index.content_sha256()[:16]}", highlight=False, soft_wrap=True
    )


@lineage_app.command()
def sql(
    statement: Annotated[str, typer.Argument(help="One SELECT; tables are described in resources/lineage/schema.sql.")],
) -> None:
    """Ask the index in SQL; rows are printed as JSON lines."""
    for row in _lineage().query(statement):
        typer.echo(json.dumps(row, ensure_ascii=False, default=str))


@app.command()
def dev(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 3000) -> None:
    """Open the Dagster web UI with every recipe and the runs that `align run` made."""
    from app.recipes import all_recipes

    home = prepare_home(alignment_home())
    use_dagster_instance(home)
    all_recipes()
    _require_free(port)
    command = [
        os.path.join(os.path.dirname(sys.executable), "dg"), "dev", "--workspace", str(REPOSITORY / "workspace.yaml"),
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    _console.print(f"Opening http://127.0.0.1:{port} (Ctrl-C ends it)", highlight=False)
    os.chdir(home)  # in the checkout Dagster would warn of the dagster.yaml that the home has a copy of
    os.execv(command[0], command)


def main() -> None:
    """Entry point: a user's mistake is one message and a non-zero exit, never a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    atexit.register(_silence_exit)
    try:
        sys.exit(app(standalone_mode=False) or 0)  # a command's typer.Exit comes back as its code
    except AlignmentError as error:
        _errors.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        _errors.print("Stopped.")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        show = getattr(error, "show", None)  # Typer's own usage errors know how to print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))


@overload
def _whole_id(start: None) -> None: ...


@overload
def _whole_id(start: str) -> str: ...


def _whole_id(start: str | None) -> str | None:
    """The id of the run that begins so."""
    from resources.runs import RunRecords

    return None if start is None else RunRecords(alignment_home()).matching(start)


def _lineage() -> "Lineage":
    """The home's index; a missing one is announced, since it takes a while to make in a large home."""
    from app.lineage import note_missing_index
    from resources.lineage.index import Lineage

    index = Lineage(alignment_home())
    note_missing_index(_errors, index)
    return index


def _silence_exit() -> None:
    """DuckDB's binding reports objects that outlive the interpreter; nothing of ours is printed that late."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise AlignmentError(
                f"Port {port} on 127.0.0.1 is in use. Choose another: `align dev --port {port % 65535 + 1}`."
            ) from error


def _last_policy(recipe: str) -> str:
    from alignment_pipeline.graph import build_graph
    from app.recipes import find_recipe

    assets = build_graph(find_recipe(recipe))
    return next(name for name in ("dpo_policy", "ppo_policy", "sft_model", "base_model") if name in assets)
