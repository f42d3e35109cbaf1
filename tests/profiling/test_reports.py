"""Tables of the benchmark."""

from enat_jax.profiling import reports


def test_columns_are_aligned():
    text = reports.table([("a", str), ("long", lambda x: str(x**2))], [1, 1000])
    assert text == "   a     long\n   1        1\n1000  1000000"
