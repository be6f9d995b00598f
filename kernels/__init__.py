"""GPU kernels, each beside its NumPy reference. Imports nothing of ours."""
