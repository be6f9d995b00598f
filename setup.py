"""Map the top-level folders to subpackages of ``warpcache`` (the metadata is in pyproject.toml)."""

from setuptools import find_packages, setup

SUBPACKAGES = ("engine", "export", "kernels", "models")

setup(
    # find_packages, because an undeclared subpackage is silently missing from the wheel.
    packages=[
        "warpcache",
        *(f"warpcache.{package}" for package in find_packages("warpcache")),
        *(f"warpcache.{d}{'.' + p if p else ''}" for d in SUBPACKAGES for p in ["", *find_packages(d)]),
    ],
    package_dir={"warpcache": "warpcache", **{f"warpcache.{d}": d for d in SUBPACKAGES}},
    package_data={
        "warpcache": ["py.typed", "data/*", "data/demo.warp/*", "templates/*"],
        "warpcache.kernels": ["*.cu", "*.cuh"],
    },
)
