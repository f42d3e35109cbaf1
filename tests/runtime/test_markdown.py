from enat_jax.runtime import markdown


def test_a_table_with_columns_to_the_right():
    assert markdown.table(["", "value"], [["a", 1], ["b", 0.5]], align="lr").splitlines() == [
        "| | value |",
        "|---|---:|",
        "| a | 1 |",
        "| b | 0.5 |",
    ]


def test_a_cell_is_one_cell_whatever_is_in_it():
    lines = markdown.table(["x"], [["a|b\nc"]]).splitlines()
    assert lines == ["| x |", "|---|", "| a\\|b c |"]
