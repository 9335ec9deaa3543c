"""Log the version without asking the package index whether there is a newer one.

Why: every start of a server made a web request to the package index through requests and waited for it; offline it logged a
    traceback. The distribution's own updates are not Petals'.
Status: windows-only
Upstream-issue: none
Drop-when: never.
"""

from petals_win.upstream.declare import remove_import, replace

remove_import("petals.utils.version", "requests")
remove_import("petals.utils.version", "parse")


@replace("petals.utils.version:validate_version", digest="b53efdcba73a73a5")
def validate_version() -> None:
    logger.info(f"Running {TextStyle.BOLD}Petals {petals.__version__}{TextStyle.RESET} of petals-win")
