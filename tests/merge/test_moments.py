"""Second moments of the layers' inputs equal those of plain transformers, example by example."""

from __future__ import annotations

import pytest
import torch
from pico import toy_answers, toy_task

from adapterhub_chat.data.encoding import encode_examples
from adapterhub_chat.data.splits import Splits, sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import DataError
from adapterhub_chat.merge.moments import NUM_MOMENT_ITEMS, InputMoments
from adapterhub_chat.types import as_mix

MODULES = [
    f"model.layers.{n}.{part}"
    for n in (1, 0)  # a merge asks in its own order
    for part in ("self_attn.k_proj", "self_attn.q_proj", "mlp.down_proj")
]


@pytest.fixture
def tasks(model, make_weights):
    model.load("films", make_weights(seed=1))
    model.load("answers", make_weights(seed=2))
    return {"films": [toy_task(size=300)], "answers": [toy_answers(size=60), toy_task(size=60)]}


def one_by_one(model, adapter, own, module):
    """The mean of x x^T over all tokens, with every example in a forward of its own."""
    each = -(-NUM_MOMENT_ITEMS // len(own))
    inputs = []
    layer = model.backbone.model.get_submodule(module)
    hook = layer.register_forward_pre_hook(lambda _layer, given: inputs.append(given[0][0]))
    for task in own:
        examples = sample(task.split("train"), each)
        for e in encode_examples(model.backbone.tokenizer, task.contract, examples, max_length=256):
            with torch.no_grad(), model.mixing([as_mix(adapter)]):
                model.backbone.model(input_ids=torch.tensor([e.prompt + e.continuations[0][:-1]]))
    hook.remove()
    x = torch.cat(inputs).double()
    return x.T @ x / len(x)


def test_moments_equal_those_of_unbatched_examples(model, tasks):
    actual = InputMoments(model, tasks, MODULES)
    for module in MODULES:
        for n, (adapter, own) in enumerate(tasks.items()):
            expected = one_by_one(model, adapter, own, module).float()
            torch.testing.assert_close(actual(module)[n], expected, rtol=1e-3, atol=1e-5)
            assert torch.equal(actual.for_source(n, module)[0], actual(module)[n])
    films, answers = actual(MODULES[-1])
    assert (films - answers).norm() > 0.05 * films.norm()


@pytest.fixture
def forwards(model):
    """One entry for each forward pass of the backbone."""
    passes = []
    embeddings = model.backbone.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    hook.remove()


def test_small_memory_limit_gives_equal_moments_in_more_passes(model, tasks, forwards):
    whole = InputMoments(model, tasks, MODULES)
    assert not forwards  # nothing is computed at construction
    expected = {module: whole(module) for module in MODULES}
    num_forwards = len(forwards)
    assert num_forwards >= len(tasks)
    forwards.clear()
    narrow = InputMoments(model, tasks, MODULES, max_bytes=1)
    for module, moments in expected.items():
        assert all(map(torch.equal, narrow(module), moments))
    assert len(forwards) == 4 * num_forwards  # q and k share their input


def test_source_without_examples_raises(model, tasks):
    empty = Task("empty", toy_task().contract, "accuracy", lambda: Splits({}))
    actual = InputMoments(model, {**tasks, "answers": [empty]}, MODULES)
    with pytest.raises(DataError, match="the tasks of 'answers' have no training examples"):
        actual(MODULES[0])
