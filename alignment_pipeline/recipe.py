"""A recipe: one YAML file, validated into one frozen model that says which stages exist and how they are set.

Belongs here: loading, overrides, and combinations that cannot work. Which asset reads which is in `graph`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alignment_pipeline import configs
from alignment_pipeline.decoding_configs import DecodingSweepConfig, EvaluationConfig
from alignment_pipeline.errors import RecipeError

NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")
PATH_KEYS = ("path", "train_path", "reward_function")


class Recipe(BaseModel):
    """Everything a person decides about one pipeline. A section that is absent means the stage does not exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Prefix of the recipe's assets; the file's name.")
    description: str = Field(description="One sentence, shown by `align recipes` and in the web UI.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of every random choice.")
    data: configs.DataConfig
    base_model: configs.BaseModelConfig
    formatting: configs.FormattingConfig
    sft: configs.SftConfig | None = None
    sampling: configs.SamplingConfig | None = None
    labelling: configs.LabellingConfig | None = None
    feedback: configs.FeedbackConfig | None = None
    pairs: configs.PairsConfig | None = None
    reward_model: configs.RewardModelConfig | None = None
    reward_classifier: configs.RewardClassifierConfig | None = None
    reference_logprobs: configs.ReferenceLogprobsConfig = Field(default_factory=configs.ReferenceLogprobsConfig)
    dpo: configs.DpoConfig | None = None
    ppo: configs.PpoConfig | None = None
    evaluation: EvaluationConfig | None = None
    decoding: DecodingSweepConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _sweep_has_the_evaluations_judge(cls, raw: Any) -> Any:
        """Fill in the judge of a decoding sweep that names none."""
        decoding, evaluation = (raw.get(name) for name in ("decoding", "evaluation"))
        if isinstance(decoding, dict) and isinstance(evaluation, dict) and "judge" in evaluation:
            return {**raw, "decoding": {"judge": evaluation["judge"], **decoding}}
        return raw

    @model_validator(mode="after")
    def _combination_can_work(self) -> Self:
        if NAME_PATTERN.fullmatch(self.name) is None:
            raise ValueError(f"name: found {self.name!r}, expected lower-case letters, digits and _ ([a-z][a-z0-9_]*)")
        for message in (
            *self._source_problems(),
            *self._text_problems(),
            *self._template_problems(),
            *self._missing_stages(),
            *self._reward_problems(),
            *self._value_problems(),
            *self._number_problems(),
            *self._decoding_problems(),
        ):
            raise ValueError(message)
        return self

    def _source_problems(self) -> Iterable[str]:
        data, base = self.data, self.base_model
        if not (data.world_rows or data.path or data.hub_name):
            yield "data: found no source, expected one of world_rows, path or hub_name"
        if data.world_rows and (data.path or data.hub_name):
            yield "data: found world_rows beside path or hub_name, expected one kind of source; set the other to null"
        if base.path and base.hub_name:
            yield "base_model: found both path and hub_name, expected one; set the other to null"
        if self.reward_model and self.reward_model.path and self.reward_model.hub_name:
            yield "reward_model: found both path and hub_name, expected one; set the other to null"
        judge, method = self.evaluation and self.evaluation.judge, self.labelling and self.labelling.method
        if "gold_rule" in (judge, method) and not data.world_rows:
            yield (
                "gold_rule judges the built-in world's tasks only, but data reads other rows; "
                "expected data.world_rows, or reference_chrf as evaluation.judge and another labelling.method"
            )

    def _template_problems(self) -> Iterable[str]:
        template, base = self.formatting.template, self.base_model
        if template == "instruction":
            return
        if self.data.text_field:
            yield f"formatting.template: found {template}, but plain texts have none; leave it out"
        if self.feedback:
            yield f"feedback: votes go into the instruction template only, expected null beside template {template}"
        if template == "chat" and not (base.path or base.hub_name):
            yield (
                "formatting.template: found chat, but a built base model has no chat template; expected a given model "
                "(base_model.path or hub_name), or human_assistant"
            )

    def _text_problems(self) -> Iterable[str]:
        data, formatting = self.data, self.formatting
        if data.min_chars > data.max_chars:
            yield f"data.min_chars: found {data.min_chars}, expected at most max_chars ({data.max_chars})"
        shortest, longest = formatting.prefix_tokens_min, formatting.prefix_tokens_max
        if not data.text_field:
            for name in ("prefix_tokens_min", "prefix_tokens_max"):
                if getattr(formatting, name) != configs.FormattingConfig.model_fields[name].default:
                    yield f"formatting.{name}: only plain texts use it, expected data.text_field beside it"
            return
        if data.world_rows:
            yield "data.text_field: found beside world_rows, whose rows are not plain texts; expected path or hub_name"
        if self.feedback:
            yield "feedback: votes on plain texts cannot be taken in, expected null beside data.text_field"
        if shortest > longest:
            yield f"formatting.prefix_tokens_min: found {shortest}, expected at most prefix_tokens_max ({longest})"
        if longest > formatting.max_prompt_tokens:
            yield (
                f"formatting.prefix_tokens_max: found {longest}, expected at most max_prompt_tokens "
                f"({formatting.max_prompt_tokens})"
            )

    def _reward_problems(self) -> Iterable[str]:
        classifier = self.reward_classifier
        if classifier is None:
            if self.evaluation and self.evaluation.judge == "reward_classifier":
                yield "evaluation.judge: found reward_classifier, expected a reward_classifier section beside it"
            return
        if self.reward_model:
            yield "reward_classifier: found beside reward_model, expected one of them; set the other to null"
        sources = [name for name in ("path", "hub_name", "train_path") if getattr(classifier, name)]
        if len(sources) != 1:
            found = " and ".join(sources) or "no source"
            yield f"reward_classifier: found {found}, expected exactly one of path, hub_name or train_path"
        if not classifier.train_path:
            return
        names = classifier.label_names
        if len(set(names)) != len(names):
            yield f"reward_classifier.label_names: found {', '.join(names)}, expected different names"
        if classifier.label not in names:
            known = ", ".join(names)
            yield f"reward_classifier.label: found {classifier.label!r}, expected one of label_names: {known}"
        if classifier.hidden_size % (2 * classifier.num_heads):
            yield (
                f"reward_classifier.hidden_size: found {classifier.hidden_size}, expected an even multiple of "
                f"{classifier.num_heads} heads"
            )

    def _missing_stages(self) -> Iterable[str]:
        own_pairs = self.labelling and self.labelling.method == "dataset_pair"
        if own_pairs and self.data.form != "preferences":
            yield "labelling.method: found dataset_pair, but rows are no pairs; expected data.form preferences"
        if own_pairs and self.sampling:
            yield "sampling: found beside labelling.method dataset_pair, which uses no samples; expected null"
        policies = [name for name in ("sft", "ppo", "dpo") if getattr(self, name)]
        if policies and not self.evaluation:
            yield f"evaluation: missing, expected one beside {' and '.join(policies)}, whose policy is to be measured"
        needs = (
            (self.labelling, "labelling", self.sampling or own_pairs, "a sampling section to label"),
            (self.sampling, "sampling", self.labelling, "a labelling section that uses the samples"),
            (self.feedback, "feedback", self.pairs, "a pairs section that takes the votes in"),
            (self.pairs, "pairs", self.labelling or self.feedback, "a labelling or feedback section as source"),
            (self.reward_model, "reward_model", self.pairs, "a pairs section to learn from"),
            (self.dpo, "dpo", self.pairs, "a pairs section to learn from"),
            (
                self.ppo,
                "ppo",
                self._reward_of_ppo(),
                "a reward_model or reward_classifier section, or ppo.reward_function",
            ),
        )
        for section, name, needed, expected in needs:
            if section is not None and not needed:
                yield f"{name}: found without what it needs, expected {expected}"

    def _reward_of_ppo(self) -> object:
        """What PPO is rewarded by, or None."""
        return (self.ppo and self.ppo.reward_function) or self.reward_model or self.reward_classifier

    def _value_problems(self) -> Iterable[str]:
        ppo = self.ppo
        if ppo and ppo.value_trunk == "reward_model" and (ppo.reward_function or not self.reward_model):
            yield (
                "ppo.value_trunk: found reward_model, but PPO is not rewarded by a reward_model section; "
                "expected one, or shared, detached or separate"
            )
        elif ppo and ppo.value_trunk == "reward_model" and self.reward_model and self.reward_model.is_given:
            yield (
                "ppo.value_trunk: found reward_model, which starts from a model of its own that cannot read the "
                "policy's tokens; expected shared, detached or separate"
            )

    def _number_problems(self) -> Iterable[str]:
        base, ppo = self.base_model, self.ppo
        if self.data.validation_fraction + self.data.test_fraction >= 0.8:
            yield "data: validation_fraction + test_fraction leave under a fifth of the prompts to train on"
        if not (base.path or base.hub_name):
            if base.hidden_size % base.num_heads:
                yield f"base_model.hidden_size: found {base.hidden_size}, expected a multiple of {base.num_heads} heads"
            sections = (self.sampling, ppo, self.evaluation, self.decoding)
            responses = [section.max_new_tokens for section in sections if section is not None]
            longest = max(self.formatting.max_tokens, self.formatting.max_prompt_tokens + max(responses, default=0))
            if longest > base.max_positions:
                yield (
                    f"base_model.max_positions: found {base.max_positions}, expected at least {longest}, "
                    "the longest sequence that formatting and max_new_tokens allow"
                )
        if self.dpo and self.dpo.precision != self.reference_logprobs.precision:
            yield (
                f"reference_logprobs.precision: found {self.reference_logprobs.precision}, expected dpo.precision "
                f"({self.dpo.precision}), or rounding would count as preference"
            )
        if ppo:
            yield from _ppo_problems(ppo)

    def _decoding_problems(self) -> Iterable[str]:
        decoding = self.decoding
        if decoding is None:
            return
        sections = {
            "base_model": self.base_model,
            "sft_model": self.sft,
            "ppo_policy": self.ppo,
            "dpo_policy": self.dpo,
        }
        policies = [name for name, section in sections.items() if section is not None]
        if decoding.policy is not None and decoding.policy not in policies:
            yield f"decoding.policy: found {decoding.policy}, expected one of the recipe's: {', '.join(policies)}"
        if decoding.judge == "gold_rule" and not self.data.world_rows:
            yield "decoding.judge: found gold_rule, which judges the built-in world only; expected another judge"
        if decoding.judge == "reward_classifier" and not self.reward_classifier:
            yield "decoding.judge: found reward_classifier, expected a reward_classifier section beside it"


def _ppo_problems(ppo: configs.PpoConfig) -> Iterable[str]:
    if ppo.rollout_batch_size % ppo.minibatch_size:
        yield (
            f"ppo.minibatch_size: found {ppo.minibatch_size}, expected a divisor of "
            f"rollout_batch_size ({ppo.rollout_batch_size})"
        )
    if ppo.microbatch_size is not None and ppo.minibatch_size % ppo.microbatch_size:
        yield (
            f"ppo.microbatch_size: found {ppo.microbatch_size}, expected a divisor of "
            f"minibatch_size ({ppo.minibatch_size})"
        )
    if ppo.max_new_tokens_min is not None and ppo.max_new_tokens_min > ppo.max_new_tokens:
        yield (
            f"ppo.max_new_tokens_min: found {ppo.max_new_tokens_min}, expected at most max_new_tokens "
            f"({ppo.max_new_tokens})"
        )
    if ppo.value_warmup_updates >= ppo.updates:
        yield (
            f"ppo.value_warmup_updates: found {ppo.value_warmup_updates}, expected fewer than updates ({ppo.updates}), "
            "or the policy is never trained"
        )
    if ppo.kl_target_nats is not None and ppo.kl_horizon < ppo.rollout_batch_size:
        yield (
            f"ppo.kl_horizon: found {ppo.kl_horizon}, expected at least rollout_batch_size "
            f"({ppo.rollout_batch_size}), or one rollout could turn the coefficient round"
        )
    if ppo.reward_function is not None and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", ppo.reward_function):
        yield f"ppo.reward_function: found {ppo.reward_function!r}, expected file.py:function"
    if ppo.kl_target_nats is not None and ppo.kl_coef == 0:
        yield "ppo.kl_target_nats: found with kl_coef 0, which it could never change; expected kl_coef above 0"


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe file, with `key.path=value` overrides on top (values are YAML).

    Raises:
        RecipeError: The file is missing or not YAML, or a key is unknown, of the wrong type, or cannot be combined;
            the message names file, key, what was found and what was expected.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); expected a recipe YAML file.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: found {_kind(raw)}, expected a mapping of sections such as data and sft.")
    _resolve_paths(raw, path.parent)
    for override in overrides:
        _apply_override(raw, override)
    recipe = validate_recipe(raw, source=str(path))
    if recipe.name != path.stem:
        raise RecipeError(f"{path}: name: found {recipe.name!r}, expected {path.stem!r}, as the file is called.")
    return recipe


def validate_recipe(raw: Mapping[str, Any], source: str) -> Recipe:
    """Validate a recipe's raw mapping; `source` is named in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(source, problem) for problem in error.errors())) from error


def explain_validation(source: str, error: ValidationError) -> str:
    """One line for each problem: where, what was found, what was expected."""
    return "\n".join(_explain(source, problem) for problem in error.errors())


def _explain(source: str, problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "list[", "str")))
    if problem["type"] == "value_error":
        return ": ".join(filter(None, (source, location, str(problem["ctx"]["error"]))))
    if problem["type"] == "extra_forbidden":
        return f"{source}: {location}: unknown key{_suggestion(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{source}: {location}: missing, expected a value for this key"
    message = problem["msg"].removeprefix("Input should be ")
    found = problem["input"]
    return f"{source}: {location}: found {found!r} ({_kind(found)}), expected {message}"


def _suggestion(location: tuple[int | str, ...]) -> str:
    model: type[BaseModel] | None = Recipe
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    names = list(model.model_fields) if model else []
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    expected = f", did you mean {close[0]}?" if close else ""
    return f"{expected} (expected one of: {', '.join(names)})"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: expected key=value, for example sft.learning_rate=1e-4.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {error}") from error
    *sections, last = key.split(".")
    place = raw
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {section} is {_kind(inner)}, not a section.")
        place = inner
    place[last] = value
    if last in PATH_KEYS and isinstance(value, str):
        place[last] = str(Path(value).expanduser().resolve())


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    for values in raw.values():
        for key in PATH_KEYS:
            if isinstance(values, dict) and isinstance(values.get(key), str):
                values[key] = str((folder / Path(values[key]).expanduser()).resolve())


def _kind(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "an integer",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
