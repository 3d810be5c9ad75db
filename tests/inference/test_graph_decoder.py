"""Recorded steps: same texts as without recording, and another adapter needs no new recording."""

import gc
from shutil import which

import pytest
import torch
from torch._dynamo import reset
from torch._dynamo.utils import counters

from adapterhub_chat import AdapterHub
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.fused_decoder import make_decoder
from adapterhub_chat.inference.graph_decoder import GraphDecoder
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.types import as_mix

RULES = Sampling(max_new_tokens=12, ignore_eos=True)


@pytest.fixture
def loaded(model, make_weights):
    for n in range(4):
        model.load(f"a{n}", make_weights(seed=n, rank=4))
    model.load("attention", make_weights(seed=8, rank=3, only=("q_proj", "v_proj")))
    return model


COMPILED = [pytest.mark.slow, pytest.mark.skipif(not which("c++"), reason="needs a C++ compiler")]


@pytest.fixture(params=["eager", pytest.param("inductor", marks=COMPILED)])
def engine(loaded, request):
    """The traced step runs as it is ("eager"), or compiled; tracing is the same."""
    reset()
    counters.clear()
    return graph_engine(loaded, backend=request.param)


def graph_engine(model, backend="eager", **options):
    decoder = GraphDecoder(model, make_decoder(model), backend=backend)
    return Engine(model, rows=8, prefix_bytes=0, decoder=decoder, **options)


def traced():
    return counters["stats"]["unique_graphs"]


def ask(engine, *choices, first=40):
    asked = [Request((first, first + n), as_mix(c), RULES) for n, c in enumerate(choices)]
    return [t.result().ids for t in [engine.submit(request) for request in asked]]


def test_texts_equal_those_without_recording(engine, loaded):
    plain = Engine(loaded, rows=8, prefix_bytes=0)
    for choices in (
        ["a0", "a1", "a2", "a3"],
        [None, "a0", {"a1": -0.5}, "attention", None],
        [None, None],
        [{"a0": 0.5, "a1": 0.5}, "a2"],  # several adapters in a row: not recorded
        ["attention"],
    ):
        assert ask(engine, *choices) == ask(plain, *choices)


def test_another_adapter_needs_no_new_recording(engine, loaded, make_weights):
    plain = Engine(loaded, rows=8, prefix_bytes=0)
    ask(engine, "a0", "a1", "a2")
    before = engine.decoder.num_recordings, traced()
    assert before[0] > 0
    assert before[0] == before[1]
    loaded.load("a1", make_weights(seed=20, rank=4))  # replaced
    loaded.unload("a0")
    loaded.load("new", make_weights(seed=21, rank=2))  # into the slot of another adapter
    for choices in (["a1", "new", "a3"], ["a3", None, "attention"], ["a2", "a2", "a2"]):
        assert ask(engine, *choices, first=50) == ask(plain, *choices, first=50)
    assert (engine.decoder.num_recordings, traced()) == before


def test_each_shape_is_recorded_once(engine, loaded, make_weights):
    ask(engine, "a0")
    once = engine.decoder.num_recordings
    loaded.load("wide", make_weights(seed=30, rank=30))
    plain = Engine(loaded, rows=8, prefix_bytes=0)
    assert ask(engine, "wide", "a0") == ask(plain, "wide", "a0")
    wide = engine.decoder.num_recordings
    assert wide > once
    ask(engine, "a1", "wide")
    ask(engine, "a1", "a2")
    assert engine.decoder.num_recordings == wide == traced()
    ask(engine, "a1")
    assert engine.decoder.num_recordings == wide + 1 == traced()
    long = Request(tuple(range(3, 150)), as_mix("a1"), RULES)  # the cache must grow
    assert engine.submit(long).result().ids == plain.submit(long).result().ids
    assert engine.decoder.num_recordings == wide + 2 == traced()


def test_a_row_without_an_adapter_is_free_of_the_last_ones_factors(engine, loaded):
    plain = Engine(loaded, rows=8, prefix_bytes=0)
    ask(engine, "a0", "a1")
    gc.collect()
    (static,) = engine.decoder._static.values()
    assert static.loaded_plan() is None  # the last batch's slots are released
    with torch.inference_mode():
        static.bank.flat[0] = float("nan")
    assert ask(engine, None, "a1") == ask(plain, None, "a1")


def test_padding_rows_do_not_overwrite_a_prompt(loaded):
    """A request whose prompt is being computed has the cache rows that pad the decoding ones."""
    reset()
    engine = graph_engine(loaded, chunk=16)
    plain = Engine(loaded, rows=8, chunk=16, prefix_bytes=0)
    long = tuple(range(3, 90))
    asked = [Request((40, n), as_mix("a1"), RULES) for n in range(3, 6)]
    asked.append(Request(long, as_mix("a2"), RULES))
    texts = []
    for either in (engine, plain):
        tickets = [either.submit(request) for request in asked]
        texts.append([ticket.result().ids for ticket in tickets])
    assert texts[0] == texts[1]


def test_a_step_that_cannot_be_recorded_runs_without(loaded):
    reset()
    plain = Engine(loaded, rows=8, prefix_bytes=0)

    def broken(_graph, _inputs):
        raise MemoryError("no memory for a record")

    engine = graph_engine(loaded, backend=broken)
    with pytest.warns(UserWarning, match="is not recorded"):
        texts = ask(engine, "a0", "a1")
    assert texts == ask(plain, "a0", "a1")
    assert ask(engine, "a0", "a1") == texts


def test_a_backbone_that_cannot_be_recorded_is_refused(pico_folder, tmp_path, loaded):
    quantized = load_backbone(str(pico_folder), dtype="fp32", device="cpu", quantize="nf4")
    with pytest.raises(UsageError, match="Leave graphs out"):
        Engine(AdapterModel(quantized), graphs=True)
    hub = AdapterHub(str(pico_folder), tmp_path, dtype="fp32", device="cpu", graphs=True)
    assert isinstance(hub.engine.decoder, GraphDecoder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_same_texts(pico_folder, make_weights):
    model = AdapterModel(load_backbone(str(pico_folder), dtype="fp32", device="cuda"))
    for n in range(4):
        model.load(f"a{n}", make_weights(seed=n, rank=4))
    plain, graphs = Engine(model, prefix_bytes=0), Engine(model, prefix_bytes=0, graphs=True)
    for choices in (["a0", "a1", None], ["a3", "a2", "a2"], [None]):
        assert ask(graphs, *choices) == ask(plain, *choices)
    records = graphs.decoder.num_recordings
    model.load("a0", make_weights(seed=30, rank=4))
    assert ask(graphs, "a0", "a3", None) == ask(plain, "a0", "a3", None)
    assert graphs.decoder.num_recordings == records
