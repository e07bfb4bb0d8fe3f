"""`python -m lors_cli`, the same as the `lors` command."""

from lors_cli.cli.app import main

if __name__ == "__main__":
    main()
