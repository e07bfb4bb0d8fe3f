"""The tuning stage."""
