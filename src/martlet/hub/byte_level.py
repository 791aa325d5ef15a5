"""GPT-2's alphabet: how byte-level vocabularies spell bytes as characters."""

from __future__ import annotations

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
# Printable characters stand for themselves, the others for 256, 257, ...
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}
CHARACTERS = {byte: character for character, byte in BYTES.items()}
