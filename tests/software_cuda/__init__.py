"""A CUDA driver in software, for tests on machines without a GPU. See README.md."""
