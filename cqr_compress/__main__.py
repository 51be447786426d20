"""`python -m cqr_compress`."""

from cqr_compress.cli.app import main

if __name__ == "__main__":
    main()
