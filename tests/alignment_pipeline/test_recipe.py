import subprocess
import sys
from pathlib import Path

import pytest

from alignment_pipeline.errors import RecipeError
from alignment_pipeline.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"

TEXTS = ("data.world_rows=null", "data.path=texts.jsonl", "data.text_field=text", "feedback=null",
         "labelling.method=reference_chrf", "evaluation.judge=reference_chrf")  # fmt: skip


def smoke_with(*overrides: str) -> Recipe:
    return load_recipe(SMOKE, overrides)


def error_of(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        smoke_with(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description.strip()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sft.learning_rat=1e-4"], ["sft.learning_rat: unknown key", "did you mean learning_rate?", "batch_size"]),
        (["stf={}"], ["stf: unknown key", "did you mean sft?", "(expected one of: name, description"]),
        (["sft.zzz=1"], ["sft.zzz: unknown key (expected one of: method"]),
        (["sft.learning_rate=fast"], ["sft.learning_rate: found 'fast' (text), expected a valid number"]),
        (["sft.batch_size=2.5"], ["sft.batch_size: found 2.5 (a number), expected a valid integer"]),
        (["sft.batch_size=0"], ["sft.batch_size: found 0 (an integer), expected greater than or equal to 1"]),
        (["sft.learning_rate=.nan"], ["sft.learning_rate: found nan (a number), expected a finite number"]),
        (["sft=[]"], ["sft: found [] (a list), expected a valid dictionary"]),
        (["data=null"], ["data: found None (nothing), expected a valid dictionary"]),
        (["sft.lora_targets=[1]"], ["sft.lora_targets", "found 1 (an integer), expected a valid string"]),
        (["labelling={}"], ["labelling.method: missing, expected a value for this key"]),
        (
            ["evaluation.judge=gpt4"],
            ["evaluation.judge: found 'gpt4' (text), expected 'gold_rule', 'reference_chrf' or 'reward_classifier'"],
        ),
        (["seed=-1"], ["seed: found -1 (an integer), expected greater than or equal to 0"]),
        (["name=Smoke"], ["name: found 'Smoke', expected lower-case letters, digits and _"]),
    ],
    ids=lambda value: value[0] if value and "=" in value[0] else "",
)
def test_a_wrong_key_is_named_with_file_finding_and_expectation(overrides: list[str], expected: list[str]) -> None:
    message = error_of(*overrides)
    assert message.startswith(f"{SMOKE}: ")
    for part in expected:
        assert part in message


def test_all_wrong_keys_are_reported_at_once() -> None:
    message = error_of("sft.batch_size=0", "ppo.kl_coef=-1", "nonsense=1")
    assert [line.removeprefix(f"{SMOKE}: ").split(":")[0] for line in message.splitlines()] == [
        "sft.batch_size",
        "ppo.kl_coef",
        "nonsense",
    ]


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("name: short\ndescription: No sections.\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}: {section}: missing, expected a value for this key" for section in ("data", "base_model", "formatting")
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.world_rows=null"], "data: found no source, expected one of world_rows, path or hub_name"),
        (["data.path=rows.jsonl"], "data: found world_rows beside path or hub_name"),
        (["data.hub_name=a/b"], "data: found world_rows beside path or hub_name"),
        (["base_model.path=m", "base_model.hub_name=a/b"], "base_model: found both path and hub_name"),
        (["data.world_rows=null", "data.hub_name=a/b"], "gold_rule judges the built-in world's tasks only"),
        (
            ["data.world_rows=null", "data.hub_name=a/b", "evaluation.judge=reference_chrf",
             "labelling.method=gold_rule"],
            "gold_rule judges the built-in world's tasks only",
        ),
        (["sampling=null"], "labelling: found without what it needs, expected a sampling section"),
        (["labelling=null"], "sampling: found without what it needs, expected a labelling section"),
        (["pairs=null"], "feedback: found without what it needs, expected a pairs section"),
        (["sampling=null", "labelling=null", "feedback=null"], "pairs: found without what it needs, expected a label"),
        (["pairs=null", "feedback=null"], "reward_model: found without what it needs, expected a pairs section"),
        (["pairs=null", "feedback=null", "reward_model=null"], "dpo: found without what it needs, expected a pairs"),
        (["reward_model=null"], "ppo: found without what it needs, expected a reward_model or reward_classifier sect"),
        (["reward_classifier={label: A, path: m}"], "reward_classifier: found beside reward_model, expected one of"),
        (["evaluation.judge=reward_classifier"], "evaluation.judge: found reward_classifier, expected a reward_class"),
        (
            ["reward_model=null", "reward_classifier={label: A}"],
            "reward_classifier: found no source, expected exactly one of path, hub_name or train_path",
        ),
        (
            ["reward_model=null", "reward_classifier={label: A, path: m, train_path: t}"],
            "reward_classifier: found path and train_path, expected exactly one of path, hub_name or train_path",
        ),
        (
            ["reward_model=null", "reward_classifier={label: GOOD, train_path: t}"],
            "reward_classifier.label: found 'GOOD', expected one of label_names: NEGATIVE, POSITIVE",
        ),
        (
            ["reward_model=null", "reward_classifier={label: A, train_path: t, label_names: [A, A]}"],
            "reward_classifier.label_names: found A, A, expected different names",
        ),
        (
            ["reward_model=null", "reward_classifier={label: POSITIVE, train_path: t, hidden_size: 68}"],
            "reward_classifier.hidden_size: found 68, expected an even multiple of 4 heads",
        ),
        (["data.text_field=text"], "data.text_field: found beside world_rows"),
        ([*TEXTS, "feedback={}"], "feedback: votes on plain texts cannot be taken in"),
        ([*TEXTS, "formatting.prefix_tokens_min=9"], "formatting.prefix_tokens_min: found 9, expected at most pre"),
        ([*TEXTS, "formatting.prefix_tokens_max=121"], "formatting.prefix_tokens_max: found 121, expected at most max"),
        (["formatting.prefix_tokens_min=3"], "formatting.prefix_tokens_min: only plain texts use it"),
        (["formatting.prefix_tokens_max=9"], "formatting.prefix_tokens_max: only plain texts use it"),
        (["data.min_chars=2001"], "data.min_chars: found 2001, expected at most max_chars (2000)"),
        (["data.validation_fraction=0.4", "data.test_fraction=0.4"], "leave under a fifth of the prompts"),
        (["base_model.hidden_size=33"], "base_model.hidden_size: found 33, expected a multiple of 2 heads"),
        (["formatting.max_tokens=241"], "base_model.max_positions: found 240, expected at least 241"),
        (["sampling.max_new_tokens=121"], "base_model.max_positions: found 240, expected at least 241"),
        (["ppo.max_new_tokens=121"], "base_model.max_positions: found 240, expected at least 241"),
        (["evaluation.max_new_tokens=121"], "base_model.max_positions: found 240, expected at least 241"),
        (["ppo.minibatch_size=3"], "ppo.minibatch_size: found 3, expected a divisor of rollout_batch_size (8)"),
        (["ppo.microbatch_size=3"], "ppo.microbatch_size: found 3, expected a divisor of minibatch_size (4)"),
        (["ppo.max_new_tokens_min=25"], "ppo.max_new_tokens_min: found 25, expected at most max_new_tokens (24)"),
        (["ppo.value_warmup_updates=3"], "ppo.value_warmup_updates: found 3, expected fewer than updates (3)"),
        (
            ["ppo.value_trunk=reward_model", "ppo.reward_function=rewards.py:reward"],
            "ppo.value_trunk: found reward_model, but PPO is not rewarded by a reward_model section",
        ),
        (
            ["ppo.value_trunk=reward_model", "reward_model.path=m"],
            "ppo.value_trunk: found reward_model, which starts from a model of its own that cannot read the policy's",
        ),
        (
            ["reward_model.path=m", "reward_model.hub_name=a/b"],
            "reward_model: found both path and hub_name, expected one; set the other to null",
        ),
        (["ppo.kl_target_nats=6", "ppo.kl_horizon=7"], "ppo.kl_horizon: found 7, expected at least rollout_batch_size"),
        (["ppo.reward_function=rewards"], "expected file.py:function"),
        (["evaluation=null", "decoding=null"], "evaluation: missing, expected one beside sft and ppo and dpo"),
        (["labelling.method=dataset_pair"], "labelling.method: found dataset_pair, but rows are no pairs; expected da"),
        (
            [*TEXTS, "data.text_field=null", "data.form=preferences", "labelling.method=dataset_pair"],
            "sampling: found beside labelling.method dataset_pair, which uses no samples",
        ),
        (["formatting.template=human_assistant"], "feedback: votes go into the instruction template only"),
        (["formatting.template=chat", "feedback=null"], "formatting.template: found chat, but a built base model has"),
        ([*TEXTS, "formatting.template=human_assistant"], "formatting.template: found human_assistant, but plain"),
        (["ppo.kl_target_nats=6", "ppo.kl_coef=0"], "ppo.kl_target_nats: found with kl_coef 0, which it could never"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused_before_anything_runs(overrides: list[str], expected: str) -> None:
    message = error_of(*overrides)
    assert message.startswith(f"{SMOKE}: ")
    assert expected in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo=null", "reward_model=null"],
        ["feedback=null"],
        ["sampling=null", "labelling=null"],
        ["sft=null"],
        ["base_model.path=m", "formatting.max_tokens=4000"],
        ["base_model.path=m", "formatting.template=chat", "feedback=null"],
        ["formatting.template=human_assistant", "feedback=null"],
        ["evaluation=null", "sft=null", "ppo=null", "dpo=null", "decoding=null"],
        [
            "data.world_rows=null",
            "data.path=pairs.jsonl",
            "data.form=preferences",
            "labelling.method=dataset_pair",
            "sampling=null",
            "feedback=null",
            "evaluation=null",
            "sft=null",
            "ppo=null",
            "dpo=null",
            "decoding=null",
        ],
        ["base_model.hub_name=a/b", "base_model.hidden_size=33"],
        ["data.world_rows=null", "data.path=rows.jsonl", "evaluation.judge=reference_chrf"],
        ["formatting.max_tokens=240", "sampling.max_new_tokens=120"],
        ["reward_model=null", "ppo.reward_function=rewards.py:reward"],
        ["reward_model.hub_name=a/b", "reward_model.max_tokens=100", "ppo.value_trunk=separate"],
        ["ppo.microbatch_size=4", "ppo.max_new_tokens_min=24", "ppo.value_warmup_updates=2"],
        ["ppo.microbatch_size=2", "ppo.kl_target_nats=6", "ppo.kl_coef=0.01", "ppo.value_trunk=reward_model"],
        ["reward_model=null", "reward_classifier={label: A, path: m}", "evaluation.judge=reward_classifier"],
        ["reward_model=null", "reward_classifier={label: A, hub_name: a/b, hidden_size: 67}"],
        ["reward_model=null", "reward_classifier={label: A, train_path: t, label_names: [A, B]}"],
        [*TEXTS, "formatting.prefix_tokens_min=3", "formatting.prefix_tokens_max=3", "data.min_chars=200"],
    ],
    ids=" ".join,
)
def test_a_combination_that_can_work_is_accepted(overrides: list[str]) -> None:
    smoke_with(*overrides)


def test_the_name_has_to_be_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(SMOKE.read_text())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: name: found 'smoke', expected 'other', as the file is called."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: [1, 2", "is not YAML: "),
        (b"- 1\n", "found a list, expected a mapping of sections such as data and sft."),
        (b"", "found nothing, expected a mapping of sections"),
        (b"\xff\xfe\x00", "cannot be read ("),
        (b"!!python/object/apply:os.system ['true']", "is not YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read .*; expected a recipe YAML file"):
        load_recipe(tmp_path / "gone.yaml")


def test_overrides_reach_nested_keys_and_keep_the_others() -> None:
    recipe, plain = smoke_with("seed=7", "sft.batch_size=4", "sft.lora_targets=[q_proj, v_proj]"), smoke_with()
    assert (recipe.seed, recipe.sft.batch_size, recipe.sft.lora_targets) == (7, 4, ["q_proj", "v_proj"])
    changed = {"sft": plain.sft.model_copy(update={"batch_size": 4, "lora_targets": ["q_proj", "v_proj"]}), "seed": 7}
    assert recipe == plain.model_copy(update=changed)


def test_an_override_may_add_a_section_that_the_file_lacks_or_has_empty() -> None:
    assert smoke_with("sft=null", "sft.max_steps=3").sft.max_steps == 3
    assert smoke_with("feedback.max_chars=50").feedback.max_chars == 50


@pytest.mark.parametrize("spelling", ["1e-4", "1E-04", "0.0001", "+1.0e-4"])
def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path, spelling: str) -> None:
    assert smoke_with(f"sft.learning_rate={spelling}").sft.learning_rate == 1e-4
    path = tmp_path / "smoke.yaml"
    path.write_text(SMOKE.read_text().replace("learning_rate: 5e-3  ", f"learning_rate: {spelling}  "))
    assert load_recipe(path).sft.learning_rate == 1e-4


def test_a_commit_hash_that_looks_like_a_number_stays_text() -> None:
    recipe = smoke_with("data.world_rows=null", "data.hub_name=a/b", "data.hub_revision=12e4567",
                        "evaluation.judge=reference_chrf")  # fmt: skip
    assert recipe.data.hub_revision == "12e4567"


def test_a_hub_name_may_bring_its_revision_which_another_name_does_not_keep() -> None:
    from_hub = ["data.world_rows=null", "evaluation.judge=reference_chrf", "data.hub_name=a/b@12e4567"]
    assert smoke_with(*from_hub).data.model_dump(include={"hub_name", "hub_revision"}) == {
        "hub_name": "a/b", "hub_revision": "12e4567",
    }  # fmt: skip
    assert smoke_with(*from_hub, "data.hub_name=c/d").data.hub_revision is None
    with pytest.raises(RecipeError, match=r"hub_name: found a/b@12e4567 beside hub_revision, expected the revision in"):
        smoke_with(*from_hub, "data.hub_revision=v1")
    for name in ("a/b@", "@v1"):
        with pytest.raises(RecipeError, match=f"hub_name: found {name}, expected owner/name or owner/name@revision"):
            smoke_with(*from_hub, f"data.hub_name='{name}'")


def test_null_takes_a_section_or_a_value_away() -> None:
    recipe = smoke_with("ppo=null", "sft.max_steps=null")
    assert recipe.ppo is None
    assert recipe.sft.max_steps is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rate", "expected key=value, for example sft.learning_rate=1e-4"),
        ("=1", "expected key=value"),
        ("sft.learning_rate=[1", "the value is not YAML: "),
        ("seed.x=1", "seed is an integer, not a section"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(override: str, expected: str) -> None:
    message = error_of(override)
    assert message.startswith(f"--set {override}: ")
    assert expected in message


def test_a_path_on_the_command_line_is_relative_to_the_current_folder_and_in_a_file_to_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    external = ("data.world_rows=null", "evaluation.judge=reference_chrf")
    assert smoke_with(*external, "data.path=rows.jsonl").data.path == str(here / "rows.jsonl")
    assert smoke_with(*external, "data.path=~/rows.jsonl").data.path == str(tmp_path / "home" / "rows.jsonl")
    assert smoke_with("base_model.path=../model").base_model.path == str(tmp_path / "model")
    classifier = smoke_with("reward_model=null", "reward_classifier={label: POSITIVE}",
                            "reward_classifier.train_path=rows.jsonl").reward_classifier  # fmt: skip
    assert classifier.train_path == str(here / "rows.jsonl")
    path = tmp_path / "recipes" / "smoke.yaml"
    path.parent.mkdir()
    path.write_text(SMOKE.read_text().replace("world_rows: 300", "path: ../rows.jsonl"))
    recipe = load_recipe(path, ["evaluation.judge=reference_chrf"])
    assert recipe.data.path == str(tmp_path / "rows.jsonl")
    shipped = load_recipe(SMOKE.with_name("stories_sentiment.yaml"))
    assert shipped.reward_classifier.train_path == str(SMOKE.parents[1] / "data/sst2/sst2_sentences_train.jsonl")


def test_loading_a_recipe_imports_neither_torch_nor_an_orchestrator() -> None:
    code = (
        "import sys; from pathlib import Path; from alignment_pipeline.recipe import load_recipe;"
        "from alignment_pipeline.graph import build_graph; build_graph(load_recipe(Path(sys.argv[1])));"
        "print(sorted({'torch', 'transformers', 'dagster', 'duckdb', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SMOKE)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("override", ["sft.max_steps=yes", "ppo.kl_coef=true", "data.hub_name=no"])
def test_a_boolean_is_no_number_and_no_text(override: str) -> None:
    with pytest.raises(RecipeError, match=rf"{override.split('=')[0]}.*boolean.*expected"):
        smoke_with(override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.num_beams=5"], "evaluation: num_beams: found 5 with temperature 1, expected temperature 0"),
        (["evaluation.temperature=0", "evaluation.top_k=4"], "evaluation: top_k: found 4 with temperature 0, which is"),
        (["evaluation.temperature=0", "evaluation.top_p=0.9"], "evaluation: top_p: found 0.9 with temperature 0"),
        (["evaluation.min_new_tokens=25"], "min_new_tokens: found 25, expected at most max_new_tokens (24)"),
        (["evaluation.top_p=1.5"], "evaluation.top_p: found 1.5 (a number), expected less than or equal to 1"),
        (["evaluation.repetition_penalty=0"], "found 0 (an integer), expected greater than 0"),
        (["decoding.num_beams=[1]"], "decoding.num_beams.0: found 1 (an integer), expected greater than or equal to 2"),
        (["decoding.min_new_tokens=[4, 17]"], "min_new_tokens: found 17, expected at most max_new_tokens (16)"),
        (["decoding.max_lengths=[4, 17]"], "max_lengths: found 17, expected at most max_new_tokens (16)"),
        (
            ["decoding.temperatures=[]", "decoding.top_ps=[]", "decoding.num_beams=[]"],
            "decoding: found no value of any knob, expected at least one",
        ),
        (["decoding.policy=gpt4"], "decoding.policy: found 'gpt4' (text), expected 'base_model', 'sft_model'"),
        (
            ["ppo=null", "decoding.policy=ppo_policy"],
            "decoding.policy: found ppo_policy, expected one of the recipe's: base_model, sft_model, dpo_policy",
        ),
        (["decoding.judge=reward_classifier"], "found reward_classifier, expected a reward_classifier section"),
        ([*TEXTS, "decoding.judge=gold_rule"], "decoding.judge: found gold_rule, which judges the built-in world only"),
        (["decoding.max_new_tokens=150"], "base_model.max_positions: found 240, expected at least 270"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_decoding_that_cannot_be_is_refused_in_a_sentence(overrides: list[str], expected: str) -> None:
    message = error_of(*overrides)
    assert expected in message and "\n" not in message


def test_a_sweep_that_names_no_judge_has_the_evaluations() -> None:
    for judge in ("gold_rule", "reference_chrf"):
        decoding = smoke_with(f"evaluation.judge={judge}").decoding
        assert decoding is not None and decoding.judge == judge
    decoding = smoke_with("decoding.judge=reference_chrf").decoding
    assert decoding is not None and decoding.judge == "reference_chrf"
