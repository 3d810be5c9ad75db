"""The processor's description: the first core's fields, or what Python's `platform` knows."""

import platform

from adapterhub_chat.lora.processor import cpu_fields, processor_name

TWO_CORES = """\
processor\t: 0
model name\t: Fast 9
flags\t\t: avx2 fma

processor\t: 1
model name\t: Slow 1
"""


def test_fields_are_those_of_the_first_core(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(TWO_CORES)
    fields = cpu_fields(path)
    assert (fields["processor"], fields["flags"]) == ("0", "avx2 fma")
    assert processor_name(path) == "Fast 9"


def test_a_missing_file_falls_back_to_platform(tmp_path):
    assert cpu_fields(tmp_path / "missing") == {}
    expected = platform.processor() or platform.machine()
    assert processor_name(tmp_path / "missing") == expected
    assert processor_name()
