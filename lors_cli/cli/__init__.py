"""The `lors` command. `app` registers the commands; a file holds a panel of them, `views` what they show."""

from lors_cli.cli.app import main

__all__ = ["main"]
