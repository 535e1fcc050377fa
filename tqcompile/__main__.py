"""``python -m tqcompile``."""

from tqcompile.cli import main

main()
