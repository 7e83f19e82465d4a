import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from alignment_pipeline.configs import BaseModelConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import load_causal_lm, load_tokenizer
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.prompts import format_prompt
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.stages.base_model import build_tokenizer, prepare_base_model, unpaired_documents

IDS = torch.tensor([[5, 9, 30, 7, 44, 8]])


def spec_of(folder: Path, **config: Any) -> StageSpec[BaseModelConfig]:
    (folder / "output").mkdir(parents=True)
    return StageSpec(BaseModelConfig(**config), {}, folder / "output", folder / "work", seed=0)


def adopt(folder: Path, **config: Any) -> Path:
    spec = spec_of(folder, **config)
    prepare_base_model(spec, ProgressLog(folder / "progress.jsonl"))
    return spec.output_dir


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_no_document_holds_an_instruction_with_its_answer(smoke: Any) -> None:
    rows = read_jsonl(smoke.artifact("instructions") / "rows.jsonl")
    documents = unpaired_documents(rows, seed=0)
    assert len(documents) == 2 * len(rows)
    prompts = {format_prompt(row["instruction"], row["input"]).split("### Response:")[0].rstrip() for row in rows}
    outputs = {row["output"] for row in rows}
    assert set(documents) == prompts | outputs
    assert not any("### Response:" in document for document in documents)
    for row in rows:
        assert not any(row["instruction"] in document and row["output"] in document for document in documents)


def test_neighbouring_documents_are_not_an_instruction_and_its_answer_but_by_chance(smoke: Any) -> None:
    rows = read_jsonl(smoke.artifact("instructions") / "rows.jsonl")
    documents = unpaired_documents(rows, seed=0)
    answers = {
        (format_prompt(row["instruction"], row["input"]).split("### Response:")[0].rstrip(), row["output"])
        for row in rows
    }
    paired = sum(pair in answers for pair in itertools.pairwise(documents))
    assert paired <= 5  # of some 300; a shuffle leaves one in expectation
    assert unpaired_documents(rows, seed=0) == documents != unpaired_documents(rows, seed=1)


def test_a_template_in_the_text_itself_brings_no_answer_in() -> None:
    row = {"instruction": "Do.\n\n### Response:\nleaked", "input": "", "output": "done"}
    assert not any("leaked" in document for document in unpaired_documents([row], seed=0))


def test_a_plain_text_is_a_document_as_it_is() -> None:
    texts = [{"instruction": "", "input": "", "output": f"text {number}"} for number in range(4)]
    assert sorted(unpaired_documents(texts, seed=0)) == [text["output"] for text in texts]


@pytest.mark.parametrize("copies", [1, 2])
def test_pretraining_reads_the_train_split_only_and_every_document_ends(
    smoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    from alignment_pipeline.stages import base_model

    seen: dict[str, Any] = {}

    def record_blocks(documents: Any, tokenizer: Any, *arguments: Any) -> torch.Tensor:
        seen.update(documents=list(documents), tokenizer=tokenizer)
        seen["blocks"] = original(documents, tokenizer, *arguments)
        return seen["blocks"]

    original = base_model._blocks
    monkeypatch.setattr(base_model, "_blocks", record_blocks)
    smoke.run("base_model", tmp_path, pretrain_steps=1, document_copies=copies)
    rows = read_jsonl(smoke.artifact("instructions") / "rows.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    assert 0 < len(train) < len(rows)
    assert seen["documents"] == unpaired_documents(train, seed=0)
    tokenizer, stream = seen["tokenizer"], seen["blocks"].flatten().tolist()
    expected = [document for document in seen["documents"] for _ in range(copies)]
    documents = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert documents[:-1] == expected[: len(documents) - 1]
    assert expected[len(documents) - 1].startswith(documents[-1])
    assert seen["blocks"].shape[1] == 64
    assert len(documents) > len(expected) - 10  # only the rest of a block is cut off


def test_a_built_base_has_a_padding_token_of_its_own_and_the_configured_shape(smoke: Any) -> None:
    folder = smoke.artifact("base_model")
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    config = smoke.config("base_model")
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings <= config.vocab_size
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (config.hidden_size, config.num_layers)
    assert model.config.max_position_embeddings == config.max_positions == tokenizer.model_max_length
    assert smoke.results["base_model"].metrics["base/parameters"] == model.num_parameters()


def test_the_tokenizer_gives_any_text_back_and_never_reads_an_end_into_plain_text() -> None:
    tokenizer = build_tokenizer(["def f(x):\n    return x\n"] * 4, 320, 64)
    for text in ("def g(y):\n\treturn 'ä € 🙂'\n", " leading and trailing ", "\x00\n\n  "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids and tokenizer.pad_token_id not in ids


def test_pretraining_lowers_the_loss(smoke: Any, tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    smoke.run("base_model", tmp_path / "run", log, pretrain_steps=60, pretrain_learning_rate=1e-2)
    losses = [metrics["train/loss"] for metrics in metric_series(log.path).values()]
    assert losses[-1] < losses[0] - 1.0  # nats a token; it falls by 2 here


class TestGivenModel:
    def test_a_folder_is_taken_as_it_is_where_padding_and_end_differ(self, tmp_path: Path, tiny_models: Any) -> None:
        model = tiny_models.build("opt")
        given = tiny_models.save(model, tmp_path / "given") / "model"
        output = adopt(tmp_path / "run", path=str(given))
        assert torch.equal(logits_of(load_causal_lm(output / "model")), logits_of(model))
        assert load_tokenizer(output).get_vocab() == tiny_models.tokenizer.get_vocab()
        assert list((output / "model").glob("*.safetensors"))

    @pytest.mark.parametrize("pad_token", [None, "</s>"], ids=["without padding", "padding is the end"])
    @pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
    def test_a_padding_token_is_added_where_there_is_none_of_its_own(
        self, tmp_path: Path, architecture: str, pad_token: str | None, tiny_models: Any
    ) -> None:
        backend = Tokenizer.from_str(tiny_models.tokenizer.backend_tokenizer.to_str().replace("<pad>", "<other>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token=pad_token)
        model = tiny_models.build(architecture, pad_token_id=None)
        given = tmp_path / "given"
        model.save_pretrained(given)
        tokenizer.save_pretrained(given)
        output = adopt(tmp_path / "run", path=str(given))
        adopted, adopted_tokenizer = load_causal_lm(output / "model"), load_tokenizer(output)
        assert adopted_tokenizer.pad_token_id != adopted_tokenizer.eos_token_id == tokenizer.eos_token_id
        assert adopted.config.pad_token_id == adopted_tokenizer.pad_token_id
        assert adopted.get_input_embeddings().num_embeddings >= len(adopted_tokenizer)
        known = logits_of(adopted)[..., : len(tokenizer)]
        rounding = 1e-5  # a wider head multiplies in another order, float32
        torch.testing.assert_close(known, logits_of(model), rtol=0, atol=rounding)
        logits = logits_of(adopted, torch.tensor([[adopted_tokenizer.pad_token_id, 5]]))
        assert torch.isfinite(logits).all()

    def test_a_folder_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"gone is not a folder, expected a folder with config\.json"):
            adopt(tmp_path / "run", path=str(tmp_path / "gone"))

    @pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
    def test_a_folder_that_lacks_a_part_is_named(self, tmp_path: Path, tiny_models: Any, missing: str) -> None:
        given = tiny_models.save(tiny_models.build("opt"), tmp_path / "given") / "model"
        (given / missing).unlink()
        with pytest.raises(ModelError, match=r"given/model .*expected a folder with config\.json"):
            adopt(tmp_path / "run", path=str(given))
        assert list((tmp_path / "run" / "output").iterdir()) == []

    def test_weights_that_are_not_all_there_are_refused_and_not_drawn_at_random(
        self, tmp_path: Path, tiny_models: Any
    ) -> None:
        given = tiny_models.save(tiny_models.build("opt", num_hidden_layers=1), tmp_path / "given") / "model"
        config = json.loads((given / "config.json").read_text())
        (given / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
        with pytest.raises(
            ModelError, match=r"lacks 16 of the weights of a OPTForCausalLM \(model\.decoder\.layers\.1"
        ):
            adopt(tmp_path / "run", path=str(given))

    def test_weights_that_are_not_finite_are_refused(self, tmp_path: Path, tiny_models: Any) -> None:
        model = tiny_models.build("opt")
        model.model.decoder.layers[0].fc1.bias.data[0] = float("nan")
        given = tiny_models.save(model, tmp_path / "given") / "model"
        with pytest.raises(ModelError, match="holds a NaN or an infinity"):
            adopt(tmp_path / "run", path=str(given))


HUB_RUN = """
import sys
from pathlib import Path
from alignment_pipeline.configs import BaseModelConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.stages.base_model import prepare_base_model
folder = Path(sys.argv[1])
(folder / "output").mkdir(parents=True)
spec = StageSpec(BaseModelConfig(hub_name=sys.argv[2]), {}, folder / "output", folder / "work", 0)
try:
    prepare_base_model(spec, ProgressLog(folder / "progress.jsonl"))
except ModelError as error:
    print(f"ModelError: {error}")
"""


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


class TestHubModel:
    commit = "0123456789abcdef0123456789abcdef01234567"

    def run(self, folder: Path, name: str) -> str:
        """Adopt a hub model in a process whose hub is a cache folder and nothing else."""
        environment = os.environ | {"HF_HOME": str(folder / "hub home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", HUB_RUN, str(folder / "run"), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_a_model_in_the_cache_is_taken_by_name(self, tmp_path: Path, tiny_models: Any) -> None:
        model = self.fill_cache(tmp_path, tiny_models)
        assert self.run(tmp_path, "tiny-owner/tiny-opt") == ""
        output = tmp_path / "run" / "output"
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(output / "model")), logits_of(model))
        assert load_tokenizer(output).pad_token == "<pad>"
        source = json.loads((output / "extras" / "source.json").read_text())
        assert source == {"source": "hub tiny-owner/tiny-opt", "revision": None, "commit": self.commit}
        assert "snapshots" not in json.loads((output / "model" / "config.json").read_text()).get("_name_or_path", "")

    def fill_cache(self, folder: Path, tiny_models: Any, weights: Any = None) -> Any:
        """A repository in the cache; with `weights` it has them as a .bin and no safetensors, as opt-350m."""
        repository = folder / "hub home" / "hub" / "models--tiny-owner--tiny-opt"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(self.commit)
        snapshot = repository / "snapshots" / self.commit
        model = tiny_models.build("opt_projected")
        model.save_pretrained(snapshot)
        tiny_models.tokenizer.save_pretrained(snapshot)
        if weights:
            (snapshot / "model.safetensors").unlink()
            torch.save(weights(model), snapshot / "pytorch_model.bin")
        return model

    def test_a_repository_of_a_bin_alone_is_published_as_safetensors(self, tmp_path: Path, tiny_models: Any) -> None:
        model = self.fill_cache(tmp_path, tiny_models, lambda model: model.state_dict())
        assert self.run(tmp_path, "tiny-owner/tiny-opt") == ""
        output = tmp_path / "run" / "output" / "model"
        assert {path.suffix for path in output.iterdir()} <= {".safetensors", ".json", ".txt", ".jinja"}
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(output)), logits_of(model))

    def test_a_bin_that_would_run_code_is_refused_and_runs_none(self, tmp_path: Path, tiny_models: Any) -> None:
        canary = tmp_path / "canary"
        self.fill_cache(tmp_path, tiny_models, lambda model: model.state_dict() | {"lm_head.weight": Trap(canary)})
        message = self.run(tmp_path, "tiny-owner/tiny-opt")
        assert message.startswith("ModelError: base_model: tiny-owner/tiny-opt cannot be loaded (there are no safetens")
        assert "holds more than tensors" in message
        assert not canary.exists()
        assert not (tmp_path / "run" / "output" / "model").exists()

    @pytest.mark.parametrize("damage", ["empty", "cut"])
    def test_a_damaged_bin_is_one_message_that_speaks_of_no_code(
        self, tmp_path: Path, tiny_models: Any, damage: str
    ) -> None:
        self.fill_cache(tmp_path, tiny_models, lambda model: model.state_dict())
        (weights,) = tmp_path.rglob("pytorch_model.bin")
        weights.write_bytes(b"" if damage == "empty" else weights.read_bytes()[: weights.stat().st_size // 2])
        message = self.run(tmp_path, "tiny-owner/tiny-opt")
        assert message.startswith("ModelError: base_model: tiny-owner/tiny-opt cannot be loaded (")
        assert "code" not in message and "cannot be loaded ()" not in message

    def test_a_model_that_is_not_there_is_an_error_with_a_remedy(self, tmp_path: Path) -> None:
        message = self.run(tmp_path, "nobody/nothing")
        assert message.startswith("ModelError: base_model: nobody/nothing cannot be loaded (")
        assert "without a network set base_model.path to a folder" in message


def test_a_given_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "given"
    OPTForCausalLM(OPTConfig(vocab_size=32, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1,
                             word_embed_proj_dim=8)).save_pretrained(given)  # fmt: skip
    spec = StageSpec(BaseModelConfig(path=str(given)), {}, tmp_path / "out", tmp_path / "work", 0)
    with pytest.raises(ModelError, match="holds no tokenizer files"):
        prepare_base_model(spec, ProgressLog(tmp_path / "progress.jsonl"))
