"""The demo's budget: how much it trains and measures is told by the machine, within its seconds."""

import pytest
from pico import toy_answers, toy_task

from adapterhub_chat.cli.demo import MIN_TEST_EXAMPLES, run_demo, step_seconds
from adapterhub_chat.pool.pool import Pool

QUICK = {"max_steps": 9, "rows_per_step": 1, "row_length": 64, "epochs": 50, "eval_examples": 4}


def tasks():
    return [toy_task("sentiment"), toy_answers("qa", size=60)]


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1), (600.0, 9)])
def test_the_time_budget_determines_the_steps(hub, seconds, steps):
    done = run_demo(hub, tasks=tasks(), settings=QUICK, seconds=seconds)
    assert {m.training.steps for m in done.manifests.values()} == {steps}
    numbers = {m.scores[0].n for m in done.manifests.values()}
    assert max(numbers) == MIN_TEST_EXAMPLES if steps == 1 else min(numbers) > MIN_TEST_EXAMPLES
    kept = Pool(hub.pool.root)
    for name, manifest in done.manifests.items():
        assert kept.manifest(name).scores == manifest.scores


def test_timing_steps_save_no_adapter(hub):
    assert step_seconds(hub, tasks(), QUICK) > 0
    assert not hub.pool.names()
