"""Features of prompts: one vector an example, from the hidden states of a chosen block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import Encoded, messages_of, truncate
from adapterhub_chat.data.packing import Batch, in_order
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.pooling import group_means
from adapterhub_chat.types import Example, Mix, PromptContract

ROWS, ROW_LENGTH = 8, 256
"""Shape of a batch of features, in rows and tokens."""


@contextmanager
def capture_blocks(model: AdapterModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that each forward inside the with block fills: layer -> its output (N, L, H).

    Layers are counted from 0, or with -1 from the last one; raises IndexError for one that does not exist.
    """
    block_outputs: dict[int, Tensor] = {}
    blocks = model.backbone.blocks

    def store(layer: int, _block: Any, _inputs: Any, output: Any) -> None:
        block_outputs[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [blocks[layer].register_forward_hook(partial(store, layer)) for layer in set(layers)]
    try:
        yield block_outputs
    finally:
        for hook in hooks:
            hook.remove()


def mean_pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """Return the mean of `hidden` (N, L, H) over each example's prompt, (examples, H) float32."""
    indices, examples = (index.to(hidden.device) for index in batch.prompt_tokens())
    states = hidden.flatten(0, 1).index_select(0, indices)
    return group_means(states, examples, int(examples.max()) + 1)


def encode_inputs(
    tokenizer: Any,
    contract: PromptContract,
    examples: Sequence[Example],
    *,
    token: int,
    max_length: int = ROW_LENGTH,
) -> list[Encoded]:
    """Return the prompts of examples, truncated to `max_length`; `token` stands for each answer."""
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

    `where`: the mean over the prompt's tokens, or its last token, which predicts the answer. Those of an
    encoder are its pooled features, whatever `layer` and `where` are.
    """
    tokenizer = model.backbone.tokenizer
    token = 0 if model.backbone.encodes else int(tokenizer.eos_token_id)
    encoded = encode_inputs(tokenizer, contract, examples, token=token)
    parts: list[Tensor] = []
    order: list[int] = []
    for rows, indices in in_order(encoded, num_rows=ROWS, length=ROW_LENGTH):
        batch = model.pack(rows, ROW_LENGTH)
        with torch.inference_mode(), model.mixing([mix] * batch.num_rows):
            parts.append(_vectors(model, batch, layer, where).cpu())
        order += indices
    if not parts:
        return torch.zeros(0, 0)
    return torch.cat(parts)[torch.tensor(order).argsort()]


def _vectors(model: AdapterModel, batch: Batch, layer: int, where: str) -> Tensor:
    """Return a vector for each example of a batch under the active mix, (examples, hidden) float32."""
    if model.backbone.encodes:
        return model.features(batch)
    with capture_blocks(model, [layer]) as block_outputs:
        model.answer_logits(batch)
    hidden = block_outputs[layer]
    if where == "mean":
        return mean_pooled(hidden, batch)
    return hidden.flatten(0, 1)[batch.keep.to(hidden.device)].float()
