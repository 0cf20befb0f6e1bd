"""The one exception that users of the package meet."""


class SVDQuantError(ValueError):
    """One sentence that names the file or layer, what is wrong and what to do.

    The command line prints it and exits with 2; libraries may catch it as a `ValueError`.
    """
