"""Imports all of the library where nbdev can't be imported."""
import sys

sys.modules['nbdev'] = None

import lad_nb.cli  # noqa: E402, F401
