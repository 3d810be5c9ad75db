"""What the backbone makes of a prompt: one vector an example, out of the hidden states of a chosen block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from adapterhub_chat.data.encoding import Encoded, encode_prompts, messages_of, truncate
from adapterhub_chat.data.packing import Batch, in_order, pack
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.pooling import group_means
from adapterhub_chat.types import Example, Mix, PromptContract

ROWS, ROW_LENGTH = 8, 256
"""Shape of a batch of features, in rows and tokens."""


@contextmanager
def capture_blocks(model: AdapterModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Give a dict that gets the output (N, L, H) of each named block in forwards inside the block.

    Blocks are counted from 0, from the last one with -1; raises IndexError for one that is not there.
    """
    heard: dict[int, Tensor] = {}
    blocks = model.backbone.blocks

    def keep(layer: int, _block: Any, _inputs: Any, output: Any) -> None:
        heard[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [blocks[layer].register_forward_hook(partial(keep, layer)) for layer in set(layers)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def mean_pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """Return the mean of `hidden` (N, L, H) over each example's prompt, (examples, H) float32."""
    places, owners = (index.to(hidden.device) for index in batch.prompt_tokens())
    values = hidden.flatten(0, 1).index_select(0, places)
    return group_means(values, owners, int(owners.max()) + 1)


def encode_inputs(
    tokenizer: Any,
    contract: PromptContract,
    examples: Sequence[Example],
    *,
    token: int,
    max_length: int = ROW_LENGTH,
) -> list[Encoded]:
    """Return the prompts of examples whose answers nobody looks at; `token` stands for each answer."""
    prompts = encode_prompts(tokenizer, [messages_of(contract, e) for e in examples])
    return [truncate(prompt, ((token,),), max_length) for prompt in prompts]


def features(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mix: Mix,
    *,
    layer: int = -1,
    where: Literal["mean", "last"] = "mean",
) -> Tensor:
    """Return a vector for each example's prompt under a mix, (examples, hidden) float32.

    `where`: the mean over the prompt's tokens, or its last token, the one that predicts the answer. An
    encoder's are its own features, whatever layer and place are asked for.
    """
    tokenizer = model.backbone.tokenizer
    token = 0 if model.backbone.encodes else int(tokenizer.eos_token_id)
    asked = encode_inputs(tokenizer, contract, examples, token=token)
    parts: list[Tensor] = []
    order: list[int] = []
    for rows, indices in in_order(asked, num_rows=ROWS, length=ROW_LENGTH):
        batch = pack(rows, ROW_LENGTH)
        with torch.inference_mode(), model.mixing([mix] * batch.num_rows):
            parts.append(_vectors(model, batch, layer, where).cpu())
        order += indices
    found = torch.cat(parts) if parts else torch.zeros(0, 0)
    return found[torch.tensor(order).argsort()] if order else found


def _vectors(model: AdapterModel, batch: Batch, layer: int, where: str) -> Tensor:
    """Return a vector for each example of a batch under the active mix, (examples, hidden) float32."""
    if model.backbone.encodes:
        return model.features(batch)
    with capture_blocks(model, [layer]) as heard:
        model.answer_logits(batch)
    hidden = heard[layer]
    if where == "mean":
        return mean_pooled(hidden, batch)
    return hidden.flatten(0, 1)[batch.keep.to(hidden.device)].float()
