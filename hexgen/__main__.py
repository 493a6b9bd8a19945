"""``python -m hexgen`` is the ``hexgen`` command."""

from hexgen.cli import main

if __name__ == "__main__":
    main()
