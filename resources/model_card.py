"""Model cards: Markdown with the Hugging Face hub's metadata in front, written from a policy's record.

Belongs here: the words. What is told is gathered in `policy_record`. The same record gives the same card, byte for
byte: no clock, no machine's folders. A section without content is left out.

Source of the metadata's rules: https://huggingface.co/docs/hub/model-cards and /repositories-licenses. With a
`model-index` the hub checks `license` and `datasets`, so that only hub names stand there; whatever else a policy was
made from is in the text.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from alignment_pipeline.templates import Template
from resources.overrides import names_files
from resources.policy_record import Check, Made, PolicyRecord
from resources.prompt_form import template_behind

_METHODS = {
    "base_model": "It is the model that everything else in the recipe starts from.",
    "sft_model": "It is `base_model` tuned to follow instructions (supervised fine-tuning, loss on the response only).",
    "dpo_policy": "It is `{trunk}` trained further on pairs of a preferred and a rejected response, by direct "
    "preference optimization (DPO, arXiv 2305.18290).",
    "ppo_policy": "It is `{trunk}` trained further by proximal policy optimization (PPO, arXiv 1707.06347) for a high "
    "score by {reward}, less a penalty for moving away from `{trunk}`.",
}
_JUDGES = {
    "gold_rule": "a rule that reads the response to a task of the built-in world and says how right it is, from 0 to 1",
    "reference_chrf": "closeness to the dataset's own answer (chrF divided by 100), from 0 to 1",
    "reward_classifier": "the probability that a text classifier gives to its label for prompt and response",
}
_LABELLERS = {
    "gold_rule": "the built-in world's rule prefers the better of two sampled responses",
    "reference_chrf": "the sampled response that is closer to the dataset's answer (chrF) is preferred",
    "dataset_answer": "the dataset's answer is preferred to a sampled response",
    "dataset_pair": "the dataset itself says which of two responses is preferred",
}
# Metric → title and decimals, in the table's order.
_METRICS = {
    "win_rate": ("Win rate against `{trunk}`, ties counted half", 3),
    "judge_score": ("Judge's score", 3),
    "learned_score": ("Score by the recipe's reward", 2),
    "bleu": ("BLEU against the dataset's answers", 1),
    "kl_nats": ("KL divergence from `{trunk}`, nats a response", 2),
    "mean_tokens": ("Length of a response, tokens", 1),
    "eos_rate": ("Share of responses that end by themselves", 3),
}
_LICENSED = {
    "data": "the data",
    "base_model": "the base model",
    "reward_classifier": "the reward classifier (or the text that it was trained on)",
    "reward_model": "the model that the reward model was trained from",
}


def model_card(record: PolicyRecord) -> str:
    """The card of a policy, ready to be the README.md of its folder."""
    sections = (
        ("How to use it", _usage(record)),
        ("Results", _results(record)),
        ("Limitations", _limitations(record)),
        ("Data", _data(record)),
        ("What it was made from", _ancestors(record)),
        ("Hyperparameters", _hyperparameters(record)),
        ("Environment", _environment(record)),
        ("Licences", _licences(record)),
        ("How to make it again", _reproduction(record)),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections if text)
    front = _metadata(record).to_yaml(line_break="\n")
    return f"---\n{front}\n---\n\n# {record.policy} of {record.recipe.name}\n\n{_introduction(record)}\n\n{body}\n"


def _metadata(record: PolicyRecord) -> ModelCardData:
    base, data = _hub_name(record, "base_model"), _hub_name(record, "instructions")
    results = list(_eval_results(record, data))
    # The hub knows "unknown" as a licence; "other" would need a licence's text beside the card.
    return ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        datasets=[data] if data else None,
        tags=["alignment", *(stage for stage in ("sft", "dpo", "ppo") if record.policy.startswith(stage))],
        model_name=f"{record.recipe.name}-{record.policy}" if results else None,
        eval_results=results or None,
    )


def _eval_results(record: PolicyRecord, dataset: str | None) -> Iterable[EvalResult]:
    for name, title, metric, decimals in _metric_rows(record):
        interval = f" (95% interval {_range(metric.interval, decimals)})" if metric.interval else ""
        yield EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=dataset or record.recipe.name,
            dataset_name=f"Test prompts of the recipe {record.recipe.name}",
            dataset_split="test",
            metric_type=name,
            metric_name=title.replace("`", "") + interval,
            metric_value=round(metric.value, decimals),
        )


def _metric_rows(record: PolicyRecord) -> Iterable[tuple[str, str, Any, int]]:
    """Name, title, metric and decimals of what was measured; the trunk is not compared to itself."""
    metrics = record.measured.metrics if record.measured else {}
    for name, (title, decimals) in _METRICS.items():
        if name in metrics and not (name == "kl_nats" and record.policy == record.trunk):
            yield name, title.format(trunk=record.trunk), metrics[name], decimals


def _introduction(record: PolicyRecord) -> str:
    inputs = record.itself.manifest["inputs"]
    rewards = [f"`{name}`" for name in ("reward_model", "reward_classifier") if name in inputs]
    method = _METHODS[record.policy].format(trunk=record.trunk, reward=rewards[0] if rewards else "a Python function")
    return (
        f"This language model is the policy `{record.policy}` of the recipe `{record.recipe.name}`: "
        f"{record.recipe.description} {method} {_base(record)}\n\n"
        "This card was generated from the recorded lineage of the model."
    )


def _base(record: PolicyRecord) -> str:
    made = record.lineage["base_model"]
    size = f"{made.manifest['metrics']['base/parameters']:,.0f} parameters"
    if name := _hub_name(record, "base_model"):
        revision = made.manifest["config"]["hub_revision"]
        where = f" (revision `{revision}`)" if revision else ""
        where += f" at commit `{record.base_commit}`" if record.base_commit else ""
        return f"The base model is `{name}` of the Hugging Face hub{where}, with {size}."
    if folder := made.files().get("source"):
        return f"The base model was read from a folder with the sha256 `{folder['sha256']}` and has {size}."
    return f"The base model, with {size}, was built and pretrained on the recipe's own training text."


def _usage(record: PolicyRecord) -> str:
    recipe = record.recipe
    prompt, template = _prompt_code(record)
    # A chat template writes the leading token itself.
    special = ", add_special_tokens=False" if "apply_chat_template" in prompt else ""
    config = record.measured.evaluation.manifest["config"] if record.measured else _evaluation_settings(record)
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
prompt = {prompt}
tokens = tokenizer(prompt{special}, return_token_type_ids=False, return_tensors="pt")
answer = model.generate(**tokens, {_generate_options(config)})
print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))"""
    return (
        f"`align export {recipe.name} {record.policy} FOLDER` writes the model as a folder of safetensors, which "
        f"`transformers` loads by itself:\n\n```python\n{code}\n```\n\n{template}"
    )


def _prompt_code(record: PolicyRecord) -> tuple[str, str]:
    """A prompt in Python, and what to know about it."""
    template = template_behind((made.manifest for made in record.lineage.values()), record.recipe)
    if template is None:
        return (
            json.dumps("The beginning of a text"),
            "The model continues a text; the prompt is the beginning of it, without a template.",
        )
    asked = "What the model is to do."
    if template == "chat":
        return (
            f"tokenizer.apply_chat_template(\n    {json.dumps([{'role': 'user', 'content': asked}])},\n"
            "    tokenize=False, add_generation_prompt=True, enable_thinking=False,\n)",
            "The prompt has to be in the chat template that the tokenizer brings.",
        )
    row = {"instruction": asked, "input": ""}
    prompt = json.dumps(Template(template, tokenizer=None).prompt(row))
    if template == "human_assistant":
        return prompt, "The prompt has to be a dialogue of Human and Assistant as above, of one turn or several."
    return prompt, (
        "The prompt has to be in the template that the model was trained with. A text that the instruction works "
        "on stands below a line `### Input:` of its own, before `### Response:`."
    )


def _evaluation_settings(record: PolicyRecord) -> dict[str, Any]:
    evaluation = record.recipe.evaluation
    return evaluation.keyed_values() if evaluation else {"max_new_tokens": 64, "temperature": 0}


def _generate_options(config: Mapping[str, Any]) -> str:
    """An evaluation's decoding as arguments of transformers' `generate`; early evaluations had fewer settings."""
    options = {"max_new_tokens": config["max_new_tokens"], "do_sample": config["temperature"] > 0}
    if config["temperature"] > 0:
        options |= {"temperature": config["temperature"], "top_k": config.get("top_k") or 0}
        options |= {"top_p": config["top_p"]} if config.get("top_p") else {}
    for name, unused in (("num_beams", 1), ("repetition_penalty", 1), ("min_new_tokens", 0)):
        if config.get(name, unused) != unused:
            options[name] = config[name]
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                     for name, value in options.items())  # fmt: skip


def _results(record: PolicyRecord) -> str:
    measured = record.measured
    if measured is None:
        return "This policy has not been evaluated."
    config = measured.evaluation.manifest["config"]
    how = f"decoded by `{_generate_options(config)}`"
    rows = [
        (title, f"{metric.value:.{decimals}f}", _range(metric.interval, decimals) if metric.interval else "none")
        for _, title, metric, decimals in _metric_rows(record)
    ]
    return (
        f"The policy answered {measured.prompts} test prompts, which no stage of the recipe was trained on, once each, "
        f"{how}. The judge ({measured.judge_title}) is "
        f"{_JUDGES[config['judge']]}.\n\n"
        + _table(("measure", "value", "95% interval"), rows)
        + "\n\nIntervals of rates are Wilson's, those of means are 1.96 standard errors over the prompts to either "
        "side; BLEU is of all responses together and has none."
    )


def _limitations(record: PolicyRecord) -> str:
    failed = [check for check in record.checks if not check.passed]
    lines = [_sentence(check) for check in failed]
    if not failed:
        lines.append(f"All checks of the artifacts behind this policy hold ({len(record.checks)} of them).")
    if record.measured:
        config = record.measured.evaluation.manifest["config"]
        lines.append(
            "The results hold for prompts like the recipe's, by the judge named above. Truth, safety and bias were not "
            "measured."
        )
        if config["judge"] == "reward_classifier" and "reward_classifier" in record.lineage:
            lines.append("The judge is what the policy was trained to please, so that its score flatters the policy.")
    else:
        lines.append("Nothing is known of the quality of its responses.")
    return "\n".join(f"- {line}" for line in lines)


def _sentence(check: Check) -> str:
    return f"`{check.name}` (a check of `{check.asset}`) does not hold: {check.detail}"


def _data(record: PolicyRecord) -> str | None:
    made = record.lineage.get("instructions")
    if made is None:
        return None
    metrics = made.manifest["metrics"]
    rows = {name: f"{metrics[f'data/{name}']:,.0f}" for name in ("rows_in", "kept", "quarantined", "test")}
    lines = [
        _source(record, made),
        f"Of {rows['rows_in']} rows, {rows['kept']} were kept and {rows['quarantined']} went to quarantine. "
        f"{rows['test']} of the kept ones are the test split, which no stage was trained on. The kept rows are the "
        f"artifact `{made.ref.artifact_id}`, the sha256 of their content is `{made.ref.data_version}`.",
        *_trained_on(record),
    ]
    return "\n\n".join(lines)


def _source(record: PolicyRecord, made: Made) -> str:
    if source := made.files().get("source"):
        return f"The rows come from a file with the sha256 `{source['sha256']}`."
    if name := made.manifest["config"].get("hub_name"):
        commit = f" at commit `{record.hub_commit}`" if record.hub_commit else ""
        split = made.manifest["config"]["hub_split"]
        return f"The rows are the split `{split}` of the Hugging Face dataset `{name}`{commit}."
    return "The rows were generated from the built-in world of small Python tasks, by their seed."


def _trained_on(record: PolicyRecord) -> Iterable[str]:
    """A paragraph for each kind of material that training read."""
    if "instructions" in record.lineage["base_model"].manifest["inputs"]:
        rows = record.lineage["instructions"].manifest["metrics"]["data/train"]
        yield f"The base model was pretrained on the texts of the train split's {rows:,.0f} rows, of whatever length."
    if (dataset := record.lineage.get("formatted_dataset")) is not None:
        rows = dataset.manifest["metrics"]["data/train"]
        yield (
            f"The train split has {rows:,.0f} rows within the length limits; fine-tuning and sampling read those only."
        )
    if (pairs := record.lineage.get("preference_pairs")) is not None:
        metrics = pairs.manifest["metrics"]
        labels = record.lineage.get("preference_labels")
        how = f" For the others, {_LABELLERS[labels.manifest['config']['method']]}." if labels else ""
        yield (
            f"Preferences were learned from {metrics['pairs/train']:,.0f} pairs of responses to training prompts; "
            f"people gave {metrics['pairs/human']:,.0f} of all pairs.{how}"
        )
    if (ppo := record.lineage.get("ppo_policy")) is not None:
        config = ppo.manifest["config"]
        sampled = config["updates"] * config["rollout_batch_size"]
        yield f"PPO sampled {sampled:,} responses to training prompts."


def _ancestors(record: PolicyRecord) -> str:
    rows = [
        (asset, f"`{made.ref.artifact_id}`", f"`{made.ref.data_version}`", str(made.manifest["seed"]),
         f"`{made.manifest['code_version']}`")
        for asset, made in record.lineage.items()
    ]  # fmt: skip
    files = [
        f"Beside these, `{asset}` read its `{name}`, a file or a folder with the sha256 `{entry['sha256']}`."
        for asset, made in record.lineage.items()
        for name, entry in made.files().items()
    ]
    table = _table(("stage", "artifact", "data version", "seed", "code version"), rows)
    return "\n\n".join(
        [
            "Every artifact behind the model, parents first, the model itself last. The data version is a sha256 of "
            "the artifact's content.",
            table,
            *files,
        ]
    )


def _hyperparameters(record: PolicyRecord) -> str:
    trained = {
        asset: _settings(made)
        for asset, made in record.lineage.items()
        if {"learning_rate", "pretrain_learning_rate"} & made.manifest["config"].keys()
    }
    return "\n\n".join(
        f"### {asset}\n\n" + _table(("setting", "value"), [(f"`{name}`", value) for name, value in settings.items()])
        for asset, settings in trained.items()
    )


def _settings(made: Made) -> Mapping[str, str]:
    """A stage's settings that are in force: none that is off, and LoRA's only where LoRA trained."""
    config: Mapping[str, Any] = made.manifest["config"]
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in config.items()
        if value is not None and not (config.get("method") == "full" and name.startswith("lora_"))
    }


def _is_same(environment: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether commit, versions and device are ours; a stage that did not use its GPU does not say which one it was."""
    device = environment["device"] in (ours["device"], ours["device"].partition(" ")[0])
    return device and all(environment[key] == ours[key] for key in ("git_commit", "python", "packages"))


def _environment(record: PolicyRecord) -> str:
    ours = record.itself.manifest["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in ours["packages"].items())
    elsewhere = [
        f"`{asset}`" for asset, made in record.lineage.items() if not _is_same(made.manifest["environment"], ours)
    ]
    others = f" Made with another commit, device or library version: {', '.join(elsewhere)}." if elsewhere else ""
    return (
        f"The model was made on the device `{ours['device']}` ({ours['platform']}), by {_commit(ours['git_commit'])}, "
        f"with Python {ours['python']} and {packages}.{others}"
    )


def _commit(commit: str | None) -> str:
    if commit is None:
        return "code outside a git checkout"
    if commit.endswith("+"):
        return f"the code of git commit `{commit[:-1]}` with changes that were not committed"
    return f"the code of git commit `{commit}`"


def _licences(record: PolicyRecord) -> str:
    lines = ["Nobody has stated a licence for this model itself; those of what it was made from may bind it."]
    for section, licence in record.licences.items():
        stated = f"is `{licence}`" if licence else "is not stated"
        lines.append(f"The licence of {_LICENSED[section]} {stated}.")
    return "\n".join(f"- {line}" for line in lines)


def _reproduction(record: PolicyRecord) -> str:
    options = [f"--set {shlex.quote(override)}" for override in record.overrides]
    command = " ".join(["align", "run", record.recipe.name, *options])
    files = any(names_files(override) for override in record.overrides)
    where = " Files are named without their folders; their sha256 are above." if files else ""
    return (
        f"```\n{command}\n```\n\nWith the code, the library versions and the kind of device named above this makes the "
        f"same artifacts, and reuses those that exist.{where}"
    )


def _hub_name(record: PolicyRecord, asset: str) -> str | None:
    made = record.lineage.get(asset)
    name: str | None = made.manifest["config"].get("hub_name") if made else None
    return name


def _range(interval: tuple[float, float], decimals: int) -> str:
    low, high = interval
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
