"""Starts the console command with the words it is given, or only imports it, and prints which of the slow
libraries came along."""
import sys

from lad_nb.__main__ import main

code = main(sys.argv[1:]) if sys.argv[1:] else 0
print(sorted({'torch', 'transformers', 'pandas', 'datasets', 'numpy', 'dask'} & set(sys.modules)))
sys.exit(code)
