"""How near two images are: PSNR, SSIM, MS-SSIM, FLIP and LPIPS in NumPy.

Imports the engine's errors and `spec`. A new metric is a function here and a line in `images.METRICS`, which
calibration, benchmarks and the command line share.
"""
