"""Tasks: prompts, splits, mixtures and task files."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_chat.data.prompts import render_prompt
from adapterhub_chat.data.splits import Splits, input_key, split_examples, split_of
from adapterhub_chat.data.task import Task, list_tasks, load_task, mixture
from adapterhub_chat.errors import ConfigError, DataError, UnknownNameError
from adapterhub_chat.types import SPLITS, Example, Message, PromptContract

FREE = PromptContract()
LABELLED = PromptContract(labels={"0": "bad", "1": "good"})
WORDS = st.lists(st.text("abcdefg ", min_size=1).filter(str.strip), min_size=1, max_size=40)


def example(text, answer="yes", **more):
    return Example({"text": text}, answer, **more)


def texts(splits, split):
    return [e.fields["text"] for e in splits.parts[split]]


def where(splits):
    """Key -> split of every example."""
    return {input_key(e, FREE): split for split in SPLITS for e in splits.parts[split]}


def labelled_task(name, rows=(("good film", "1"), ("bad film", "0")), **more):
    return Task(
        name=name,
        contract=replace(LABELLED, template=name + ": {text}"),
        metric=more.pop("metric", "accuracy"),
        load=lambda: split_examples([example(t, a) for t, a in rows], LABELLED),
        **more,
    )


# ---- the prompt ----------------------------------------------------------------------------------


def test_fields_are_put_in():
    assert render_prompt("Q: {q}\nA:", {"q": "why?"}) == "Q: why?\nA:"
    assert render_prompt(" {a} {b} ", {"a": "{b}", "b": r"\1 {0} {{x}}"}) == r"{b} \1 {0} {{x}}"
    assert render_prompt("{n}", {"n": 5}) == "5"


def test_braces_of_the_template():
    assert render_prompt('{"text": "{text}", "like": {{text}}}', {"text": "hi"}) == (
        '{"text": "hi", "like": {text}}'
    )


def test_an_optional_line_drops_out():
    template = "Passage: {context?}\nQuestion: {question}"
    assert render_prompt(template, {"question": "q"}) == "Question: q"
    assert render_prompt(template, {"question": "q", "context": ""}) == "Question: q"
    assert render_prompt(template, {"question": "q", "context": "c\n\nd"}) == (
        "Passage: c\n\nd\nQuestion: q"
    )
    assert render_prompt("{question} ({hint?})", {"question": "q"}) == "q ()"


def test_missing_fields_are_named():
    with pytest.raises(DataError, match=r"needs the field a, c; given: b"):
        render_prompt("{a} {b} {c} {d?}", {"b": "1"})


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3))
def test_values_come_through_untouched(fields):
    rendered = render_prompt("<{a}|{b}|{c}>", fields)
    assert rendered == "<{}|{}|{}>".format(*(fields[name] for name in "abc"))


# ---- splits --------------------------------------------------------------------------------------


@given(WORDS, st.randoms(use_true_random=False))
def test_splits_cover_all_and_ignore_order_and_size(words, rng):
    whole = split_examples(map(example, words), FREE, validation=0.2, test=0.3)
    keys = {" ".join(word.split()) for word in words}
    assert where(whole).keys() == keys
    assert sum(len(part) for part in whole.parts.values()) == len(keys), "no key twice"
    assert whole.duplicates == len(words) - len(keys)

    shuffled = rng.sample(words, len(words))
    again = split_examples(map(example, shuffled), FREE, validation=0.2, test=0.3)
    assert {s: texts(again, s) == texts(whole, s) for s in SPLITS} == dict.fromkeys(SPLITS, True)
    fewer = split_examples(map(example, shuffled[:5]), FREE, validation=0.2, test=0.3)
    assert where(fewer).items() <= where(whole).items()


def test_shares_are_kept_and_order_is_mixed():
    splits = split_examples(map(example, map(str, range(5000))), FREE)
    assert len(splits.parts["validation"]) == pytest.approx(500, abs=75)
    assert len(splits.parts["test"]) == pytest.approx(500, abs=75)
    numbers = [int(text) for text in texts(splits, "train")]
    assert abs(sum(numbers[:400]) / 400 - 2500) < 300, "the source's order is gone"


def test_groups_stay_together():
    rows = [example(f"{g} {i}", group=g) for g in "abcdefghijklmnopqrst" for i in range(9)]
    splits = split_examples(rows, FREE, validation=0.3, test=0.3)
    assert all(splits.parts[split] for split in SPLITS)
    for split in SPLITS:
        assert {split_of(e.group, validation=0.3, test=0.3) for e in splits.parts[split]} == {split}


def test_an_input_in_two_groups_stays_in_one_split():
    rows = [example("hello", answer, group=str(g)) for g in range(30) for answer in ("hi", "hey")]
    splits = split_examples(rows, FREE)
    (kept,) = (e for part in splits.parts.values() for e in part)
    assert set(kept.accepted) == {"hi", "hey"}


def test_case_and_layout_make_no_new_input_but_history_does():
    rows = [example("Good  film"), example("good film "), example("good film.")]
    rows.append(example("good film", history=(Message("user", "and?"),)))
    splits = split_examples(rows, FREE)
    assert len(where(splits)) == 3
    assert splits.duplicates == 1


def test_the_template_s_words_move_no_example():
    rows = [Example({"text": str(i), "note": str(i % 7)}, "a") for i in range(200)]
    plain, wordy = (
        split_examples(rows, PromptContract(template=t)) for t in ("{text}", "Dear, {text}!")
    )
    assert plain == wordy


def test_examples_with_contradicting_labels_are_dropped():
    rows = [example("so so", "0"), example("So so", "1"), example("so so", "1")]
    splits = split_examples([*rows, example("fine", "1"), example("fine", "1")], LABELLED)
    assert [e.fields["text"] for part in splits.parts.values() for e in part] == ["fine"]
    assert (splits.duplicates, splits.contradictions) == (1, 3)
    with pytest.raises(DataError, match=r"no examples \(3 had contradicting labels\)"):
        split_examples(rows, LABELLED)


def test_several_free_answers_become_references():
    rows = [example("bye", "ciao"), example("bye", "see you"), example("Bye", "see you")]
    splits = split_examples(
        [*rows, example("bye", "adieu", references=("adieu", "farewell"))], FREE
    )
    (kept,) = (e for part in splits.parts.values() for e in part)
    assert kept.answer == "see you", "the most frequent one is taught"
    assert set(kept.accepted) == {"see you", "ciao", "adieu", "farewell"}


def test_splits_of_the_source_are_kept_and_leaks_closed():
    given = {
        "train": [example(str(i)) for i in range(100)],
        "test": [example(str(i)) for i in range(90, 110)],
    }
    splits = split_examples(given, FREE, validation=0.2, test=0.5)
    assert sorted(map(int, texts(splits, "test"))) == list(range(90, 110))
    assert 5 < len(splits.parts["validation"]) < 35, "cut off the train split"
    assert len(splits.parts["train"]) + len(splits.parts["validation"]) == 90
    assert splits.duplicates == 10


def test_misfits_are_listed_together():
    rows = [example("a", "1"), example("b", "meh"), example(" ", "2"), Example({"txet": "c"}, "")]
    with pytest.raises(DataError) as caught:
        split_examples(rows, LABELLED, source="films")
    message = str(caught.value)
    assert message.startswith("films: 5 problems")
    for misfit in (
        "example 2: label 'meh' is not one of 0, 1",
        "example 3: field 'text' is empty",
        "example 3: label '2' is not one of 0, 1",
        "example 4: field 'text' is missing",
        "example 4: the answer is empty",
    ):
        assert misfit in message
    with pytest.raises(DataError, match="and 20 more"):
        split_examples([example("a", "x")] * 30, LABELLED)


def test_empty_data_and_impossible_shares_are_errors():
    with pytest.raises(DataError, match="films: no examples"):
        split_examples([], FREE, source="films")
    for shares in ({"validation": 0.5, "test": 0.5}, {"validation": -0.1}):
        with pytest.raises(ConfigError, match="sum below 1"):
            split_examples([example("a")], FREE, **shares)


# ---- task and mixture ----------------------------------------------------------------------------


def test_a_task_reads_once_and_late():
    reads = []

    def load():
        reads.append(1)
        return Splits({"train": (example("a"),)})

    task = Task("t", FREE, "token_f1", load)
    assert not reads
    assert task.split("train") is task.split("train")
    assert task.split("test") == ()
    assert reads == [1]
    with pytest.raises(UnknownNameError, match="test, train, validation"):
        task.split("dev")


def test_the_hash_depends_on_the_data_only():
    task = labelled_task("t")
    assert task.data_hash() == labelled_task("t").data_hash()
    assert replace(task, about="other", metric="macro_f1").data_hash() == task.data_hash()
    rows = (("good film", "1"), ("bad film", "1"))
    assert labelled_task("t", rows).data_hash() != task.data_hash()
    moved = Task("t", LABELLED, "accuracy", lambda: Splits({"test": task.split("train")}))
    assert moved.data_hash() != task.data_hash()


@pytest.mark.parametrize(
    ("metric", "contract", "misfit"),
    [
        ("acuracy", LABELLED, "known: accuracy, exact_match"),
        ("accuracy", FREE, "give two or more"),
        ("token_f1", LABELLED, "there can be no labels"),
        ("accuracy", PromptContract(labels={"0": "ok", "1": "ok"}), "the same words"),
    ],
)
def test_metric_and_labels_must_agree(metric, contract, misfit):
    with pytest.raises(ConfigError, match=misfit):
        Task("t", contract, metric, lambda: Splits({}))


def test_a_mixture_is_a_task_whose_examples_keep_their_contracts():
    films = labelled_task("films", [(f"film {i}", str(i % 2)) for i in range(200)], licence="MIT")
    books = labelled_task("books", [(f"book {i}", str(i % 2)) for i in range(100)], language="de")
    both = mixture("both", [films, books])
    for split in SPLITS:
        assert len(both.split(split)) == len(films.split(split)) + len(books.split(split))
        for e in both.split(split):
            kind = e.fields["text"].split()[0]
            assert both.contract_of(e).template == f"{kind}s: {{text}}"
    assert both.split("train") == mixture("both", [films, books]).split("train")
    assert (both.metric, both.language, both.licence) == ("accuracy", "en, de", "MIT, unknown")
    assert films.contract_of(films.split("train")[0]) is films.contract
    nested = mixture("nested", [both, films])
    assert {nested.contract_of(e).template for e in nested.split("train")} == {
        "films: {text}",
        "books: {text}",
    }


def test_weights_count_training_examples_only():
    a, b = (labelled_task(n, [(f"{n} {i}", "1") for i in range(100)]) for n in "ab")
    mixed = mixture("m", [a, b], [2, 0.5])
    count = Counter(e.fields["text"][0] for e in mixed.split("train"))
    assert count == {"a": 2 * len(a.split("train")), "b": round(len(b.split("train")) / 2)}
    assert len(mixed.split("test")) == len(a.split("test")) + len(b.split("test"))


def test_a_mixture_excludes_members_test_items_from_training():
    rows = tuple(example(str(i), "1") for i in range(50))
    a = Task("a", LABELLED, "accuracy", lambda: Splits({"train": rows}))
    b = Task("b", LABELLED, "accuracy", lambda: Splits({"test": rows[:10]}))
    mixed = mixture("m", [a, b])
    assert len(mixed.split("train")) == 40
    assert not set(texts(mixed.splits, "train")) & set(texts(mixed.splits, "test"))


def test_a_mixture_needs_one_metric_and_fitting_weights():
    a, b = labelled_task("a"), labelled_task("b", metric="macro_f1")
    with pytest.raises(DataError, match="a: accuracy, b: macro_f1"):
        mixture("m", [a, b])
    for tasks, weights in (([], None), ([a], [1, 2]), ([a], [-1])):
        with pytest.raises(ConfigError, match="one weight >= 0 each"):
            mixture("m", tasks, weights)


# ---- task files ----------------------------------------------------------------------------------

TOML = """
about = "Reviews"
metric = "accuracy"
[data]
path = "reviews.csv"
[columns]
text = "review"
answer = "label"
[prompt]
template = "Review: {text}"
system = "Judge."
[labels]
0 = "negative"
1 = "positive"
"""
CSV = "review,label\n" + "".join(f'"film {i}, part {i}",{i % 2}\n' for i in range(50))


def task_file(folder, toml=TOML, files=None):
    for name, content in ({"reviews.csv": CSV} if files is None else files).items():
        (folder / name).write_text(content, encoding="utf-8")
    path = folder / "reviews.toml"
    path.write_text(toml, encoding="utf-8")
    return path


def misfits_of(path):
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    return caught.value.misfits


def all_examples(task):
    return [e for split in SPLITS for e in task.split(split)]


def test_a_toml_file_is_a_task(tmp_path):
    task = load_task(task_file(tmp_path))
    assert (task.name, task.metric, task.about) == ("reviews", "accuracy", "Reviews")
    assert task.contract == PromptContract(
        template="Review: {text}", system="Judge.", labels={"0": "negative", "1": "positive"}
    )
    assert task.sources == ("reviews.csv",)
    assert len(all_examples(task)) == 50
    found = {(e.fields["text"], e.answer) for e in all_examples(task)}
    assert ("film 7, part 7", "1") in found


def test_every_misfit_of_a_toml_file_in_one_message(tmp_path):
    toml = """
    metric = "acuracy"
    langauge = "en"
    [data]
    path = "gone.csv"
    validation = "reviews.xlsx"
    config = "plain"
    limit = 0
    [columns]
    text = "review"
    [prompt]
    tempalte = "x"
    template = "{text} {title}"
    max_new_tokens = "many"
    [split]
    test = 1.5
    """
    misfits = misfits_of(task_file(tmp_path, toml, {}))
    expected = [
        "langauge: no such key; allowed: about, columns, data, labels, language,",
        "(did you mean 'language'?)",
        "data.limit: input should be greater than 0; got 0",
        "prompt.tempalte: no such key; allowed: max_new_tokens, stop, system, temperature, ",
        "prompt.max_new_tokens: input should be a valid integer",
        "split.test: input should be less than 1; got 1.5",
        "prompt.template: no column for title; [columns] has text",
        "columns.answer: is missing",
        "metric: unknown metric 'acuracy'; known: accuracy, exact_match",
        "data: config only goes with hub",
        "data.path: no file",
        "data.validation: unknown format 'reviews.xlsx'; known: .csv, .tsv, .json, .jsonl, ",
    ]
    assert [part for part in expected if not any(part in m for m in misfits)] == []
    assert len(misfits) == 11


@pytest.mark.parametrize(
    ("change", "misfit"),
    [
        (('metric = "accuracy"', 'metric = "token_f1"'), "there can be no labels"),
        (('1 = "positive"', ""), "give two or more"),
        (('"positive"', '"negative"'), "the same words"),
        (('"review"', '"text"'), "has no column text; it has review, label"),
        (('path = "reviews.csv"', ""), "give one of path, train"),
        (('path = "reviews.csv"', 'path = "reviews.csv"\nhub = "a/b"'), "give one of path, train"),
        (('"positive"', "1"), "labels.1: input should be a valid string; got 1"),
        (("[labels]", "[labels"), "not TOML"),
        (('metric = "accuracy"', ""), "metric: is missing"),
    ],
)
def test_one_misfit_of_a_toml_file(tmp_path, change, misfit):
    misfits = misfits_of(task_file(tmp_path, TOML.replace(*change)))
    assert len(misfits) == 1
    assert misfit in misfits[0]


@pytest.mark.parametrize(
    ("csv", "misfit"),
    [
        ("review,label\n", "holds no rows"),
        ("", "holds no rows"),
        ("review;label\nfine;1\n", "has no column review, label; it has review;label"),
        ("review,label\nfine, really,1\n", "row 1 is not one value for each column"),
    ],
)
def test_misfits_of_a_csv_are_errors_when_the_task_is_loaded(tmp_path, csv, misfit):
    misfits = misfits_of(task_file(tmp_path, files={"reviews.csv": csv}))
    assert len(misfits) == 1
    assert misfit in misfits[0]


def test_misfits_of_rows_are_errors_when_they_are_read(tmp_path):
    csv = "review,label\nfine,1\nbad\n,0\nso so,2\n"
    task = load_task(task_file(tmp_path, files={"reviews.csv": csv}))
    with pytest.raises(DataError) as caught:
        task.split("train")
    for part in (
        "example 2: the answer is empty",
        "example 3: field 'text' is empty",
        "example 4: label '2' is not one of 0, 1",
    ):
        assert part in str(caught.value)
    (tmp_path / "reviews.csv").write_bytes("review,label\nfine,1\nschön,1\n".encode("latin-1"))
    assert "cannot be read: 'utf-8' codec" in misfits_of(tmp_path / "reviews.toml")[0]


FREE_TOML = """
metric = "token_f1"
[data]
{data}
[columns]
question = "q"
answer = "a"
context = "passage"
history = "turns"
group = "page"
[prompt]
template = "{{context?}}\\n{{question}}"
"""
ROWS = [
    {"q": "Who?", "a": ["Ann", "Anna"], "passage": "Ann came.", "page": 1},
    {"q": "How many?", "a": 2, "page": 1},
    {
        "q": "And then?",
        "a": "home",
        "turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    },
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_rows_with_references_history_and_gaps(tmp_path, suffix):
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    files = {f"d.{suffix}": lines if suffix == "jsonl" else json.dumps(ROWS)}
    task = load_task(task_file(tmp_path, FREE_TOML.format(data=f'path = "d.{suffix}"'), files))
    found = {e.fields["question"]: e for e in all_examples(task)}
    assert found["Who?"] == Example(
        {"question": "Who?", "context": "Ann came."}, "Ann", ("Ann", "Anna"), group="1"
    )
    assert found["How many?"].answer == "2"
    assert found["How many?"].fields.keys() == {"question"}
    assert found["And then?"].history == (Message("user", "hi"), Message("assistant", "hello"))


@pytest.mark.parametrize(
    ("line", "misfit"),
    [
        ("{oops", r"d.jsonl cannot be read: .*line 1 column 2"),
        ("[1, 2]", "row 1 is not one value for each column"),
    ],
)
def test_bad_json_is_a_misfit(tmp_path, line, misfit):
    toml = FREE_TOML.format(data='path = "d.jsonl"')
    with pytest.raises(ConfigError, match=misfit):
        load_task(task_file(tmp_path, toml, {"d.jsonl": line}))


def test_a_bad_turn_of_the_history_is_an_error(tmp_path):
    row = json.dumps(ROWS[2] | {"turns": [{"role": "bot", "content": "hi"}]})
    toml = FREE_TOML.format(data='path = "d.jsonl"')
    task = load_task(task_file(tmp_path, toml, {"d.jsonl": row}))
    with pytest.raises(
        DataError, match="input should be 'system', 'user' or 'assistant'; got 'bot'"
    ):
        task.split("train")


def test_files_per_split_tsv_and_limit(tmp_path):
    toml = TOML.replace('path = "reviews.csv"', 'train = "a.tsv"\ntest = "b.csv"\nlimit = 4')
    tsv = "label\treview\n" + "".join(f"{i % 2}\tfilm {i}\n" for i in range(60))
    csv = "\ufeffreview,label\nfilm 3,1\nnew film,0\n"
    task = load_task(task_file(tmp_path, toml, {"a.tsv": tsv, "b.csv": csv}))
    assert sorted(e.fields["text"] for e in task.split("test")) == ["film 3", "new film"]
    assert len(task.split("train")) == len(task.split("validation")) == 4
    assert {e.fields["text"] for e in task.split("train")} != {f"film {i}" for i in range(4)}
    assert task.splits.duplicates == 1


@pytest.mark.slow
def test_parquet_and_hub_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"review": f"film {i}", "label": i % 2} for i in range(50)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "reviews.parquet")
    parquet = load_task(task_file(tmp_path, TOML.replace(".csv", ".parquet"), {}))
    assert len(all_examples(parquet)) == 50
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text(CSV)
    hub = f'hub = "{tmp_path}/set"'
    task = load_task(task_file(tmp_path, TOML.replace('path = "reviews.csv"', hub), {}))
    assert len(all_examples(task)) == 50
    path = task_file(tmp_path, TOML.replace('path = "reviews.csv"', 'hub = "no/where"'), {})
    with pytest.raises(DataError, match="Hub data set 'no/where'"):
        load_task(path).split("train")
    bad = TOML.replace(".csv", ".parquet").replace('"review"', '"text"')
    with pytest.raises(DataError, match="no column text; it has review, label"):
        load_task(task_file(tmp_path, bad, {})).split("train")


PY = """
from __future__ import annotations
from dataclasses import dataclass
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

@dataclass
class Row:
    text: str

def task() -> Task:
    rows = [Example({"text": Row(str(i)).text}, "a") for i in range(9)]
    contract = PromptContract()
    return Task("mine", contract, "token_f1", lambda: split_examples(rows, contract))
"""


def test_names_are_looked_up_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"qa", "generation", "sentiment", "support-tickets"} <= list_tasks().keys()
    (tmp_path / "tasks").mkdir()
    for name in ("mine", "qa", "_draft"):
        (tmp_path / "tasks" / f"{name}.py").write_text(PY)
    assert "_draft" not in list_tasks()
    assert list_tasks()["qa"] == Path("tasks/qa.py")
    assert load_task("mine").name == load_task("tasks/mine.py").name == "mine"
    assert len(all_examples(load_task("mine"))) == 9


@pytest.mark.parametrize("name", ["quiz", "quiz.toml", "some/where.py", ""])
def test_unknown_tasks_are_errors_that_list_the_known(name):
    with pytest.raises(UnknownNameError, match=r"known: .*generation, .*qa, .*sentiment.*path"):
        load_task(name)


@pytest.mark.parametrize("body", ["x = 1", "task = 3", "def task(): return None"])
def test_a_python_file_must_define_task(tmp_path, body):
    (tmp_path / "t.py").write_text(body)
    with pytest.raises(ConfigError, match="def task"):
        load_task(tmp_path / "t.py")
