"""Ends while a run goes on in its worker thread: python forgotten.py RECIPE ROOT, as in open_stepper.py."""
from open_stepper import stepper

stepper.step()
stepper.start()
print('leaving', stepper.state)
