"""Commands on files: `commands/NAME.py` implements `cqr-compress NAME`."""
