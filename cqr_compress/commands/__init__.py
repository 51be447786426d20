"""The commands on files: `cqr-compress NAME` is `commands/NAME.py`."""
