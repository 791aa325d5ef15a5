"""Triton kernels for one CUDA GPU. `martlet.runners.cuda_runner` strings them into a step.

They share three habits. Whatever is summed is summed in float32. A kernel reads where rows stand (row numbers,
positions, block tables) from device memory, so a CUDA graph that holds it stays right while sequences grow. And it may
be launched before its predecessor ends (`launch.py`), so it touches nothing but weights until it has waited.
"""
