"""The tasks that manifests name, and the drafts of new manifests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pico import toy_answers, toy_task

from adapterhub_chat.artifact.manifest import Training
from adapterhub_chat.errors import UsageError
from adapterhub_chat.pool.provenance import draft_of, load_trained_tasks, trained_task_names


def draft(backbone, origins, *tasks, **options):
    return draft_of("new", backbone, origins, Training(how="joint", tasks=tasks), **options)


def test_draft_joins_what_its_origins_say_and_is_prompted_as_the_last(backbone):
    films, answers = toy_task(), replace(toy_answers(), about="Answers.")
    made = draft(backbone, [films, answers], "toy", "answers")
    assert made.about == f"{films.about}; {answers.about}"
    assert (made.language, made.licence) == ("en", films.licence)
    assert (made.contract, made.metric) == (answers.contract, answers.metric)
    assert (made.backbone, made.fingerprint) == (backbone.name, backbone.fingerprint)
    assert made.probe is None
    assert not made.scores


def test_draft_of_manifests_has_the_given_prompt_and_leaves_out_empty_fields(backbone):
    films = draft(backbone, [toy_task()])
    unknown = draft(backbone, [toy_answers()]).model_copy(
        update={"about": "", "language": "", "licence": ""}
    )
    made = draft(backbone, [films, unknown], prompted_as=films)
    assert (made.about, made.language, made.licence) == (
        films.about,
        films.language,
        films.licence,
    )
    assert (made.contract, made.metric) == (films.contract, films.metric)


def test_trained_tasks_are_those_of_the_manifest(backbone):
    assert trained_task_names(None) == ()
    assert load_trained_tasks(None, "new") == []
    made = draft(backbone, [toy_task()], "natquiz-elsewhere")
    assert trained_task_names(made) == ("natquiz-elsewhere",)
    with pytest.raises(UsageError, match="'new' was trained on the task 'natquiz-elsewhere'"):
        load_trained_tasks(made, "new")
    shipped = draft(backbone, [toy_task()], "sentiment")
    assert [task.name for task in load_trained_tasks(shipped, "new")] == ["sentiment"]
