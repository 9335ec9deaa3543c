"""The one base class of errors whose message is written for the user. Knows nothing of the rest."""


class UserError(Exception):
    """Something the user can put right. The message is one or two sentences: what happened, why, what to do next.

    The command line prints it without a traceback and exits 1; the HTTP API answers it as a 4xx or 503.
    """
