"""Second moments of the linear layers' inputs, while each source processes examples of its own tasks."""

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

NUM_MOMENT_ITEMS = 48
"""Training examples of each source: some thousand tokens."""
MAX_MOMENT_BYTES = 2 * 2**30
"""Memory for second moments; for the modules beyond it, the examples are run once more."""


class InputMoments:
    """Module -> the mean x x^T (in, in) float32 of its inputs x, under each source on its own tasks.

    Moments are computed when they are asked for, for as many of the following modules as the memory allows.
    """

    def __init__(
        self,
        model: AdapterModel,
        tasks: Mapping[str, Sequence[Task]],
        modules: Sequence[str],
        max_bytes: int = MAX_MOMENT_BYTES,
    ) -> None:
        """Take the tasks of each source, and the modules in the order of use; nothing is computed yet."""
        self._model, self._tasks, self._max_bytes = model, tasks, max_bytes
        sites = {member: site.name for site in model.sites for member in site.members}
        self._site = {module: sites[module] for module in modules}
        self._width = {
            module: size[0] for module, size in linear_shapes(model.backbone.model).items()
        }
        self._cached: dict[str, list[Tensor]] = {}

    def __call__(self, module: str) -> list[Tensor]:
        """Return the moments of one module, one for each source; raise DataError without examples."""
        site = self._site[module]
        if site not in self._cached:
            self._cached = {}  # frees the memory of other modules first
            self._cached = self._gather(self._next_modules(site))
        return self._cached[site]

    def for_source(self, source: int, module: str) -> list[Tensor]:
        """Return the moment of one module under one source alone."""
        return [self(module)[source]]

    def _next_modules(self, site: str) -> dict[str, str]:
        """Return one module of `site`, and of each following site that fits the memory, by site."""
        first = {name: module for module, name in reversed(self._site.items())}
        order = list(dict.fromkeys(self._site.values()))
        modules: dict[str, str] = {}
        free_bytes = self._max_bytes
        for name in order[order.index(site) :]:
            free_bytes -= self._width[first[name]] ** 2 * 4 * len(self._tasks)
            if free_bytes < 0 and modules:
                break
            modules[name] = first[name]
        return modules

    def _gather(self, modules: Mapping[str, str]) -> dict[str, list[Tensor]]:
        """Return the moments under all sources by site."""
        moments: dict[str, list[Tensor]] = {name: [] for name in modules}
        for adapter, tasks in self._tasks.items():
            items = _training_items(self._model, tasks)
            if not items:
                raise DataError(
                    f"the tasks of {adapter!r} have no training examples, so nobody sees what enters its "
                    "layers; give another task (tasks={...}, --task), or choose a method that does not look"
                )
            sums, num_tokens = self._sums(adapter, items, modules)
            for name, total in sums.items():
                moments[name].append((total / num_tokens).cpu())
        return moments

    def _sums(
        self, adapter: str, items: Sequence[Encoded], modules: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], int]:
        """Return the sums of x x^T over all tokens of the items by site, and the number of tokens."""
        device, network = self._model.backbone.device, self._model.backbone.model
        layers = {name: network.get_submodule(module) for name, module in modules.items()}
        widths = {name: self._width[module] for name, module in modules.items()}
        sums = {name: torch.zeros(n, n, device=device) for name, n in widths.items()}
        num_tokens = 0
        for rows, _ in in_order(items, num_rows=ROWS, length=ROW_LENGTH):
            batch = self._model.pack(rows, ROW_LENGTH)
            real = (batch.segments >= 0).flatten().nonzero().squeeze(1).to(device)
            num_tokens += len(real)
            mixes = [as_mix(adapter)] * batch.num_rows
            with (
                torch.inference_mode(),
                self._model.mixing(mixes),
                _accumulating(layers, real, sums),
            ):
                self._model.answer_logits(batch)
        return sums, num_tokens


@contextmanager
def _accumulating(
    layers: Mapping[str, nn.Module], real: Tensor, sums: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add x x^T of the tokens `real` (flat indices) to `sums` in forward passes inside the block."""

    def add(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).index_select(0, real).float()
        sums[name].addmm_(x.mT, x)

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _training_items(model: AdapterModel, tasks: Sequence[Task]) -> list[Encoded]:
    """Return training examples of a source's tasks as token ids, equally many of each task."""
    tokenizer = model.backbone.tokenizer
    num_each = -(-NUM_MOMENT_ITEMS // max(len(tasks), 1))
    return [
        encoded
        for task in tasks
        for encoded in encode_examples(
            tokenizer, task.contract, sample(task.split("train"), num_each), max_length=ROW_LENGTH
        )
    ]
