"""A conversation of single turns with a policy of the store."""

import sys
import warnings

from pydantic import ValidationError
from rich.console import Console

from alignment_pipeline.decoding_configs import DecodingFields
from alignment_pipeline.errors import MissingArtifactError, RecipeError
from alignment_pipeline.graph import build_graph, trunk_asset
from alignment_pipeline.limits import max_positions
from alignment_pipeline.recipe import Recipe, explain_validation
from alignment_pipeline.templates import Template
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.device import named_device, only_device
from resources.home import alignment_home
from resources.prompt_form import template_of
from resources.runs import RunRecords


def decoding_of(**options: float | None) -> DecodingFields:
    """The command's options as decoding settings.

    Raises:
        RecipeError: One is out of its range, or two contradict each other.
    """
    try:
        return DecodingFields.model_validate(options)
    except ValidationError as error:
        raise RecipeError(f"{explain_validation('align chat', error)}.") from error


def chat_with(console: Console, recipe: Recipe, policy: str, decoding: DecodingFields, seed: int) -> None:
    """Answer each line of standard input by the policy, in its own template; a plain text is continued as it is.

    Raises:
        MissingArtifactError: The policy is not one of the recipe's, or has not been made.
    """
    home = alignment_home()
    store = ArtifactStore(home)
    current = RunRecords(home).current(recipe.name)
    policies = [
        node.asset
        for node in build_graph(recipe).values()
        if node.asset.endswith(("_policy", "sft_model", "base_model"))
    ]
    if policy not in policies:
        raise MissingArtifactError(f"{recipe.name} has no policy {policy!r}, expected one of: {', '.join(policies)}.")
    if policy not in current:
        raise MissingArtifactError(f"{policy} of {recipe.name} has not been made yet. Run `align run {recipe.name}`.")
    trunk = _trunk_of(store, current[policy])
    console.print("Loading…", style="dim")
    device = only_device(named_device())
    from alignment_pipeline.decoding import respond
    from alignment_pipeline.models import load_policy, load_tokenizer
    from alignment_pipeline.tokenization import encode_prompts

    tokenizer = load_tokenizer(store.verify(trunk))
    name = template_of(store, current[policy], current, recipe)
    template = Template(name, tokenizer) if name else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between transformers and PEFT
        model = load_policy(store.verify(current[policy]), store.verify(trunk), device)
    console.print(f"{policy} of {recipe.name} ({trunk_asset(recipe)} is its trunk). An empty line ends.", style="dim")
    limit = max_positions(store.path(trunk))
    turn = 0
    while instruction := _read_line():
        text = template.prompt({"instruction": instruction, "input": ""}) if template else instruction
        prompt = encode_prompts(tokenizer, [text])
        if limit is not None and len(prompt[0]) + decoding.max_new_tokens > limit:
            console.print(
                f"Too long: {len(prompt[0])} tokens and up to {decoding.max_new_tokens} new ones, the model reads "
                f"{limit}.",
                style="yellow",
            )
            continue
        response = respond(model, tokenizer, prompt, decoding, batch_size=1, seed=seed + turn)[0]
        console.print(response.text, markup=False, highlight=False)
        if not response.ended:
            console.print(f"(cut after {decoding.max_new_tokens} tokens)", style="dim")
        turn += 1


def _trunk_of(store: ArtifactStore, policy: ArtifactRef) -> ArtifactRef:
    """The trunk a policy was trained on, by its manifest; a model that stands alone is its own."""
    trunk = store.manifest(policy)["inputs"].get("trunk")
    return ArtifactRef(**trunk) if trunk else policy


def _read_line() -> str:
    if sys.stdin.isatty():
        sys.stdout.write("> ")
        sys.stdout.flush()
    return sys.stdin.readline().strip()
