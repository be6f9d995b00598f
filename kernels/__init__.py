"""CUDA from Python, and GPU kernels, each beside its NumPy reference in `reference`. Imports nothing of ours.

`driver`, `array` and `errors` are the ground; `compiler` and `loader` bring a ``.cu`` file to a GPU; `image`, `change`,
`warp` and `rasterizer` launch. Launchers work alike. Arrays are borrowed `DeviceArray`s, checked by `arguments` before
anything is launched. ``prepare...(...)`` gives what is launched again and again by ``launch(stream)``, for little more
than a driver call costs, and may be captured in a graph; the method without ``prepare`` does both at once. Work is in
order on the stream whose handle is given, lets no host thread wait and takes no memory. ``bytes_moved`` is what a call
has to read and write, for comparing its time with a copy's.
"""
