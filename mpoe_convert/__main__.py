"""`python -m mpoe_convert`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="mpoe-convert")
