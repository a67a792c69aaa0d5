"""From MLflow to tidy tables, statistics, figures and one report. Never imports torch, Ray or TRL."""
