"""Plans and results as a person and as a program reads them; imported by a command when it has something to show."""
