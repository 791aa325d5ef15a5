"""`martlet export --quant_bits`: weights rounded to few bits, by themselves or so that the layer's output stays."""
