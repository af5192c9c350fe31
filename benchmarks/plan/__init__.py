"""Forecasts of `fedloom plan` beside the runs that they foretell: see README.md."""
