"""From one recipe file to a sweep of runs, and the ``emsweep`` command."""
