import pytest

from contrast.core.text import format_bytes, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 s"), (48.4, "48 s"), (59.7, "1 min"), (252, "4 min 12 s"), (3599.6, "1 h"), (12_000, "3 h 20 min"),
        (7200, "2 h"),
    ],
)  # fmt: skip
def test_a_duration_has_one_or_two_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(512, "512 bytes"), (734_003_200, "700 MiB"), (2**30 * 1.5, "1.5 GiB")])
def test_a_size_has_one_unit(count, text):
    assert format_bytes(count) == text
