"""The analyses of the report, one per file: ``NAME = Analysis(...)``; see ``emanalysis.analysis``."""
