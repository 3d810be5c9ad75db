"""The dtype of a processor: the rule, the measurement behind it, and the cache that keeps it."""

import json
import math

import pytest
import torch

from adapterhub_chat.model.devices import explain_dtype, pick_dtype
from adapterhub_chat.model.native_speed import (
    DTYPE_KINDS,
    choose_dtype,
    kept_timings,
    machine,
    measure_products,
)

CPU = torch.device("cpu")


def timings(fp32, bf16):
    """Microseconds of a training product and of two decoding ones."""
    rows = (512, 1, 16)
    pairs = {"fp32": fp32, "bf16": bf16}
    return {name: dict(zip(rows, times, strict=True)) for name, times in pairs.items()}


AVX512 = timings((11300, 40, 184), (21500, 73, 232))
AMX = timings((11300, 40, 184), (1500, 25, 60))


@pytest.mark.parametrize(
    ("measured", "dtype"),
    [
        (AVX512, torch.float32),
        (AMX, torch.bfloat16),
        (timings((100, 100, 100), (100, 100, 100)), torch.bfloat16),
        (timings((100, 100, 100), (109, 109, 109)), torch.bfloat16),  # a near tie: half the memory
        (timings((100, 100, 100), (111, 111, 111)), torch.float32),
        (timings((100, 100, 100), (50, 190, 190)), torch.bfloat16),  # training and decoding differ
        (timings((100, 100, 100), (50, 250, 250)), torch.float32),
        (timings((100, 100, 100), (150, 70, 70)), torch.bfloat16),
    ],
)
def test_fp32_must_be_clearly_faster_than_bf16(measured, dtype):
    assert choose_dtype(measured).dtype is dtype


def test_both_judgements_are_told():
    why = choose_dtype(AVX512).why
    assert why == "measured 1.9 x as fast as bf16 in training, 1.5 x in decoding"
    why = choose_dtype(timings((10, 10, 10), (5, 20, 20))).why
    assert why == "measured 2.0 x as fast as fp32 in training, 0.5 x in decoding, half the memory"


def test_products_are_measured_in_both_dtypes():
    found = measure_products()
    assert found.keys() == DTYPE_KINDS.keys()
    for times in found.values():
        assert times.keys() == {512, 1, 16}
        assert all(0 < seconds < math.inf for seconds in times.values())


def counted(answers):
    """Return a measurement that gives one answer after another, and the list of those given."""
    given = []

    def measure():
        given.append(answers[len(given)])
        return given[-1]

    return measure, given


def test_a_measurement_is_kept(tmp_path):
    measure, given = counted([AVX512, AMX])
    path = tmp_path / "deep" / "kept.json"
    assert kept_timings(path, measure) == kept_timings(path, measure) == AVX512
    assert len(given) == 1
    assert json.loads(path.read_text())["torch"] == str(torch.__version__)
    assert kept_timings(tmp_path / "other.json", measure) == AMX
    assert {p.name for p in path.parent.iterdir()} == {"kept.json", "kept.json.lock"}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "7",
        '{"seconds": {"fp32": {"1": 2}}}',
        '{"seconds": {"fp32": {}, "bf16": {}}}',
        '{"seconds": {"fp32": [], "bf16": []}}',
        '{"seconds": {"fp32": {"512": 1, "1": 1, "16": 0}, "bf16": {"512": 1, "1": 1, "16": 1}}}',
        '{"seconds": {"fp32": {"512": 1, "1": 1, "16": NaN}, "bf16": {"512": 1, "1": 1, "16": 1}}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_measurement_is_made_anew(tmp_path, damage):
    measure, given = counted([AMX])
    path = tmp_path / "kept.json"
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert kept_timings(path, measure) == kept_timings(path, measure) == AMX
    assert len(given) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    measure, given = counted([AMX, AVX512])
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "kept.json"
    assert kept_timings(path, measure) == AMX
    assert kept_timings(path, measure) == AVX512
    assert len(given) == 2


def test_the_machine_has_a_name_and_its_threads():
    found = machine()
    assert found["processor"]
    assert found["threads"] == torch.get_num_threads()


def test_only_a_cpu_that_was_not_told_measures():
    def never():
        pytest.fail("measured")

    for asked in ("bf16", "fp32", torch.float16):
        assert explain_dtype(asked, CPU, never).why == ""
    assert explain_dtype(None, CPU, lambda: None).dtype is torch.float32
    assert explain_dtype(None, CPU, lambda: AVX512).dtype is torch.float32
    assert explain_dtype(None, CPU, lambda: AMX).dtype is torch.bfloat16
    assert pick_dtype("bf16", CPU) is torch.bfloat16
