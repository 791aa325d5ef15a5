"""Training: rows of text in, adapters and checkpoints out. Stands on transformers, peft and trl (`martlet[train]`)."""
