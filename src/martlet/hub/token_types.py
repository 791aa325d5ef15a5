"""Types of tokens, as SentencePiece and GGUF files number them."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKEN = 1024  # characters; real vocabularies stay below 300
