"""A model that somebody else made, from a folder or the hub: read safely, with a padding token of its own.

Belongs here: what the stages that adopt such a model ask of it alike. The artifacts that they publish are read by
`models`.

Weights are read as safetensors. A model that has none (the main revisions of older hub models hold `pytorch_model.bin`
alone) is read by torch's restricted unpickler, which builds tensors and nothing else, and published as safetensors.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignment_pipeline.atomic import write_json
from alignment_pipeline.errors import ModelError
from alignment_pipeline.models import head_names

PAD = "<pad>"


def read_given_model(
    section: str, source: Path | str, revision: str | None, auto_class: Any, *, new_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder (a path) or of the hub (a name), the model in float32.

    Args:
        section: Section of the recipe that names the model, for errors.
        source: The folder, or the name on the hub.
        revision: Commit or tag on the hub; None for its main branch.
        auto_class: transformers' class that reads the model.
        new_head: Read it with one output; a head, or a pooler below it, that the weights lack is drawn by torch's
            random numbers.

    Raises:
        ModelError: A part is missing or unsafe to read, or the weights lack some that the class needs, which
            transformers would fill in at random.
    """
    local = isinstance(source, Path)
    remedy = (
        "expected a folder with config.json, tokenizer files and safetensors"
        if local
        else f"expected a model on the hub; without a network set {section}.path to a folder that holds the model"
    )
    if local and not Path(source).is_dir():
        raise ModelError(f"{section}.path: {source} is not a folder, {remedy}.")
    if local and not any(Path(source).glob("tokenizer*.json")) and not any(Path(source).glob("vocab.*")):
        # transformers would make an empty tokenizer up from config.json
        raise ModelError(f"{section}.path: {source} holds no tokenizer files, {remedy}.")
    options: dict[str, Any] = {"local_files_only": True} if local else {"revision": revision}
    options["trust_remote_code"] = False  # left out, transformers asks on the terminal
    # A classifier of several labels has a head of another shape, which is drawn anew like one that is missing.
    shape = {"num_labels": 1, "ignore_mismatched_sizes": True} if new_head else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, found = _read_weights(source, auto_class, {**options, **shape})
    except MemoryError:
        raise
    except Exception as error:  # transformers, safetensors and torch have no class in common for what they cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{section}: {source} cannot be loaded ({reason}); {remedy}.") from error
    drawn = {*head_names(model), "pooler"} if new_head else set()
    lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if missing := sorted(key for key in lacking if drawn.isdisjoint(key.split("."))):
        raise ModelError(
            f"{section}: {source} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]}), "
            "expected all of them; it was made for another purpose."
        )
    return model, tokenizer


def _read_weights(source: Path | str, auto_class: Any, options: dict[str, Any]) -> Any:
    """The model and what transformers says of its loading: from safetensors, or where there are none from a `.bin`."""
    reading = {"dtype": torch.float32, "output_loading_info": True, **options}
    try:
        return auto_class.from_pretrained(source, use_safetensors=True, **reading)
    except OSError as error:
        try:
            return auto_class.from_pretrained(source, use_safetensors=False, weights_only=True, **reading)
        except OSError:  # nor is there a .bin: the first message is about safetensors
            raise error from None
        except Exception as refusal:
            if type(refusal).__name__ != "UnpicklingError":  # by name, since nothing here imports pickle
                raise
            raise ValueError(
                "there are no safetensors, and pytorch_model.bin was refused, since it is damaged or holds more than "
                "tensors, which could run code"
            ) from refusal


def record_source(output_dir: Path, source: Path | str, revision: str | None) -> None:
    """Write `extras/source.json`: where a given model came from and, of the hub, the commit that was read."""
    where = (
        {"source": "folder", "path": str(source)}
        if isinstance(source, Path)
        else {"source": f"hub {source}", "revision": revision, "commit": _commit(source, revision)}
    )
    write_json(output_dir / "extras" / "source.json", where)


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a model on the hub was just read at; None where nothing of it is in the cache."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def give_padding_of_its_own(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Add a padding token where there is none or where it is the end token; its embedding is drawn from `seed`."""
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            torch.manual_seed(seed)  # the new rows are drawn at random
            model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
