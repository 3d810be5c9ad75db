"""Adversarial transfer: hidden states from which a discriminator cannot tell the target from the source.

The adapter starts from the source's weights and keeps the task's loss on labelled rows. A small discriminator
learns to tell the domains apart by the pooled hidden states of one block, and the adapter receives its
gradient reversed (DANN, arXiv 1505.07818). Between the adapter's steps the discriminator is trained on stored
states (the alternation of ADDA, arXiv 1702.05464). Two collapses end the training: the discriminator makes no
more errors, or all of the target gets one label.
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
HIDDEN_WIDTH, MEMORY_SIZE, INNER_STEPS = 64, 256, 4
"""The discriminator's hidden width, its number of stored states, and its steps per step of the adapter."""
MAX_REVERSAL = 0.1
"""Weight of the reversed gradient at the end. An adapter's few steps move its states by the learning rate,
however small the gradient is: with DANN's 1 they no longer fit the source's head (docs/transfer.md)."""
COLLAPSE_FROM = 0.5
"""Share of MAX_REVERSAL from which on a collapse counts: before that, little works against it."""
MIN_ENTROPY_SHARE = 0.1
"""Share of the maximal entropy of the target's predicted labels below which they count as one label."""


class DomainDiscriminator:
    """The discriminator with its stored states and its statistics: an auxiliary loss of one job."""

    def __init__(
        self, width: int, steps: int, *, layer: int = -1, labels: Sequence[int] = (), seed: int = 0
    ) -> None:
        """Prepare for `steps` steps on hidden states of size `width`.

        `labels` are the first token ids of the labels, from whose logits the target's labels are predicted;
        without them a collapse to one label is not detected.
        """
        self.layer, self.num_steps, self.labels = layer, steps, tuple(labels)
        self.window = max(5, steps // 3)
        self.step = 0
        self.stopped = ""
        self.accuracy: list[float] = []
        """The discriminator's accuracy at each step, on new states; both domains count equally."""
        self._num_collapse_steps = 0
        self._predictions: deque[list[int]] = deque(maxlen=self.window)
        self._memory: deque[tuple[Tensor, int]] = deque(maxlen=MEMORY_SIZE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False),
                nn.Linear(width, HIDDEN_WIDTH),
                nn.ReLU(),
                nn.Linear(HIDDEN_WIDTH, 1),
                nn.Flatten(0),
            )
        self._optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=1e-3)

    @property
    def recent_accuracy(self) -> float:
        """The discriminator's mean accuracy over the last `window` steps, 0.5 before the first one."""
        recent = self.accuracy[-self.window :]
        return sum(recent) / len(recent) if recent else 0.5

    def loss(self, states: HiddenStates) -> Tensor:
        """Return the discriminator's loss on these states, with its gradient reversed."""
        domains = torch.tensor([example.domain for example in states.examples])
        self.discriminator.to(states.pooled.device)
        self._record(states, domains)
        self._memory.extend(zip(states.pooled.detach(), domains.tolist(), strict=True))
        self._train_discriminator()
        weight = MAX_REVERSAL * reversal_weight(self.step / self.num_steps)
        self.step += 1
        logits = self.discriminator(reverse_gradient(states.pooled, weight))
        return domain_loss(logits, domains.to(logits.device))

    @torch.no_grad()
    def _record(self, states: HiddenStates, domains: Tensor) -> None:
        """Record the accuracy and the target's predicted labels; set `stopped` on a collapse."""
        correct = (self.discriminator(states.pooled) > 0).cpu() == (domains == TARGET)
        accuracies = [correct[domains == domain].float().mean() for domain in domains.unique()]
        self.accuracy.append(float(torch.stack(accuracies).mean()))
        if self.labels:
            target_logits = states.logits[(domains == TARGET).to(states.logits.device)]
            self._predictions.append(target_logits[:, list(self.labels)].argmax(1).tolist())
        self._num_collapse_steps += reversal_weight(self.step / self.num_steps) >= COLLAPSE_FROM
        if self._num_collapse_steps >= self.window:
            self.stopped = self._collapse()

    def _collapse(self) -> str:
        """Return which collapse the last `window` steps show; empty for none."""
        if min(self.accuracy[-self.window :]) == 1:
            return (
                f"collapsed: for {self.window} steps the discriminator has told source from target "
                "without an error, so nothing is learnt from it"
            )
        counts = Counter(label for step in self._predictions for label in step)
        share = entropy_share(list(counts.values()), len(self.labels))
        if self.labels and share < MIN_ENTROPY_SHARE:
            return f"collapsed: for {self.window} steps nearly all target rows have got one label"
        return ""

    @torch.enable_grad()
    def _train_discriminator(self) -> None:
        """Train the discriminator on the stored states."""
        states = torch.stack([state for state, _ in self._memory])
        domains = torch.tensor([domain for _, domain in self._memory]).to(states.device)
        for _ in range(INNER_STEPS):
            self._optimizer.zero_grad()  # also those of the adapter's last step
            domain_loss(self.discriminator(states), domains).backward()
            self._optimizer.step()


def entropy_share(counts: Sequence[int], num_classes: int) -> float:
    """Return the entropy of counts as a share of the maximum for `num_classes`; 1 without any counts."""
    total = sum(counts)
    if not total or num_classes < 2:
        return 1.0
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(num_classes)


def reverse_gradient(values: Tensor, weight: float) -> Tensor:
    """Return `values` unchanged; the gradient is multiplied by -weight (arXiv 1505.07818)."""
    output: Tensor = _GradientReversal.apply(values, weight)  # type: ignore[no-untyped-call]
    return output


class _GradientReversal(torch.autograd.Function):
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
    """Return the binary cross-entropy of logits (n,) for domains (n,) of 0 and 1, both weighing equally."""
    losses = functional.binary_cross_entropy_with_logits(
        logits, domains.to(logits), reduction="none"
    )
    means = [losses[domains == domain].mean() for domain in domains.unique()]
    return torch.stack(means).mean()
