"""Training files, data sets, jobs and evaluations, in the API process."""
