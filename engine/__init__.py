"""Runtime: bundles, modules, devices, caches, scheduler, sessions. Never imports torch."""
