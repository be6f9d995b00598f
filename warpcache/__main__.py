"""``python -m warpcache`` is the command ``warpcache``."""

from .cli import main

if __name__ == "__main__":
    main()
