"""The default dtype of a processor: the rule, the measurement, and its cache file."""

import json
import math

import pytest
import torch

from adapterhub_chat.model.devices import explain_dtype, pick_dtype
from adapterhub_chat.model.native_speed import (
    DTYPES_BY_NAME,
    cached_timings,
    choose_dtype,
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


def test_the_reason_names_both_speedups():
    reason = choose_dtype(AVX512).reason
    assert reason == "measured 1.9 x as fast as bf16 in training, 1.5 x in decoding"
    reason = choose_dtype(timings((10, 10, 10), (5, 20, 20))).reason
    assert (
        reason == "measured 2.0 x as fast as fp32 in training, 0.5 x in decoding, half the memory"
    )


def test_products_are_measured_in_both_dtypes():
    timings = measure_products()
    assert timings.keys() == DTYPES_BY_NAME.keys()
    for times in timings.values():
        assert times.keys() == {512, 1, 16}
        assert all(0 < seconds < math.inf for seconds in times.values())


def counted(answers):
    """Return a measurement that returns one answer after another, and the list of those returned."""
    returned = []

    def measure():
        returned.append(answers[len(returned)])
        return returned[-1]

    return measure, returned


def test_a_measurement_is_cached(tmp_path):
    measure, returned = counted([AVX512, AMX])
    path = tmp_path / "deep" / "kept.json"
    assert cached_timings(path, measure) == cached_timings(path, measure) == AVX512
    assert len(returned) == 1
    assert json.loads(path.read_text())["torch"] == str(torch.__version__)
    assert cached_timings(tmp_path / "other.json", measure) == AMX
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
def test_a_damaged_file_is_measured_again(tmp_path, damage):
    measure, returned = counted([AMX])
    path = tmp_path / "kept.json"
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert cached_timings(path, measure) == cached_timings(path, measure) == AMX
    assert len(returned) == 1


def test_a_read_only_folder_is_no_error(tmp_path):
    measure, returned = counted([AMX, AVX512])
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "kept.json"
    assert cached_timings(path, measure) == AMX
    assert cached_timings(path, measure) == AVX512
    assert len(returned) == 2


def test_the_machine_has_a_processor_and_threads():
    description = machine()
    assert description["processor"]
    assert description["threads"] == torch.get_num_threads()


def test_a_given_dtype_needs_no_measurement():
    def never():
        pytest.fail("measured")

    for asked in ("bf16", "fp32", torch.float16):
        assert explain_dtype(asked, CPU, never).reason == ""
    assert explain_dtype(None, CPU, lambda: None).dtype is torch.float32
    assert explain_dtype(None, CPU, lambda: AVX512).dtype is torch.float32
    assert explain_dtype(None, CPU, lambda: AMX).dtype is torch.bfloat16
    assert pick_dtype("bf16", CPU) is torch.bfloat16
