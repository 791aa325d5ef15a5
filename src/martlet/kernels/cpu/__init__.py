"""Kernels in C++ for CPUs: the library, the program it runs, and weights packed for it. Needs numpy only."""
