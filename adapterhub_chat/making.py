"""The part of the Python face by which something new is made of adapters: adapters, or a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from adapterhub_chat.errors import UsageError
from adapterhub_chat.export import MOST_DRIFT, Exported, export
from adapterhub_chat.inputs import listed
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.merge_order import merge_order
from adapterhub_chat.merging import merge_adapters
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.task import Task, as_task
from adapterhub_chat.transfer.ranking import Ranked
from adapterhub_chat.transferring import (
    TransferOrder,
    Transferred,
    flatten,
    make_transfer,
    rank_sources,
    target_of,
    transfer_config,
)
from adapterhub_chat.types import AdapterChoice
from adapterhub_chat.workshop import SILENT, Listeners


class Making:
    """What AdapterHub makes of adapters that it has."""

    _shelf: Shelf

    def transfer(  # noqa: PLR0913 - what a transfer is made of, each by its name
        self,
        source: str,
        target: str | Path | Task,
        method: str = "auto",
        *,
        name: str | None = None,
        shots: int | Sequence[int] = 16,
        source_task: str | Path | Task | None = None,
        unlabelled: Sequence[str | Mapping[str, str]] | None = None,
        force: bool = False,
        level: float | None = None,
        stack_layers: str | None = None,
        layer: int = -1,
        listeners: Listeners = SILENT,
        **settings: Any,
    ) -> Transferred:
        """Make an adapter for a target task out of a source adapter; keep it when it is not worse.

        `target` is a task, or a table (.csv, ...) with the columns of the source's task and `label`, which
        may be empty.

        `method` is target (few-shot, the baseline), finetune, stack, language, maxent, adversarial, or auto:
        the one with the best lower bound of those that help, else the baseline. `shots` labelled target
        examples are learnt from; of several numbers the first makes the adapter, the others are judged for a
        report and not kept. `unlabelled` are texts of the target (None: its other training inputs). A stack
        is kept as one, on the source by its content. A source that was judged to hurt is refused unless
        `force`.
        The verdict (helps, neutral, hurts) is judged on the target's validation examples and goes into
        manifest and card; where no example of the target has a label, it rests on a proxy, and both say so
        (`outcome.proxy`). `settings` are fields of TrainConfig, one budget for all methods. `source_task`
        None: the task that the source was trained on. `level` is the mean log-likelihood, by the few-shot
        adapter, that maxent weighs the source's examples up to (None: as far as the effective sample size
        allows); DataError names the nearest when there is none. A stack's T acts in the blocks that
        `stack_layers` slices ("0:8": the first eight; None: as `layers` says); `layer` is the block whose
        states the discriminator and the entropy balancing look at.
        """
        config = transfer_config(settings)
        teacher = None if source_task is None else as_task(source_task)
        texts = None if unlabelled is None else listed(unlabelled, "unlabelled")
        goal = target_of(target)
        counts = [shots] if isinstance(shots, int) else list(shots)
        if not counts or min(counts) < 0:
            raise UsageError(f"shots={shots}: one number that is at least 0, or several")
        order = TransferOrder(
            source,
            goal,
            method,
            name,
            counts[0],
            source_task=teacher,
            unlabelled=texts,
            force=force,
            level=level,
            stack_layers=stack_layers,
            layer=layer,
            also=counts[1:],
            config=config,
        )
        return make_transfer(self._shelf, order, listeners)

    def rank_sources(
        self, target: str | Path | Task, names: Sequence[str] | None = None, *, limit: int = 100
    ) -> list[Ranked]:
        """Return adapters of the pool by how promising they are as sources, without training.

        Judged by LogME and LEEP on up to `limit` labelled training examples of the target, and by the proxy
        A-distance to each source whose tasks are here. `names` None: all of the pool. Raises DataError for a
        target without labels.
        """
        goal = target_of(target)
        if isinstance(goal, Path):
            raise UsageError(
                f"sources are ranked for a task, and {goal} is a table: a .toml file beside it makes it one"
            )
        return rank_sources(self._shelf, goal, names, limit)

    def flatten(self, name: str, flat_name: str | None = None) -> Manifest:
        """Keep a stack as one plain PEFT adapter with equal logits, under NAME-flat or `flat_name`.

        Raises UsageError for what is no stack, AdapterError when what it stands on is gone or has changed.
        """
        return flatten(self._shelf, name, flat_name)

    def merge(
        self,
        names: Sequence[str],
        method: str = "svd",
        weights: Sequence[float] | Literal["learn"] | None = None,
        *,
        name: str,
        tasks: Mapping[str, str | Path | Task] | None = None,
        listeners: Listeners = SILENT,
        **options: Any,
    ) -> Manifest:
        """Make one new adapter of several, measured against each of them; return its manifest.

        `method` is a row of the table (docs/merging.md) or "auto": the one that keeps most of its sources'
        scores on validation items. `weights` None are the method's own; "learn" searches for them.
        `options` are fields of MergeOptions: rank, density, seed, limit, floor, budget. `tasks` says by
        name what sources are judged by, where it is not what they were trained on. Raises ConfigError for
        all that does not fit at once, AdapterError when a source alone does not come out as itself or
        "auto" finds no method that keeps the floor.
        """
        order = merge_order(listed(names, "names"), method, weights, name, options)
        return merge_adapters(self._shelf, order, tasks or {}, listeners)

    def export(
        self,
        adapter: AdapterChoice,
        folder: str | Path,
        *,
        form: str = "auto",
        most_drift: float = MOST_DRIFT,
    ) -> Exported:
        """Write the backbone with an adapter (or a mixture) merged into it, as transformers' folder.

        `form`: merged, requantized (over a packed backbone: packed again), or auto, the smallest whose next
        tokens on the probe prompts are at most `most_drift` nats of KL from the adapter's as it runs. Raises
        AdapterError when none is, UsageError for a folder that exists; nothing half written is left.
        """
        (mix,) = self._shelf.ready([adapter])
        return export(self._shelf, mix, Path(folder), form, most_drift)
