"""The exit codes of every command, for scripts."""

OK = 0
"""The command ran and found nothing wrong."""
FOUND = 1
"""The command ran and found something wrong, such as a broken package or a wrong plan."""
USAGE = 2
"""An argument or option is not accepted. Nothing has run."""
CANNOT = 3
"""The command could not run to its end: a package is missing or broken, or an unexpected error was raised."""
