"""``python -m pdlaunch`` is the ``pdlaunch`` command."""

from pdlaunch.cli import main

if __name__ == "__main__":
    main()
