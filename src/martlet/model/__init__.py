"""The network as data: what a decoder is (spec), who has which shape (families), and its weights by name (weights)."""
