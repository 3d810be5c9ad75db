"""Adversarial transfer: an adapter whose hidden states do not tell the target's prompts from the source's.

T starts from the source's weights and keeps the task's loss on labelled rows; a small discriminator learns to
tell the domains apart by the pooled hidden states of one block, and T receives its gradient reversed (DANN,
arXiv 1505.07818). The discriminator plays its own turns on remembered states (the alternation of ADDA,
arXiv 1702.05464). Two collapses end the run: it never errs any more, or all of the target gets one label.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterhub_chat.training.job import HiddenStates

SOURCE, TARGET = 0, 1
WIDTH, MEMORY, TURNS = 64, 256, 4
"""Of the discriminator: its hidden layer, how many states it remembers, its own steps in one step of T."""
STRENGTH = 0.1
"""Weight of the reversed gradient at the end. An adapter's few steps move its states by the learning rate,
however small the gradient is: with DANN's 1 they leave the source's head behind (docs/transfer.md)."""
SERIOUS = 0.5
"""Share of STRENGTH from which on a collapse counts: before that, nobody works against it."""
ONE_CLASS = 0.1
"""Entropy of the labels that the target gets, as a share of the largest, under which it is one label."""


class DomainDiscriminator:
    """The discriminator, what it remembers, and what it has seen: an auxiliary loss of one job."""

    def __init__(
        self, width: int, steps: int, *, layer: int = -1, labels: Sequence[int] = (), seed: int = 0
    ) -> None:
        """Begin a game of `steps` steps on states of size `width`.

        `labels` are the first tokens of the labels' words, by which the target's labels are read; without
        them only the discriminator is watched.
        """
        self.layer, self.steps, self.labels = layer, steps, tuple(labels)
        self.window = max(5, steps // 3)
        self.step = 0
        self.stopped = ""
        self.accuracy: list[float] = []
        """Of the discriminator at each step, on new states; both domains count equally."""
        self._serious = 0
        self._guesses: deque[list[int]] = deque(maxlen=self.window)
        self._memory: deque[tuple[Tensor, int]] = deque(maxlen=MEMORY)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False),
                nn.Linear(width, WIDTH),
                nn.ReLU(),
                nn.Linear(WIDTH, 1),
                nn.Flatten(0),
            )
        self._optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=1e-3)

    @property
    def recent(self) -> float:
        """The discriminator's mean accuracy over the last steps, 0.5 before the first one."""
        recent = self.accuracy[-self.window :]
        return sum(recent) / len(recent) if recent else 0.5

    def loss(self, seen: HiddenStates) -> Tensor:
        """Return the discriminator's loss on these examples, its gradient reversed for whoever made them."""
        domains = torch.tensor([example.domain for example in seen.examples])
        self.discriminator.to(seen.pooled.device)
        self._watch(seen, domains)
        self._memory.extend(zip(seen.pooled.detach(), domains.tolist(), strict=True))
        self._learn()
        weight = STRENGTH * reversal_weight(self.step / self.steps)
        self.step += 1
        guess = self.discriminator(reverse_gradient(seen.pooled, weight))
        return domain_loss(guess, domains.to(guess.device))

    @torch.no_grad()
    def _watch(self, seen: HiddenStates, domains: Tensor) -> None:
        """Note how well the domains are told apart and which labels the target gets; raise the alarm."""
        right = (self.discriminator(seen.pooled) > 0).cpu() == (domains == TARGET)
        each = [right[domains == domain].float().mean() for domain in domains.unique()]
        self.accuracy.append(float(torch.stack(each).mean()))
        if self.labels:
            own = seen.logits[(domains == TARGET).to(seen.logits.device)]
            self._guesses.append(own[:, list(self.labels)].argmax(1).tolist())
        self._serious += reversal_weight(self.step / self.steps) >= SERIOUS
        if self._serious >= self.window:
            self.stopped = self._collapse()

    def _collapse(self) -> str:
        if min(self.accuracy[-self.window :]) == 1:
            return (
                f"collapsed: for {self.window} steps the discriminator has told source from target "
                "without an error, so nothing is learnt from it"
            )
        guesses = Counter(guess for step in self._guesses for guess in step)
        if self.labels and entropy_share(list(guesses.values()), len(self.labels)) < ONE_CLASS:
            return f"collapsed: for {self.window} steps nearly all target rows have got one label"
        return ""

    @torch.enable_grad()
    def _learn(self) -> None:
        """Let the discriminator learn from what it remembers."""
        states = torch.stack([state for state, _ in self._memory])
        domains = torch.tensor([domain for _, domain in self._memory]).to(states.device)
        for _ in range(TURNS):
            self._optimizer.zero_grad()  # also drops what the last step of T left here
            domain_loss(self.discriminator(states), domains).backward()
            self._optimizer.step()


def entropy_share(counts: Sequence[int], classes: int) -> float:
    """Return the entropy of shares as a part of the largest that `classes` allow; 1 without any counts."""
    total = sum(counts)
    if not total or classes < 2:
        return 1.0
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(classes)


def reverse_gradient(values: Tensor, weight: float) -> Tensor:
    """Return `values` as they are; the gradient that comes back is times -weight (arXiv 1505.07818)."""
    reversed_: Tensor = _Reversed.apply(values, weight)  # type: ignore[no-untyped-call]
    return reversed_


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


def reversal_weight(progress: float) -> float:
    """Return the weight of the reversed gradient, 0 at the start and near 1 at the end (arXiv 1505.07818)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def domain_loss(logits: Tensor, domains: Tensor) -> Tensor:
    """Return the cross-entropy of telling domains (n,) of 0 and 1 by logits (n,), both counting equally."""
    each = functional.binary_cross_entropy_with_logits(logits, domains.to(logits), reduction="none")
    means = [each[domains == domain].mean() for domain in domains.unique()]
    return torch.stack(means).mean()
