"""The rooms and who imports whom, read from the source: CONTRIBUTING.md's picture.

``python docs/rooms.py`` draws it anew; a test says when that is due.
"""

import re
from pathlib import Path

import grimp

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
# The one import that goes up; pyproject.toml says why.
EXCEPTIONS = [("pyro_lora.posteriors.shared", "pyro_lora.export.pretrained")]
BLOCK = re.compile(r"```mermaid\n.*?```", re.DOTALL)


def picture() -> str:
    """A mermaid graph: an arrow to each imported room, but for those implied."""
    graph = grimp.build_graph("pyro_lora")
    for importer, imported in EXCEPTIONS:
        graph.remove_import(importer=importer, imported=imported)
    rooms = sorted(graph.find_children("pyro_lora"))
    below = {
        room: {
            other
            for other in rooms
            if other != room and graph.chain_exists(room, other, as_packages=True)
        }
        for room in rooms
    }
    lines = [
        f"    {room.split('.')[1]} --> {other.split('.')[1]}"
        for room in rooms
        for other in sorted(below[room])
        if not any(other in below[between] for between in below[room])
    ]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: picture(), text), encoding="utf-8")
