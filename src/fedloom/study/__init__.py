"""Recipes, arms, the run folder and the report: what is done with rounds."""
