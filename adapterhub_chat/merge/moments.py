"""What enters the linear layers while sources do their own tasks: the second moments of the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from adapterhub_chat.data.encoding import Encoded, encode_examples
from adapterhub_chat.data.packing import in_order
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import DataError
from adapterhub_chat.inference.likelihood import ROW_LENGTH, ROWS
from adapterhub_chat.lora.sites import linear_shapes
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import as_mix

ITEMS = 48
"""Training items of a source's tasks that are looked at: some thousand tokens."""
BYTES = 2 * 2**30
"""Memory for second moments; beyond it the items are run once more for the next modules."""


class InputMoments:
    """Module -> the mean x x^T (in, in) float32 of its inputs x, under each source on its own tasks.

    Modules are gathered in the order given, as many at once as fit the memory, when one is asked for.
    """

    def __init__(
        self,
        model: AdapterModel,
        tasks: Mapping[str, Sequence[Task]],
        modules: Sequence[str],
        most: int = BYTES,
    ) -> None:
        """Look at `tasks`, adapter by adapter; nothing is run yet."""
        self._model, self._tasks, self._most = model, tasks, most
        sites = {member: site.name for site in model.sites for member in site.members}
        self._site = {module: sites[module] for module in modules}
        self._width = {
            module: size[0] for module, size in linear_shapes(model.backbone.model).items()
        }
        self._known: dict[str, list[Tensor]] = {}

    def __call__(self, module: str) -> list[Tensor]:
        """Return the moments of one module, a source each; raise DataError where nothing is to be seen."""
        site = self._site[module]
        if site not in self._known:
            self._known = {}  # those of other modules go first
            self._known = self._gather(self._next(site))
        return self._known[site]

    def of(self, source: int, module: str) -> list[Tensor]:
        """Return the moment of one module under one source alone."""
        return [self(module)[source]]

    def _next(self, site: str) -> dict[str, str]:
        """Return a module of each site that is gathered with `site`: those that come after it."""
        first = {own: module for module, own in reversed(self._site.items())}
        order = list(dict.fromkeys(self._site.values()))
        found: dict[str, str] = {}
        room = self._most
        for name in order[order.index(site) :]:
            room -= self._width[first[name]] ** 2 * 4 * len(self._tasks)
            if room < 0 and found:
                break
            found[name] = first[name]
        return found

    def _gather(self, modules: Mapping[str, str]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in modules}
        for adapter, own in self._tasks.items():
            items = _items(self._model, own)
            if not items:
                raise DataError(
                    f"the tasks of {adapter!r} have no training examples, so nobody sees what enters its "
                    "layers; give another task (tasks={...}, --task), or choose a method that does not look"
                )
            sums, tokens = self._sums(adapter, items, modules)
            for name, total in sums.items():
                found[name].append((total / tokens).cpu())
        return found

    def _sums(
        self, adapter: str, items: Sequence[Encoded], modules: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], int]:
        """Return the sum of x x^T over all tokens of the items, and how many they are."""
        device, network = self._model.backbone.device, self._model.backbone.model
        layers = {name: network.get_submodule(module) for name, module in modules.items()}
        wide = {name: self._width[module] for name, module in modules.items()}
        sums = {name: torch.zeros(n, n, device=device) for name, n in wide.items()}
        tokens = 0
        for rows, _ in in_order(items, num_rows=ROWS, length=ROW_LENGTH):
            batch = self._model.pack(rows, ROW_LENGTH)
            real = (batch.segments >= 0).flatten().nonzero().squeeze(1).to(device)
            tokens += len(real)
            mixes = [as_mix(adapter)] * batch.num_rows
            with torch.inference_mode(), self._model.mixing(mixes), _adding(layers, real, sums):
                self._model.answer_logits(batch)
        return sums, tokens


@contextmanager
def _adding(
    layers: Mapping[str, nn.Module], real: Tensor, sums: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add x x^T of the tokens `real` (flat indices) to `sums` in forwards inside the block."""

    def add(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).index_select(0, real).float()
        sums[name].addmm_(x.mT, x)

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _items(model: AdapterModel, tasks: Sequence[Task]) -> list[Encoded]:
    """Return training items of a source's tasks as token ids."""
    tokenizer = model.backbone.tokenizer
    each = -(-ITEMS // max(len(tasks), 1))
    return [
        encoded
        for task in tasks
        for encoded in encode_examples(
            tokenizer, task.contract, sample(task.split("train"), each), max_length=ROW_LENGTH
        )
    ]
