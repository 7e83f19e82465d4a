"""The least time that each phase of a PPO round could take on this machine, by its matrix products alone.

Counted are the products that the algorithm needs: 2 m k n floating-point operations each, no padding, the language
model's head where that side applies it. Two limits:

1. at peak: all operations at the rate of a large square product, the best that the machine does;
2. at these shapes: each product at the rate measured for its own shape. What is above this limit is everything that is
   not a matrix product (softmax over the vocabulary, layer norms, copies, Python), and padding.

Attention's products are a twentieth of the whole and counted in full, at peak; a causal kernel may skip half of them.
"""
# ruff: noqa: TID253  # torch is what is measured here; no part of the product imports benchmarks

import time
from collections import Counter
from dataclasses import dataclass

import torch
from ppo_vs_trl_workload import Workload

_SQUARE = 2048
_SECONDS_A_SHAPE = 0.2
_COPIES = 4  # right factors used in turn, as a model's layers are


@dataclass(frozen=True)
class Product:
    """(batch, m, k) × (batch, k, n)."""

    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def operations(self) -> int:
        """Floating-point operations, a multiplication and an addition counted as two."""
        return 2 * self.batch * self.m * self.k * self.n

    def gradients(self) -> tuple["Product", "Product"]:
        """The two products of its backward pass: for the left and for the right factor."""
        return Product(self.m, self.n, self.k, self.batch), Product(self.k, self.m, self.n, self.batch)


Products = Counter[Product]


@dataclass(frozen=True)
class Limit:
    """A phase's operations and its least seconds."""

    gigaflop: float
    seconds_at_peak: float
    seconds_at_these_shapes: float


def phase_products(workload: Workload, side: str, method: str) -> dict[str, Products]:
    """The matrix products of one update by phase; the names are those of the recorded phases."""
    rows, response = workload.rollouts, workload.response_tokens
    prompt = (workload.min_prompt_tokens + workload.max_prompt_tokens) // 2
    tokens, responses = rows * (prompt + response), rows * response
    trunk = _trunk(workload, tokens) + _attention(workload, prompt + response, prompt + response)
    head = Product(responses if side == "ours" else tokens, workload.hidden_size, workload.vocab_size)
    policy = trunk + Counter({head: 1})
    trained = _trained(workload, tokens, trunk, head, method)
    phases = {"sampling": _sampling(workload, prompt), "reference": policy, "reward": trunk}
    if side == "ours":
        phases["policy"] = policy
    else:
        phases["value"] = trunk
        trained = (trained[0] + trunk, trained[1] + _backward(trunk))
    phases["update_forward"], phases["backward"] = (_times(part, workload.ppo_epochs) for part in trained)
    return phases


def limits(workload: Workload, side: str, method: str, rates: "Rates") -> dict[str, Limit]:
    """Operations and least seconds of each phase."""
    found = {}
    for phase, products in phase_products(workload, side, method).items():
        operations = sum(product.operations * count for product, count in products.items())
        seconds = sum(product.operations * count / rates.of(product) for product, count in products.items())
        found[phase] = Limit(operations / 1e9, operations / rates.peak, seconds)
    return found


class Rates:
    """Measured rates of products, operations a second; float32, torch's threads as they are set."""

    def __init__(self) -> None:
        self.peak = _measure(Product(_SQUARE, _SQUARE, _SQUARE), copies=1)
        self._measured: dict[Product, float] = {}

    def of(self, product: Product) -> float:
        """Rate of one shape; attention's batched products count at the peak, since a fused kernel makes them."""
        if product.batch > 1:
            return self.peak
        if product not in self._measured:
            self._measured[product] = _measure(product, _COPIES)
        return self._measured[product]

    def measured(self) -> dict[str, float]:
        """Gigaflop a second by shape."""
        return {f"{p.m}×{p.k} · {p.k}×{p.n}": rate / 1e9 for p, rate in self._measured.items()}


def _measure(product: Product, copies: int) -> float:
    """The best of many short trials: noise of the machine only slows down."""
    left, rights = torch.randn(product.m, product.k), [torch.randn(product.k, product.n) for _ in range(copies)]
    best, deadline = float("inf"), time.perf_counter() + _SECONDS_A_SHAPE
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        for right in rights:
            torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return product.operations * copies / best


def _linears(workload: Workload, tokens: int) -> Products:
    """The linear layers of one transformer layer."""
    hidden, ffn = workload.hidden_size, workload.ffn_size
    return Counter(
        {Product(tokens, hidden, hidden): 4, Product(tokens, hidden, ffn): 1, Product(tokens, ffn, hidden): 1}
    )


def _trunk(workload: Workload, tokens: int) -> Products:
    return _times(_linears(workload, tokens), workload.num_layers)


def _attention(workload: Workload, queries: int, keys: int) -> Products:
    """Scores and weighted sums of all layers, one batch of rollouts."""
    batch, size = workload.rollouts * workload.num_heads, workload.hidden_size // workload.num_heads
    return Counter(
        {
            Product(queries, size, keys, batch): workload.num_layers,
            Product(queries, keys, size, batch): workload.num_layers,
        }
    )


def _sampling(workload: Workload, prompt: int) -> Products:
    """The prompts at once, then a token a step with a cache; the head on the last position."""
    rows, steps = workload.rollouts, workload.response_tokens
    products = _trunk(workload, rows * prompt) + _attention(workload, prompt, prompt)
    products += _times(_trunk(workload, rows), steps - 1)
    # The context grows by a token a step; all steps are counted at its mean.
    products += _times(_attention(workload, 1, prompt + steps // 2), steps - 1)
    return products + Counter({Product(rows, workload.hidden_size, workload.vocab_size): steps})


def _trained(workload: Workload, tokens: int, trunk: Products, head: Product, method: str) -> tuple[Products, Products]:
    """Forward and backward products of the policy in one epoch."""
    if method == "full":
        policy = trunk + Counter({head: 1})
        return policy, _backward(policy)
    adapters: Products = Counter()
    for product, count in _linears(workload, tokens).items():
        adapters[Product(tokens, product.k, workload.lora_rank)] += count * workload.num_layers
        adapters[Product(tokens, workload.lora_rank, product.n)] += count * workload.num_layers
    # Frozen weights pass gradients on to their inputs only; attention has no frozen factor.
    backward = _backward(adapters)
    for product, count in (*trunk.items(), (head, 1)):
        to_input, to_weight = product.gradients()
        backward[to_input] += count
        if product.batch > 1:
            backward[to_weight] += count
    return trunk + adapters + Counter({head: 1}), backward


def _backward(products: Products) -> Products:
    total: Products = Counter()
    for product, count in products.items():
        for gradient in product.gradients():
            total[gradient] += count
    return total


def _times(products: Products, factor: int) -> Products:
    return Counter({product: count * factor for product, count in products.items()})
