"""The same promises on a CUDA device: training in bf16 and in 4 bits, rows that stay their own."""

import pytest
import torch
from pico import alone, close, job, some_requests, toy_answers, toy_task

from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import as_mix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = [[5, 9, 60, 31, 7, 120], [8, 8, 99, 3, 200, 41]] * 3


def on_gpu(folder, **options):
    return AdapterModel(load_backbone(str(folder), device="cuda", **options))


def losses_of(model, *jobs):
    heard = []
    train(model, jobs, on_event=lambda e: heard.append(e) if e.kind == "step" else None)
    return [e.values["loss"] for e in heard]


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"quantize": "nf4"}, {"dtype": "fp32"}])
def test_training_learns_and_moves_no_byte(pico_folder, options):
    model = on_gpu(pico_folder, **options)
    before = {n: t.clone() for n, t in model.backbone.model.state_dict().items()}
    losses = losses_of(model, job(model, toy_task(), max_steps=40, learning_rate=1e-2))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    after = model.backbone.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_joint_equals_alone(pico_folder):
    model = on_gpu(pico_folder, dtype="fp32")
    jobs = [job(model, toy_task(), seed=1), job(model, toy_answers(), rank=4)]
    together = train(model, jobs)
    for each in jobs:
        close(together[each.name].weights, train(model, [each])[each.name].weights, 1e-4)


def test_re_computed_activations_change_nothing(pico_folder):
    model = on_gpu(pico_folder, dtype="fp32")
    plain = train(model, [job(model, toy_task())])["toy"]
    with model.checkpointing():
        again = train(model, [job(model, toy_task())])["toy"]
    close(again.weights, plain.weights, 1e-5)


def test_a_zero_row_is_the_backbone_and_a_row_is_its_own(pico_folder, make_weights):
    model = on_gpu(pico_folder, dtype="fp32")
    ids = torch.tensor(IDS, device="cuda")
    with torch.no_grad():
        bare = model.backbone.model(ids).logits
    model.load("a", make_weights(seed=1))
    model.load("b", make_weights(seed=2, rank=6))
    with torch.no_grad(), model.mixing([as_mix(m) for m in ("a", "b", None, "a", None, "b")]):
        mixed = model.backbone.model(ids).logits
    assert torch.equal(mixed[2], bare[2])
    assert torch.equal(mixed[4], bare[4])
    for row, name in ((0, "a"), (1, "b"), (3, "a"), (5, "b")):
        with torch.no_grad(), model.mixing([as_mix(name)]):
            alone = model.backbone.model(ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-4, rtol=1e-4)


def test_requests_that_join_and_leave_give_what_they_give_alone(pico_folder, make_weights):
    model = on_gpu(pico_folder, dtype="fp32")
    for n in range(6):
        model.load(f"a{n}", make_weights(seed=n))
    engine, requests = Engine(model, rows=8, chunk=32), some_requests(24)
    tickets = [engine.submit(request) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        assert ticket.result().ids == alone(model, request).ids
