"""Finished models in other forms: adapters merged, weights quantised, GGUF files, uploads. Torch is allowed here."""
