"""What the commands of ``tqcompile`` do, one a file; ``cli.py`` only declares their options."""
