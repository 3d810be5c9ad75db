"""Settings: each written once, every misfit of a source said at once, with what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_chat.config import RunConfig, TrainConfig
from adapterhub_chat.errors import ConfigError
from adapterhub_chat.training.run_file import read_run
from adapterhub_chat.validation import read_settings


def run_of(text="", tasks=(), names=(), flags=None, settings=None, *, folder=None):
    path = None
    if text:
        path = folder / "run.toml"
        path.write_text(text)
    return read_run(path, tasks, names, flags or {}, settings or {})


def misfits_of(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        run_of(*args, **kwargs)
    return caught.value.misfits


def test_every_setting_has_a_description_and_a_valid_default():
    for model in (TrainConfig, RunConfig):
        for name, field in model.model_fields.items():
            assert field.description or name in ("settings", "adapters")
            assert not field.is_required()
            model.model_validate({name: field.get_default(call_default_factory=True)})


def test_a_run_is_made_of_tasks_alone():
    run = run_of(tasks=["qa", "my/tasks/reviews.toml", "x/y.py"])
    assert list(run.adapters) == ["qa", "reviews", "y"]
    assert run.adapters["reviews"] == {"task": "my/tasks/reviews.toml"}
    assert run == RunConfig(adapters=run.adapters)


def test_names_go_with_the_tasks_in_order():
    run = run_of(tasks=["qa", "sentiment"], names=["one", "two"])
    assert run.adapters == {"one": {"task": "qa"}, "two": {"task": "sentiment"}}


def test_flags_win_over_the_file_also_inside_an_adapter(tmp_path):
    text = """
        how = "sequence"
        pool = "from-file"
        [settings]
        rank = 4
        alpha = 8.0
        [adapters.a]
        task = "qa"
        rank = 2
        seed = 5
    """
    run = run_of(
        text, flags={"pool": "from-flag", "how": None}, settings={"rank": 16}, folder=tmp_path
    )
    assert (run.how, run.pool) == ("sequence", "from-flag")
    assert run.settings == {"rank": 16, "alpha": 8.0}
    assert run.adapters == {"a": {"task": "qa", "seed": 5}}


def test_tasks_on_the_command_line_join_those_of_the_file(tmp_path):
    run = run_of('[adapters.a]\ntask = "qa"', tasks=["sentiment"], folder=tmp_path)
    assert run.adapters == {"a": {"task": "qa"}, "sentiment": {"task": "sentiment"}}


def test_misfits_of_a_file_are_listed_with_allowed_values(tmp_path):
    text = """
        how = "both"
        quantise = "nf4"
        test_examples = -1
        [settings]
        rnak = 8
        schedule = "square"
        learning_rate = 0
        [adapters.a]
        rank = 0
        [adapters.b]
        task = "qa"
        warmup = 1.0
    """
    found = "\n".join(misfits_of(text, folder=tmp_path))
    assert len(found.splitlines()) == 9
    for wanted in (
        "how: input should be 'joint', 'sequence' or 'shared'; got 'both'",
        "quantise: no such key; allowed: adapters, backbone, checkpointing, device, dtype, grow,",
        "(did you mean 'quantize'?)",
        "test_examples: input should be greater than or equal to 0",
        "settings.rnak: no such key; allowed: alpha, clip,",
        "(did you mean 'rank'?)",
        "settings.schedule: input should be 'cosine', 'linear' or 'constant'; got 'square'",
        "settings.learning_rate: input should be greater than 0",
        'adapters.a needs a task, as in task = "qa"',
        "adapters.a.rank: input should be greater than or equal to 1",
        "adapters.b.warmup: input should be less than 1",
    ):
        assert wanted in found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("adapters = 3", "adapters: must be a table; got 3"),
        ('settings = "fast"\n[adapters.a]\ntask = "qa"', "settings: must be a table; got 'fast'"),
        ("[adapters]\na = 3", "adapters.a: input should be a valid dictionary; got 3"),
        ("[adapters.a]\ntask = 3", 'adapters.a needs a task, as in task = "qa"'),
        ("how = [", "is not valid TOML"),
        ("pool = 'p'", "nothing to train"),
    ],
)
def test_files_of_another_make_are_refused_in_words(tmp_path, text, wanted):
    assert any(wanted in misfit for misfit in misfits_of(text, folder=tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        read_run(tmp_path / "none.toml", ["qa"], [], {}, {})
    (tmp_path / "latin.toml").write_bytes(b'pool = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: is not valid TOML"):
        read_run(tmp_path / "latin.toml", ["qa"], [], {}, {})


@pytest.mark.parametrize(
    ("tasks", "names", "wanted"),
    [
        ([], [], "nothing to train"),
        (["qa"], ["a", "b"], "1 tasks but 2 names"),
        (["qa", "qa"], [], "two adapters are called qa"),
        (["qa", "sentiment"], ["a", "a"], "two adapters are called a"),
        (["x/qa.toml", "qa"], [], "two adapters are called qa"),
    ],
)
def test_tasks_and_names_that_do_not_pair_up(tasks, names, wanted):
    assert any(wanted in misfit for misfit in misfits_of(tasks=tasks, names=names))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, "much"])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(ConfigError) as caught:
        read_settings(TrainConfig, {"learning_rate": value, "seed": 2**64}, "here")
    assert len(caught.value.misfits) == 2
    assert str(caught.value).startswith("here: 2 problems\n")


@settings(max_examples=60, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from([*TrainConfig.model_fields, "rang", "lr", ""]),
        st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.none(), st.booleans()),
        max_size=6,
    )
)
def test_any_settings_are_either_taken_or_refused_key_by_key(values):
    alone = {}
    for key, value in values.items():
        try:
            read_settings(TrainConfig, {key: value}, "x")
        except ConfigError as error:
            alone[key] = error.misfits
    if not alone:
        taken = read_settings(TrainConfig, values, "x").model_dump()
        assert set(values) <= set(taken)
        return
    with pytest.raises(ConfigError) as caught:
        read_settings(TrainConfig, values, "x")
    assert sorted(caught.value.misfits) == sorted(m for found in alone.values() for m in found)


def test_settings_come_back_from_what_is_saved():
    config = TrainConfig(rank=4, targets="q_proj", schedule="constant")
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_a_sweep_of_the_file_that_is_no_table_is_a_misfit_even_with_a_sweep_of_the_command_line(
    tmp_path,
):
    path = tmp_path / "run.toml"
    path.write_text('[adapters.a]\ntask = "qa"\nsweep = 3\n')
    with pytest.raises(ConfigError, match=r"adapters\.a\.sweep needs a list of values"):
        read_run(path, [], [], {}, {}, {"rank": [2, 4]})


def test_a_sweep_of_the_command_line_joins_those_of_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[adapters.a]\ntask = "qa"\n[adapters.a.sweep]\nalpha = [1.0, 2.0]\n')
    run = read_run(path, ["sentiment"], [], {}, {}, {"rank": [2, 4]})
    assert run.adapters["a"]["sweep"] == {"alpha": [1.0, 2.0], "rank": [2, 4]}
    assert run.adapters["sentiment"]["sweep"] == {"rank": [2, 4]}
