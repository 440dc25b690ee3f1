"""python reruns.py FOLDER NAME: repeats the run of a run folder as experiment NAME."""
import sys

from lad_nb.experiment import rerun

if __name__ == '__main__': rerun(*sys.argv[1:], progress=False)
