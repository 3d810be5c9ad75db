"""Families, resumed runs, layers and re-computed activations: exactness against the plain run."""

from dataclasses import replace

import pytest
import torch
from pico import close, job, toy_answers, toy_talk, toy_task

from adapterhub_chat.data.packing import pack
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.likelihood import token_losses
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.lora.weights import concatenate
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import overlap, overlap_gradient
from adapterhub_chat.training.loop import TrainingRun, train


class Stop(Exception):
    """The process died."""


def shared_jobs(model, **settings):
    jobs = [
        job(model, toy_task(), rank=4, rows_per_step=2, seed=1, **settings),
        job(model, toy_answers(), rank=8, rows_per_step=1, **settings),
    ]
    common = job(model, toy_talk(), name="common", rank=4, **settings).config
    return [
        *(Job(j.name, j.train, j.validation, j.config, shared="common") for j in jobs),
        Job("common", (), (), common),
    ]


def test_a_shared_adapter_learns_from_every_task(model):
    done = train(model, shared_jobs(model, max_steps=10))
    assert set(done) == {"toy", "answers", "common"}
    assert {d.steps for d in done.values()} == {10}
    assert len({d.best_step for d in done.values()}) == 1
    pairs = done["common"].conflict
    assert list(pairs) == ["toy|answers"]
    assert -1 <= pairs["toy|answers"] <= 1
    moved = [b.abs().max() for d in done.values() for _, b in d.weights.factors.values()]
    assert min(moved) > 0


def test_a_family_s_gradient_is_that_of_its_equation(model):
    """Shared and own adapter in one row: against autograd over the concatenated adapter of each task."""
    run = TrainingRun(model, shared_jobs(model, max_steps=10, clip=1e9, learning_rate=1e-2))
    for _ in range(3):
        run.step()
    (family,) = run.families
    parts = family.draw()
    losses = run._backward(parts)
    shared, scratch = family.shared, torch.empty_like(family.shared.vector)
    got = family._shared_gradient(parts, run._total, scratch)
    wanted = torch.zeros_like(got)
    for part, loss in zip(parts, losses, strict=True):
        whole = concatenate([shared.weights(), part.learner.weights()])
        leaves = {
            m: [t.clone().requires_grad_() for t in pair] for m, pair in whole.factors.items()
        }
        handles = [
            model.backbone.model.get_submodule(m).register_forward_hook(
                lambda _l, x, y, f=f: y + x[0] @ f[0].T @ f[1].T
            )
            for m, f in leaves.items()
        ]
        batch = pack(part.rows, run.length)
        mean = token_losses(model.answer_logits(batch), batch.targets).mean()
        assert mean.item() == pytest.approx(loss, abs=1e-5)
        (part.weight * mean).backward()
        for handle in handles:
            handle.remove()
        scale = shared.weights().scale(next(iter(leaves)))
        own = {m: (a.grad[:4], b.grad[:, :4] * scale) for m, (a, b) in leaves.items()}
        wanted += run.bank.vector(shared.weights().with_factors(own))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-3)


def test_every_row_of_the_budget_is_drawn_and_temperature_evens_it_out(model):
    def share(temperature):
        jobs = shared_jobs(model, max_steps=10, temperature=temperature)
        jobs[0] = Job("toy", jobs[0].train * 20, (), jobs[0].config, shared="common")
        (family,) = TrainingRun(model, jobs).families
        counts = {"toy": 0, "answers": 0}
        for step in range(60):
            family.now.step = step
            for part in family.draw():
                counts[part.learner.job.name] += len(part.rows)
        assert sum(counts.values()) == 60 * 3
        return counts["answers"] / 180

    assert share(1.0) < 0.12
    assert 0.3 < share(1e6) < 0.7


@pytest.mark.parametrize("kind", ["alone", "shared", "joint"])
def test_a_resumed_run_ends_with_the_same_bits(model, kind):
    def jobs():
        if kind == "shared":
            return shared_jobs(model, eval_every=3, max_steps=11)
        made = [
            job(model, toy_task(), seed=1, eval_every=3),
            job(model, toy_answers(), max_steps=7),
        ]
        return made[:1] if kind == "alone" else made

    whole = train(model, jobs())
    for death in (1, 4, 8):
        states, steps = [], []

        def die(make, death=death, states=states, steps=steps):
            state = make()
            copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
            states.append(type(state)(state.identity, state.elapsed, dict(state.numbers), copies))
            steps.append(1)
            if len(steps) == death:
                raise Stop

        with pytest.raises(Stop):
            train(model, jobs(), on_state=die)
        again = train(model, jobs(), resume=states[-1])
        for name, done in whole.items():
            close(again[name].weights, done.weights, tolerance=0)
            assert (again[name].steps, again[name].best_step) == (done.steps, done.best_step)
            assert again[name].tokens == done.tokens
            assert again[name].conflict == done.conflict


def test_another_run_s_state_is_refused(model):
    states = []
    train(model, [job(model, toy_task())], on_state=lambda make: states.append(make()))
    for other in (job(model, toy_task(), seed=4), job(model, toy_task(size=50))):
        with pytest.raises(UsageError, match="belongs to another run"):
            train(model, [other], resume=states[0])


def test_re_computed_activations_change_nothing(model):
    plain = train(model, [job(model, toy_task())])["toy"]
    with model.checkpointing():
        again = train(model, [job(model, toy_task())])["toy"]
    close(again.weights, plain.weights, tolerance=0)
    assert not any("forward" in vars(block) for block in model.backbone.blocks)


def test_re_computed_blocks_pick_their_factors_anew_when_slots_in_use_do_not_adjoin(model):
    def jobs():
        steps = {"one": 6, "two": 2, "three": 6}  # the middle one leaves the others apart
        return [job(model, toy_answers(n), max_steps=s) for n, s in steps.items()]

    plain = train(model, jobs())
    with model.checkpointing():
        again = train(model, jobs())
    for name, done in plain.items():
        close(again[name].weights, done.weights, tolerance=1e-6)


def test_the_penalty_looks_at_the_present_numbers_not_at_the_best(model, make_weights):
    settings = {"rank": 2, "orthogonal": 1.0, "eval_every": 1, "learning_rate": 0.1, "clip": 1e9}
    made = replace(job(model, toy_answers(), **settings), under=make_weights(rank=2))
    run = TrainingRun(model, [made])
    for _ in range(4):
        run.step()
    (learner,) = run.families[0].learners
    present = run.bank.weights(learner.vector.detach(), learner.weights())
    gradient = torch.zeros_like(learner.vector)
    learner.step(gradient, 0.0)
    wanted = run.bank.vector(overlap_gradient(present, made.under))
    torch.testing.assert_close(gradient, wanted)


def test_checkpointing_keeps_fewer_activations(model):
    def kept(on):
        seen = 0

        def count(tensor):
            nonlocal seen
            seen += tensor.numel()
            return tensor

        run = TrainingRun(model, [job(model, toy_task())])
        with model.checkpointing(on), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            run._backward(run.families[0].draw())
        return seen

    assert kept(True) < 0.6 * kept(False)


def test_layers_name_the_blocks_that_learn(model):
    chosen = select_targets(model.shapes, "all-linear", "1:")
    assert {m.split(".")[2] for m in chosen} == {"1"}
    assert select_targets(model.shapes, "q_proj", "-2:-1") == {
        "model.layers.0.self_attn.q_proj": (32, 32)
    }
    with pytest.raises(UsageError, match=r"layers='7:' names no block.*slice of the 2 blocks"):
        select_targets(model.shapes, "all-linear", "7:")
    with pytest.raises(UsageError, match="layers='top' names no block"):
        select_targets(model.shapes, "all-linear", "top")


def test_no_gradient_goes_below_the_lowest_adapted_layer(model):
    reached = []
    layers = model.backbone.model.model.layers
    for layer in layers:
        layer.register_forward_hook(
            lambda _m, _i, out: reached.append(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    train(model, [job(model, toy_task(), layers="1:", max_steps=1, eval_examples=0)])
    assert reached == [False, True]


def test_the_overlap_s_gradient_is_autograd_s(make_weights):
    new, old = make_weights(rank=3, seed=1), make_weights(rank=5, seed=2, only=("q_proj", "k_proj"))
    leaves = new.with_factors(
        {m: (a.clone().requires_grad_(), b) for m, (a, b) in new.factors.items()}
    )
    overlap(leaves, old).backward()
    found = overlap_gradient(new, old).factors
    assert set(found) == set(old.factors)
    for module, (a, b) in found.items():
        torch.testing.assert_close(a, leaves.factors[module][0].grad)
        assert not b.any()
