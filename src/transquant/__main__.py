"""`python -m transquant`."""

from transquant.cli import main

if __name__ == "__main__":
    main()
