"""Learners and families: shared adapters, resuming, layers, checkpointing, against plain runs."""

from dataclasses import replace

import pytest
import torch
from pico import close, job, overlap, toy_answers, toy_talk, toy_task

from adapterhub_chat.data.packing import pack
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.likelihood import token_losses
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.lora.weights import concatenate
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import overlap_gradient
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


def test_a_shared_adapters_gradient_matches_autograd(model):
    """Against autograd over each task's concatenation of the shared and the task's adapter."""
    run = TrainingRun(model, shared_jobs(model, max_steps=10, clip=1e9, learning_rate=1e-2))
    for _ in range(3):
        run.step()
    (family,) = run.families
    groups = family.draw()
    losses = run._backward(groups)
    shared, scratch = family.shared, torch.empty_like(family.shared.vector)
    gradient = family._shared_gradient(groups, run._all_reduce, scratch)
    expected = torch.zeros_like(gradient)
    for group, loss in zip(groups, losses, strict=True):
        combined = concatenate([shared.weights(), group.learner.weights()])
        leaves = {
            m: [t.clone().requires_grad_() for t in pair] for m, pair in combined.factors.items()
        }
        handles = [
            model.backbone.model.get_submodule(m).register_forward_hook(
                lambda _l, x, y, f=f: y + x[0] @ f[0].T @ f[1].T
            )
            for m, f in leaves.items()
        ]
        batch = pack(group.rows, run.length)
        mean = token_losses(model.answer_logits(batch), batch.targets).mean()
        assert mean.item() == pytest.approx(loss, abs=1e-5)
        (group.weight * mean).backward()
        for handle in handles:
            handle.remove()
        scale = shared.weights().scale(next(iter(leaves)))
        factors = {m: (a.grad[:4], b.grad[:, :4] * scale) for m, (a, b) in leaves.items()}
        expected += run.bank.vector(shared.weights().with_factors(factors))
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_a_step_draws_a_fixed_number_of_rows_and_temperature_evens_the_shares(model):
    def share(temperature):
        jobs = shared_jobs(model, max_steps=10, temperature=temperature)
        jobs[0] = Job("toy", jobs[0].train * 20, (), jobs[0].config, shared="common")
        (family,) = TrainingRun(model, jobs).families
        counts = {"toy": 0, "answers": 0}
        for step in range(60):
            family.counters.step = step
            for group in family.draw():
                counts[group.learner.job.name] += len(group.rows)
        assert sum(counts.values()) == 60 * 3
        return counts["answers"] / 180

    assert share(1.0) < 0.12
    assert 0.3 < share(1e6) < 0.7


@pytest.mark.parametrize("kind", ["alone", "shared", "joint"])
def test_a_resumed_run_is_bit_exact(model, kind):
    def jobs():
        if kind == "shared":
            return shared_jobs(model, eval_every=3, max_steps=11)
        made = [
            job(model, toy_task(), seed=1, eval_every=3),
            job(model, toy_answers(), max_steps=7),
        ]
        return made[:1] if kind == "alone" else made

    uninterrupted = train(model, jobs())
    for death in (1, 4, 8):
        states, steps = [], []

        def die(make, death=death, states=states, steps=steps):
            state = make()
            copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
            states.append(type(state)(state.identity, state.elapsed, dict(state.counters), copies))
            steps.append(1)
            if len(steps) == death:
                raise Stop

        with pytest.raises(Stop):
            train(model, jobs(), on_state=die)
        resumed = train(model, jobs(), resume=states[-1])
        for name, done in uninterrupted.items():
            close(resumed[name].weights, done.weights, tolerance=0)
            assert (resumed[name].steps, resumed[name].best_step) == (done.steps, done.best_step)
            assert resumed[name].tokens == done.tokens
            assert resumed[name].conflict == done.conflict


def test_a_state_of_another_run_is_refused(model):
    states = []
    train(model, [job(model, toy_task())], on_state=lambda make: states.append(make()))
    for other in (job(model, toy_task(), seed=4), job(model, toy_task(size=50))):
        with pytest.raises(UsageError, match="belongs to another run"):
            train(model, [other], resume=states[0])


def test_activation_checkpointing_does_not_change_results(model):
    plain = train(model, [job(model, toy_task())])["toy"]
    with model.checkpointing():
        checkpointed = train(model, [job(model, toy_task())])["toy"]
    close(checkpointed.weights, plain.weights, tolerance=0)
    assert not any("forward" in vars(block) for block in model.backbone.blocks)


def test_recomputed_blocks_gather_their_factors_again_for_non_adjacent_slots(model):
    def jobs():
        steps = {"one": 6, "two": 2, "three": 6}  # the middle one leaves the others apart
        return [job(model, toy_answers(n), max_steps=s) for n, s in steps.items()]

    plain = train(model, jobs())
    with model.checkpointing():
        checkpointed = train(model, jobs())
    for name, done in plain.items():
        close(checkpointed[name].weights, done.weights, tolerance=1e-6)


def test_the_orthogonality_penalty_uses_the_present_weights_not_the_best(model, make_weights):
    settings = {"rank": 2, "orthogonal": 1.0, "eval_every": 1, "learning_rate": 0.1, "clip": 1e9}
    made = replace(job(model, toy_answers(), **settings), frozen=make_weights(rank=2))
    run = TrainingRun(model, [made])
    for _ in range(4):
        run.step()
    (learner,) = run.families[0].learners
    present = run.bank.weights(learner.vector.detach(), learner.weights())
    gradient = torch.zeros_like(learner.vector)
    learner.step(gradient, 0.0)
    expected = run.bank.vector(overlap_gradient(present, made.frozen))
    torch.testing.assert_close(gradient, expected)


def test_activation_checkpointing_stores_fewer_activations(model):
    def num_stored(checkpointing):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        run = TrainingRun(model, [job(model, toy_task())])
        with (
            model.checkpointing(checkpointing),
            torch.autograd.graph.saved_tensors_hooks(count, lambda t: t),
        ):
            run._backward(run.families[0].draw())
        return total

    assert num_stored(True) < 0.6 * num_stored(False)


def test_the_layers_setting_selects_blocks(model):
    chosen = select_targets(model.shapes, "all-linear", "1:")
    assert {m.split(".")[2] for m in chosen} == {"1"}
    assert select_targets(model.shapes, "q_proj", "-2:-1") == {
        "model.layers.0.self_attn.q_proj": (32, 32)
    }
    with pytest.raises(UsageError, match=r"layers='7:' names no block.*slice of the 2 blocks"):
        select_targets(model.shapes, "all-linear", "7:")
    with pytest.raises(UsageError, match="layers='top' names no block"):
        select_targets(model.shapes, "all-linear", "top")


def test_no_gradient_flows_below_the_lowest_adapted_layer(model):
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


def test_the_overlap_gradient_matches_autograd(make_weights):
    new, old = make_weights(rank=3, seed=1), make_weights(rank=5, seed=2, only=("q_proj", "k_proj"))
    leaves = new.with_factors(
        {m: (a.clone().requires_grad_(), b) for m, (a, b) in new.factors.items()}
    )
    overlap(leaves, old).backward()
    gradients = overlap_gradient(new, old).factors
    assert set(gradients) == set(old.factors)
    for module, (a, b) in gradients.items():
        torch.testing.assert_close(a, leaves.factors[module][0].grad)
        assert not b.any()
