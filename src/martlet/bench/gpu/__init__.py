"""`martlet bench gpu`: workloads G1-G6 on the native engine, vLLM and transformers, with random weights."""
