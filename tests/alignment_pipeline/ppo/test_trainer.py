import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import NonFiniteError, RecipeError
from alignment_pipeline.ppo.losses import masked_mean, policy_losses, value_losses
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.ppo.rewards import adapted_kl_coef
from alignment_pipeline.ppo.trainer import PpoTrainer, learning_rate_share
from alignment_pipeline.reward import RewardEncoder, RewardScorer
from alignment_pipeline.scorers import RewardModelScorer, SharedTrunkScorer

# One step's gradients, summed over tokens in another order: float32, relative to the largest of a tensor.
ROUNDING = 1e-5
NOT_CLIPPED = 1e9
TRUNKS = [*itertools.product(["lora", "full"], ["shared", "detached", "separate"])]
Cases = Callable[..., Any]


class Steps:
    """Gradients and learning rates of every optimizer step, and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[list[list[torch.Tensor]]] = []  # step → group → tensors
        self.rates: list[list[float]] = []
        self.weights: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.rates)

    def flat(self, step: int, group: int) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in self.gradients[step][group]])

    def norm(self, step: int) -> float:
        return torch.cat([self.flat(step, group) for group in range(2)]).norm().item()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    taken, original = Steps(), torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
        taken.gradients.append(
            [[p.grad.clone() for p in group["params"] if p.grad is not None] for group in self.param_groups]
        )
        taken.rates.append([group["lr"] for group in self.param_groups])
        done = original(self, *arguments)
        taken.weights.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return taken


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def same_to_the_bit(first: Any, second: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers are the same."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_to_the_bit(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_to_the_bit, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


def snapshot(trainer: PpoTrainer) -> dict[str, Any]:
    """The trainer's state as a checkpoint keeps it: written and read, so that nothing is shared."""
    buffer = io.BytesIO()
    torch.save(trainer.state(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    return state


@pytest.mark.parametrize("value_trunk", ["shared", "separate"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_eight_microbatches_of_a_row_are_one_of_eight_rows(
    ppo_case: Cases, steps: Steps, method: str, value_trunk: str
) -> None:
    settings = {"method": method, "value_trunk": value_trunk, "minibatch_size": 8, "ppo_epochs": 1,
                "max_grad_norm": NOT_CLIPPED, "entropy_coef": 0.1, "value_coef": 1.0}  # fmt: skip
    for microbatch_size in (8, 1, 2):
        trainer = ppo_case(microbatch_size=microbatch_size, **settings).shaken().trainer()
        trainer.update()
        assert trainer.rollout is not None
        # Unequal lengths: a mean of microbatches' means would be another one.
        assert len({len(response.token_ids) for response in trainer.rollout.responses}) > 3
    for group, other in itertools.product(range(2), (1, 2)):
        whole, parts = steps.flat(0, group), steps.flat(other, group)
        torch.testing.assert_close(parts, whole, rtol=0, atol=ROUNDING * whole.abs().max().item())


def test_a_steps_gradient_is_that_of_the_means_over_all_its_tokens(ppo_case: Cases, steps: Steps) -> None:
    settings = {"minibatch_size": 8, "ppo_epochs": 2, "microbatch_size": 2, "entropy_coef": 0.1, "value_coef": 0.7,
                "max_grad_norm": NOT_CLIPPED, "temperature": 0.8}  # fmt: skip
    case = ppo_case(**settings).shaken()
    trainer = case.trainer()
    trainer.update()
    rollout, config = trainer.rollout, case.config
    assert rollout is not None
    with torch.no_grad():  # back to after the first step: then ratios are not 1, and the clips matter
        parameters = [*case.policy.policy_parameters(), *case.policy.value_parameters()]
        for parameter, value in zip(parameters, steps.weights[0], strict=True):
            parameter.copy_(value)
    now = case.policy.evaluate(rollout.batch, config.temperature)
    surrogate, clipped = policy_losses(
        now.logprobs, rollout.old_logprobs, rollout.advantages, rollout.mask, config.clip_range
    )
    error, _ = value_losses(now.values, rollout.old_values, rollout.returns, rollout.mask, config.value_clip_range)
    loss = (
        masked_mean(surrogate, rollout.mask)
        + 0.7 * masked_mean(error, rollout.mask)
        - 0.1 * masked_mean(now.entropies, rollout.mask)
    )
    expected = torch.autograd.grad(loss, case.policy.policy_parameters())
    flat = torch.cat([gradient.flatten() for gradient in expected])
    torch.testing.assert_close(steps.flat(1, 0), flat, rtol=0, atol=ROUNDING * flat.abs().max().item())
    assert clipped.any()


@pytest.mark.parametrize(("minibatch_size", "epochs", "microbatch_size"), [(4, 2, 1), (2, 3, None), (8, 1, 4)])
def test_there_is_one_optimizer_step_a_minibatch(
    ppo_case: Cases, steps: Steps, minibatch_size: int, epochs: int, microbatch_size: int | None
) -> None:
    sizes = {"minibatch_size": minibatch_size, "ppo_epochs": epochs, "microbatch_size": microbatch_size}
    metrics = ppo_case(**sizes).trainer().update()
    assert len(steps) == metrics["train/steps"] == epochs * 8 // minibatch_size


@pytest.mark.parametrize("microbatch_size", [None, 1, 2])
def test_the_first_pass_over_a_rollout_has_ratio_one_and_no_clip_exactly(
    ppo_case: Cases, microbatch_size: int | None
) -> None:
    sizes = {"minibatch_size": 8, "ppo_epochs": 1, "microbatch_size": microbatch_size}
    metrics = ppo_case(temperature=0.7, **sizes).shaken().trainer().update()
    assert (metrics["policy/ratio"], metrics["policy/approx_kl"]) == (1.0, 0.0)
    assert metrics["policy/clip_fraction"] == metrics["value/clip_fraction"] == 0.0


def test_the_head_is_applied_to_each_response_token_once_for_each_use(ppo_case: Cases) -> None:
    case, rows = ppo_case(microbatch_size=2, ppo_epochs=2), []
    head = case.policy.model.get_base_model().get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel() // args[0].shape[-1]))
    trainer = case.trainer()
    trainer.update()
    assert trainer.rollout is not None
    # Sampling, old and reference log-probabilities, and one for each epoch.
    assert sum(rows) == 5 * int(trainer.rollout.mask.sum()) < 2 * trainer.rollout.batch.input_ids.numel()


def test_gradients_are_clipped_to_their_norm_and_the_norm_before_is_reported(ppo_case: Cases, steps: Steps) -> None:
    sizes = {"minibatch_size": 8, "ppo_epochs": 1}
    free = ppo_case(max_grad_norm=NOT_CLIPPED, **sizes).shaken().trainer().update()
    clipped = ppo_case(max_grad_norm=1e-3, **sizes).shaken().trainer().update()
    assert clipped["train/grad_norm"] == free["train/grad_norm"] == pytest.approx(steps.norm(0), rel=ROUNDING)
    assert free["train/grad_norm"] > 0.01
    assert steps.norm(1) == pytest.approx(1e-3, rel=0.01)  # torch adds 1e-6 to the norm


def test_a_kl_that_is_too_high_ends_the_update_before_its_step(ppo_case: Cases, steps: Steps) -> None:
    case = ppo_case(approx_kl_stop=1e-6, ppo_epochs=3).shaken()
    metrics = case.trainer().update()
    assert len(steps) == metrics["train/steps"] == 1.0  # of six; the first one's KL is 0
    weights = [*case.policy.policy_parameters(), *case.policy.value_parameters()]
    assert all(map(torch.equal, weights, steps.weights[0]))
    assert metrics["policy/approx_kl"] > 1e-6 / 2  # a mean over the step and the one that was not taken
    patient = ppo_case(approx_kl_stop=100.0, ppo_epochs=3).shaken().trainer().update()
    assert patient["train/steps"] == 6.0


@pytest.mark.parametrize(("method", "value_trunk"), TRUNKS)
def test_the_value_models_warm_up_leaves_the_policy_to_the_bit(ppo_case: Cases, method: str, value_trunk: str) -> None:
    case = ppo_case(method=method, value_trunk=value_trunk, value_warmup_updates=2)
    trainer, policy = case.trainer(), case.policy
    policy_before = [parameter.clone() for parameter in policy.policy_parameters()]
    for _ in range(2):
        value_before = [parameter.clone() for parameter in policy.value_parameters()]
        metrics = trainer.update()
        assert all(map(torch.equal, policy.policy_parameters(), policy_before))
        assert not any(map(torch.equal, policy.value_parameters()[:2], value_before[:2]))
        assert metrics["objective/kl"] == 0.0
    trainer.update()
    assert not all(map(torch.equal, policy.policy_parameters(), policy_before))


@pytest.mark.parametrize("value_trunk", ["shared", "detached", "separate"])
def test_the_weight_of_the_value_loss_matters_to_the_policy_on_a_shared_trunk_only(
    ppo_case: Cases, steps: Steps, value_trunk: str
) -> None:
    for value_coef in (0.0, 5.0):
        settings = {"value_trunk": value_trunk, "value_coef": value_coef, "max_grad_norm": NOT_CLIPPED}
        ppo_case(minibatch_size=8, ppo_epochs=1, **settings).shaken().trainer().update()
    assert torch.equal(steps.flat(0, 0), steps.flat(1, 0)) == (value_trunk != "shared")
    assert (steps.flat(0, 1) == 0).all() and (steps.flat(1, 1) != 0).any()


def test_the_entropy_bonus_raises_the_entropy_and_nothing_else_moves_without_a_reward(ppo_case: Cases) -> None:
    plain = {"score": lambda prompts, responses: [0.0] * len(prompts), "kl_coef": 0.0, "missing_eos_penalty": 0.0,
             "max_new_tokens_min": 8, "updates": 8}  # fmt: skip
    still, moved = ppo_case(**plain), ppo_case(entropy_coef=0.1, **plain)
    before = still.weights()
    still.trainer().update()
    assert same_to_the_bit(still.weights(), before)
    trainer = moved.trainer()
    entropies = [trainer.update()["policy/entropy"] for _ in range(8)]
    # From 5.0 to 5.33 nats of the 5.70 that 300 tokens allow; which responses were sampled moves it by 0.05.
    assert entropies[-1] > entropies[0] + 0.2
    assert entropies[-1] > entropies[3] > entropies[0]


def test_learning_rates_follow_their_schedule_and_the_values_may_have_their_own(ppo_case: Cases, steps: Steps) -> None:
    trainer = ppo_case(learning_rate=1e-3, value_learning_rate=5e-3, ppo_epochs=1, minibatch_size=8).trainer()
    reported = [trainer.update()["train/learning_rate"] for _ in range(4)]
    assert reported == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [rate for rates in steps.rates for rate in rates] == pytest.approx(
        [1e-3, 5e-3, 0.75e-3, 3.75e-3, 0.5e-3, 2.5e-3, 0.25e-3, 1.25e-3]
    )


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("constant", 0.25, [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_shares_of_the_learning_rate_by_hand(schedule: Any, warmup: float, expected: list[float]) -> None:
    config = PpoConfig(updates=4, schedule=schedule, warmup_fraction=warmup)
    assert [learning_rate_share(update, config) for update in range(4)] == pytest.approx(expected)


def test_the_kl_coefficient_of_each_update_is_what_the_kl_before_made_of_it(ppo_case: Cases) -> None:
    trainer = ppo_case(kl_target_nats=0.5, kl_horizon=20, kl_coef=0.3).shaken().trainer()
    history, kl_coef = [trainer.update() for _ in range(4)], 0.3
    for metrics in history:
        assert metrics["objective/kl_coef"] == pytest.approx(kl_coef, rel=1e-9)
        kl_coef = adapted_kl_coef(kl_coef, metrics["objective/kl"], 0.5, episodes=8, horizon=20)
    assert len({metrics["objective/kl_coef"] for metrics in history}) == 4
    fixed = ppo_case(kl_coef=0.3).shaken().trainer()
    assert {fixed.update()["objective/kl_coef"] for _ in range(3)} == {0.3}


def test_each_update_draws_its_prompts_anew_and_by_the_seed(ppo_case: Cases) -> None:
    def drawn(seed: int) -> list[list[str]]:
        trainer, rows = ppo_case(rollout_batch_size=8).trainer(seed), []
        for _ in range(3):
            trainer.update()
            assert trainer.rollout is not None
            rows.append([prompt.row_id for prompt in trainer.rollout.prompts])
        return rows

    first = drawn(0)
    assert all(len(set(rows)) == 8 for rows in first)
    assert first[0] != first[1] != first[2]
    assert drawn(0) == first != drawn(1)


def test_tokens_of_prompts_and_responses_are_counted(ppo_case: Cases) -> None:
    trainer, total = ppo_case().trainer(), 0
    for _ in range(2):
        metrics = trainer.update()
        assert trainer.rollout is not None
        total += sum(len(prompt.token_ids) for prompt in trainer.rollout.prompts)
        total += sum(len(response.token_ids) for response in trainer.rollout.responses)
        assert metrics["train/tokens"] == total


@pytest.mark.parametrize(("method", "value_trunk"), TRUNKS)
def test_a_trainer_goes_on_from_its_state_to_the_bit(ppo_case: Cases, method: str, value_trunk: str) -> None:
    settings = {"method": method, "value_trunk": value_trunk, "score_normalization": "running", "kl_target_nats": 1.0,
                "kl_horizon": 50, "value_warmup_updates": 1, "schedule": "cosine"}  # fmt: skip
    whole = ppo_case(**settings).trainer()
    first = [whole.update() for _ in range(2)]
    state = snapshot(whole)
    expected = [without_times(whole.update()) for _ in range(2)]
    resumed = ppo_case(**settings).trainer()
    resumed.load_state(state)
    assert [without_times(resumed.update()) for _ in range(2)] == expected
    assert same_to_the_bit(resumed.state(), whole.state())
    assert first[0]["objective/kl_coef"] != expected[0]["objective/kl_coef"]


class TestValuesThatStartAsTheRewardModel:
    @pytest.fixture(params=["on the policy's trunk", "in its own memory"])
    def rewarded(
        self, request: pytest.FixtureRequest, ppo_case: Cases, reward_artifact: Callable[[str], tuple[Path, Path]]
    ) -> Cases:
        """A case whose scores come from a reward model, as its values do at first."""
        trunk, reward = reward_artifact("opt")

        def made(**config: Any) -> Any:
            if request.param == "in its own memory":
                scorer = RewardScorer.load(reward, trunk)
                case = ppo_case(reward_model=scorer.model, value_trunk="reward_model", **config)
                case.score, case.frozen = RewardModelScorer(scorer, case.tokenizer, 4), scorer.model
                return case
            case = ppo_case(reward_adapter=reward, value_trunk="reward_model", **config)
            encoder = RewardEncoder(case.tokenizer, own=False, max_tokens=None)
            case.score, case.frozen = SharedTrunkScorer(case.policy, encoder, 4), None
            return case

        return made

    def test_they_are_trained_and_neither_policy_nor_reward_feel_it(self, rewarded: Cases, steps: Steps) -> None:
        for value_coef in (0.0, 5.0):
            case = rewarded(value_coef=value_coef, max_grad_norm=NOT_CLIPPED, minibatch_size=8, ppo_epochs=2)
            values, reward = [p.clone() for p in case.policy.value_parameters()], reward_parameters(case)
            assert len(values) > 2 and len(reward) > 2
            case.trainer().update()
            moved = [not torch.equal(*pair) for pair in zip(case.policy.value_parameters(), values, strict=True)]
            assert sum(moved) > len(moved) / 2 if value_coef else not any(moved)
            assert same_to_the_bit(reward_parameters(case), reward)
        assert torch.equal(steps.flat(0, 0), steps.flat(2, 0))

    def test_microbatches_change_nothing(self, rewarded: Cases, steps: Steps) -> None:
        for microbatch_size in (8, 1):
            sizes = {"minibatch_size": 8, "ppo_epochs": 1, "microbatch_size": microbatch_size}
            rewarded(max_grad_norm=NOT_CLIPPED, value_coef=1.0, **sizes).trainer().update()
        for group in range(2):
            whole, parts = steps.flat(0, group), steps.flat(1, group)
            torch.testing.assert_close(parts, whole, rtol=0, atol=ROUNDING * whole.abs().max().item())

    def test_a_trainer_goes_on_from_its_state_to_the_bit(self, rewarded: Cases) -> None:
        whole = rewarded().trainer()
        for _ in range(2):
            whole.update()
        state = snapshot(whole)
        expected = without_times(whole.update())
        resumed = rewarded().trainer()
        resumed.load_state(state)
        assert without_times(resumed.update()) == expected
        assert same_to_the_bit(resumed.state(), whole.state())


def reward_parameters(case: Any) -> dict[str, torch.Tensor]:
    """A copy of what scores are made of: the reward adapter, or the reward model beside the policy."""
    if case.frozen is not None:
        return {name: tensor.clone() for name, tensor in case.frozen.state_dict().items()}
    return {name: p.detach().clone() for name, p in case.policy.model.named_parameters() if ".reward." in name}


class TestNumbersThatAreNotFinite:
    """Nothing that has seen a NaN or an infinity is kept."""

    @pytest.mark.parametrize(
        ("bad", "what", "rows"),
        [
            (math.nan, "the score", 1),
            (1e38, "a gradient", 8),  # finite, but its gradient's norm is not
        ],
    )
    def test_weights_and_optimizer_stay_and_the_next_update_is_as_if_nothing_had_been(
        self, ppo_case: Cases, bad: float, what: str, rows: int
    ) -> None:
        case = ppo_case(minibatch_size=8, ppo_epochs=1)
        plain, is_broken = case.score, []
        case.score = lambda p, r: [bad, *plain(p, r)[1:]] if is_broken else plain(p, r)
        trainer = case.trainer()
        trainer.update()
        before = snapshot(trainer)
        is_broken.append(True)
        with pytest.raises(NonFiniteError, match=f"Found {what} that is a NaN or an infinity") as caught:
            trainer.update()
        assert same_to_the_bit(trainer.state(), before)
        assert len(caught.value.row_ids) == rows
        assert all(name.startswith("row ") for name in caught.value.row_ids)
        is_broken.clear()
        again = without_times(trainer.update())
        undisturbed = ppo_case(minibatch_size=8, ppo_epochs=1).trainer()
        undisturbed.update()
        assert without_times(undisturbed.update()) == again
        assert same_to_the_bit(trainer.state(), undisturbed.state())

    def test_the_row_that_is_named_is_the_drawn_ones_and_not_its_number(self, ppo_case: Cases) -> None:
        seen: list[str] = []

        def broken(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
            seen.extend(prompt.row_id for prompt in prompts)
            return [0.0] * 5 + [math.inf] + [0.0] * (len(prompts) - 6)

        with pytest.raises(NonFiniteError) as caught:
            ppo_case(score=broken).trainer().update()
        assert caught.value.row_ids == (seen[5],) != ("row 5",)

    def test_good_steps_before_the_bad_one_are_kept(
        self, ppo_case: Cases, steps: Steps, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case, original, norms = ppo_case(minibatch_size=2, ppo_epochs=1), torch.nn.utils.clip_grad_norm_, []

        def third_is_infinite(parameters: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
            norms.append(original(parameters, limit))
            return norms[-1] if len(norms) < 3 else torch.tensor(math.inf)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", third_is_infinite)
        with pytest.raises(NonFiniteError, match="a gradient") as caught:
            case.trainer().update()
        weights = [*case.policy.policy_parameters(), *case.policy.value_parameters()]
        assert len(steps) == 2
        assert all(map(torch.equal, weights, steps.weights[-1]))
        assert len(caught.value.row_ids) == 2

    def test_log_probabilities(self, ppo_case: Cases) -> None:
        case = ppo_case()
        trainer = case.trainer()
        trainer.update()
        before = snapshot(trainer)["optimizer"]
        with torch.no_grad():
            case.policy.policy_parameters()[-1][0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="the log-probability of a token"):
            trainer.update()
        assert same_to_the_bit(snapshot(trainer)["optimizer"], before)


def test_a_minibatch_smaller_than_the_number_of_processes_is_refused(ppo_case: Any) -> None:
    case, processes = ppo_case(minibatch_size=2), Processes()
    processes.count = 3
    with pytest.raises(RecipeError, match=r"ppo.minibatch_size: found 2, expected at least the 3 processes"):
        PpoTrainer(case.policy, case.score, case.tokenizer, case.prompts, case.config, 0, processes)
