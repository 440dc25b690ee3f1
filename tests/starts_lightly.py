"""Imports what the console command starts with, and prints which of the slow libraries came along."""
import sys

import lad_nb.__main__  # noqa: F401

print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))
