"""``python -m pyro_blora`` is the command ``pyro-blora``."""

from pyro_blora.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
