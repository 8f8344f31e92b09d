"""The parts of ``benchmarks.sweep``: the grids of published methods, and the contest between ways to run them."""
