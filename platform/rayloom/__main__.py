"""`python -m rayloom` is the `rayloom` command; Ray jobs start it this way."""

from rayloom.cli import main

if __name__ == "__main__":
    main()
