"""What enters the linear layers: as plain transformers sees it, example by example."""

from __future__ import annotations

import pytest
import torch
from pico import toy_answers, toy_task

from adapterhub_chat.data.encoding import encode_examples
from adapterhub_chat.data.splits import Splits, sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import DataError
from adapterhub_chat.merge import moments as moments_module
from adapterhub_chat.merge.moments import ITEMS, InputMoments
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
    each = -(-ITEMS // len(own))
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


def test_moments_are_those_of_every_example_by_itself(model, tasks):
    found = InputMoments(model, tasks, MODULES)
    for module in MODULES:
        for n, (adapter, own) in enumerate(tasks.items()):
            wanted = one_by_one(model, adapter, own, module).float()
            torch.testing.assert_close(found(module)[n], wanted, rtol=1e-3, atol=1e-5)
            assert torch.equal(found.of(n, module)[0], found(module)[n])
    films, answers = found(MODULES[-1])
    assert (films - answers).norm() > 0.05 * films.norm()


def test_little_memory_gives_the_same_in_more_turns(model, tasks, monkeypatch):
    looked = []
    items = moments_module._items
    monkeypatch.setattr(
        moments_module, "_items", lambda *given: looked.append(given) or items(*given)
    )
    whole = InputMoments(model, tasks, MODULES)
    expected = {module: whole(module) for module in MODULES}
    assert len(looked) == len(tasks)
    looked.clear()
    narrow = InputMoments(model, tasks, MODULES, most=1)
    for module, parts in expected.items():
        assert all(map(torch.equal, narrow(module), parts))
    assert len(looked) == len(tasks) * 4  # q and k share their input


def test_a_source_without_examples_is_said(model, tasks):
    empty = Task("empty", toy_task().contract, "accuracy", lambda: Splits({}))
    found = InputMoments(model, {**tasks, "answers": [empty]}, MODULES)
    with pytest.raises(DataError, match="the tasks of 'answers' have no training examples"):
        found(MODULES[0])


def test_nothing_is_run_before_it_is_asked_for(model, tasks, monkeypatch):
    monkeypatch.setattr(moments_module, "_items", lambda *_: pytest.fail("looked"))
    InputMoments(model, tasks, MODULES)
