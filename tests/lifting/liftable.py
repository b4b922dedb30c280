"""What can be lifted: one table, which the tests run and the documentation shows."""

from tests.lifting import (
    liftable_architectures,
    liftable_initialisations,
    liftable_lora,
    liftable_methods,
    liftable_parts,
    liftable_toys,
)
from tests.lifting.liftable_row import Row

TABLE: tuple[Row, ...] = (
    *liftable_lora.ROWS,
    *liftable_initialisations.ROWS,
    *liftable_methods.ROWS,
    *liftable_parts.ROWS,
    *liftable_architectures.ROWS,
    *liftable_toys.ROWS,
)


def markdown() -> str:
    """The table in Markdown, one section for each group."""
    groups = dict.fromkeys(row.group for row in TABLE)
    sections = []
    for group in groups:
        lines = [f"## {group}", "", "| what | sites | particles | note |"]
        lines.append("|---|---|---|---|")
        lines += [_line(row) for row in TABLE if row.group == group]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _line(row: Row) -> str:
    particles = f"one by one: {row.one_by_one}" if row.one_by_one else "together"
    if row.raises:
        particles = "refused"
    if row.refused:
        return f"| {row.name} | refused | | {row.note} |"
    return f"| {row.name} | {row.sites} | {particles} | {row.note} |"
