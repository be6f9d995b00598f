"""The kernels in NumPy: plain and slow, what the GPU is compared with."""
