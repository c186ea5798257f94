"""The base of every error that a user can cause and mend."""


class MlcRayError(Exception):
    """Its message quotes the offending value and names the fix; the command line prints it without a traceback."""
