"""`python -m llp`: the same command as `llp`."""

from llp.cli import main

if __name__ == "__main__":
    main()
