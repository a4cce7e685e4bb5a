"""The `matcher` commands, one module for each group. Nothing heavy is imported before a command runs."""
