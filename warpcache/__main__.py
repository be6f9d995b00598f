"""``python -m warpcache`` is the command ``warpcache``."""

from .cli.main import main

if __name__ == "__main__":
    main()
