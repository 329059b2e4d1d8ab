"""`python -m megatron_capgap` runs the command line."""

from megatron_capgap.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
