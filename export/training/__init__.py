"""What every training shares: the loop, checkpoints, losses, the perceptual loss.

Imports nothing of the other folders but `frames`. A new training brings its step and its batches; loop, schedule and
resuming are here.
"""
