"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """Returns a table whose cells may hold any text on one line, without a newline at its end.

    Args:
        titles: of the columns.
        rows: cells of each row, which are written by ``str``.
        align: a letter a column, "l" or "r"; empty: all columns are aligned to the left.
    """
    rules = {"l": "---", "r": "---:"}
    rule = [rules[letter] for letter in align or "l" * len(titles)]
    return "\n".join([_line(titles), f"|{'|'.join(rule)}|", *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    texts = (" ".join(str(cell).replace("|", "\\|").splitlines()) for cell in cells)
    return "".join(f"| {text} " if text else "| " for text in texts) + "|"
