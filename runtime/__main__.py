"""`python -m edgevl.runtime`: the same as the `edgevl` command."""

from edgevl.runtime.cli import main

if __name__ == "__main__":
    main()
