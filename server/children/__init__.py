"""Helper processes of the API process: supervision, and the programs they run."""
