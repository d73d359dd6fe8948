"""The command line: what the user types and sees."""
